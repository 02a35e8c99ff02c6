"""Data files, base weights and the configuration are recorded when a run begins and compared later."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsmoothlora.config import absolute_paths, read, to_toml
from fedsmoothlora.data.media_sources import load_images
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.errors import StateError
from fedsmoothlora.storage.inputs import (
    MODEL,
    base_model,
    check_config,
    check_inputs,
    recorded_inputs,
)
from fedsmoothlora.storage.run_folder import RunFolder

ROWS = '{"prompt": "the cat", "answer": "one"}\n{"prompt": "the dog", "answer": "two"}\n'


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    """A configuration with a model folder and a folder of tables; neither is loaded."""
    model, data = tmp_path / "model", tmp_path / "data"
    for folder in (model, data, data / "deep"):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    (model / "README.md").write_text("not read")
    (data / "a.jsonl").write_text(ROWS)
    (data / "deep" / "b.jsonl").write_text(ROWS)
    (data / ".hidden").write_text("not read")
    return {
        "name": "x",
        "model": {"source": str(model)},
        "data": {"source": str(data)},
        "task": {"kind": "causal-lm"},
        "partition": {"kind": "iid", "clients": 2},
    }


@pytest.fixture
def begun(table: dict[str, Any], tmp_path: Path) -> RunFolder:
    """The folder of a run that has begun."""
    config = read(table)
    folder = RunFolder.create(tmp_path / "run")
    folder.begin(to_toml(config), {"config": to_toml(config), **recorded_inputs(config)}, {"experiment": "x"})
    return folder


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def same_size_and_time(file: Path) -> None:
    stamp = file.stat().st_mtime_ns
    file.write_bytes(bytes(reversed(file.read_bytes())))
    import os

    os.utime(file, ns=(stamp, stamp))


def add(file: Path) -> None:
    shutil.copy(file, file.with_name("more" + file.suffix))


CHANGES: dict[str, Callable[[Path], None]] = {
    "append": append,
    "same size and time": same_size_and_time,
    "remove": Path.unlink,
    "add": add,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["data/a.jsonl", "data/deep/b.jsonl", "model/model.safetensors"])
def test_a_changed_input_is_refused_by_name(
    table: dict[str, Any], begun: RunFolder, tmp_path: Path, name: str, change: str
) -> None:
    check_inputs(begun, recorded_inputs(read(table)))
    file = tmp_path / name
    CHANGES[change](file)
    wanted = "more" if change == "add" else file.name
    with pytest.raises(StateError, match=f"{wanted}.*was (changed|added|removed)") as caught:
        check_inputs(begun, recorded_inputs(read(table)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["data/.hidden", "model/README.md", "model/pytorch_model.bin"])
def test_files_that_no_run_reads_may_change(
    table: dict[str, Any], begun: RunFolder, tmp_path: Path, name: str
) -> None:
    append(tmp_path / name)
    check_inputs(begun, recorded_inputs(read(table)))


@pytest.mark.parametrize("name", ["~$a.csv", "#recycle/z.csv", "lost+found/z", "@eaDir/x", "sub/~$b.csv"])
def test_leftovers_that_reading_ignores_may_come_and_go(
    table: dict[str, Any], begun: RunFolder, tmp_path: Path, name: str
) -> None:
    leftover = tmp_path / "data" / name
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_text("x")
    check_inputs(begun, recorded_inputs(read(table)))


def test_a_data_file_called_inputs_json_does_not_hide_its_folder(
    table: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "data" / "inputs.json").write_text("[]")
    recorded = recorded_inputs(read(table))["data.source"]["files"]
    assert {"a.jsonl", "deep/b.jsonl", "inputs.json"} <= recorded.keys()


def test_a_run_inside_the_data_folder_does_not_change_its_own_inputs(
    table: dict[str, Any], tmp_path: Path
) -> None:
    config = read(table)
    folder = RunFolder.create(tmp_path / "data" / "runs" / "one")
    folder.begin(to_toml(config), recorded_inputs(config), {"experiment": "x"})
    check_inputs(folder, recorded_inputs(config))


def test_inputs_may_be_moved(table: dict[str, Any], begun: RunFolder, tmp_path: Path) -> None:
    for section in ("model", "data"):
        (tmp_path / section).rename(tmp_path / f"moved-{section}")
        table[section]["source"] = str(tmp_path / f"moved-{section}")
    check_inputs(begun, recorded_inputs(read(table)))
    begun.config.write_text(to_toml(read(table)))
    check_config(begun)


def test_inputs_that_were_not_recorded_are_not_compared(table: dict[str, Any], begun: RunFolder) -> None:
    (begun.path / "inputs.json").unlink()
    append(Path(table["data"]["source"]) / "a.jsonl")
    check_inputs(begun, recorded_inputs(read(table)))
    begun.config.write_text("edited = 1")
    check_config(begun)


def test_packages_are_recorded_by_their_version(table: dict[str, Any]) -> None:
    table["data"]["source"], table["model"]["source"] = "pkg:mnist-5k", "pkg:minilm-l6"
    found = recorded_inputs(read({**table, "task": {"kind": "image-classification"}}))
    assert "==" in found["data.source"]["package"]
    assert "==" in found[MODEL]["package"]


def test_images_that_a_table_names_are_recorded(table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        pixels = np.full((8, 8), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    rows = "".join(f"images/{number}.png,{'ab'[number % 2]}\n" for number in range(4))
    (tmp_path / "table.csv").write_text("image,label\n" + rows)
    data = load_images(DataSettings(source=str(tmp_path / "table.csv")), 0)
    table["data"]["source"] = str(tmp_path / "table.csv")
    config = read({**table, "task": {"kind": "image-classification"}})
    before = recorded_inputs(config, [data.train, None])
    append(tmp_path / "images" / "2.png")
    after = recorded_inputs(config, [data.train, None])
    (key,) = [key for key in before if before[key] != after[key]]
    changed = [name for name, digest in before[key]["files"].items() if after[key]["files"][name] != digest]
    assert [Path(name).name for name in changed] == ["2.png"]


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [
        ("lr =", "lr = 0.5\n#", "training.lr"),
        ("alpha =", "alpha = 99.0\n#", "lora.alpha"),
        ("keep =", "keep = 7\n#", None),
        ('name = "x"', 'name = "y"', None),
    ],
)
def test_an_edited_configuration_is_noticed(
    begun: RunFolder, old: str, new: str, refused: str | None
) -> None:
    text = begun.config.read_text()
    assert old in text
    begun.config.write_text(text.replace(old, new, 1))
    if refused is None:
        check_config(begun)
    else:
        with pytest.raises(StateError, match=rf"{refused} was edited"):
            check_config(begun)


def test_paths_become_absolute_and_all_else_stays(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = absolute_paths(read(table))
    table["model"]["source"], table["data"]["source"] = "model", "./data"
    assert absolute_paths(read(table)) == absolute
    assert absolute.model.source == str(tmp_path / "model")
    for source in ("pkg:mnist-5k", "owner/name", "no such folder"):
        table["model"]["source"] = source
        assert absolute_paths(read(table)).model.source == source


def test_a_damaged_record_is_named(table: dict[str, Any], begun: RunFolder) -> None:
    (begun.path / "inputs.json").write_text("[1")
    with pytest.raises(StateError, match=r"inputs\.json"):
        check_inputs(begun, recorded_inputs(read(table)))
    record = {"data.source": "nonsense", MODEL: base_model(read(table))}
    (begun.path / "inputs.json").write_text(json.dumps(record))
    with pytest.raises(StateError, match=r"data\.source was changed"):
        check_inputs(begun, recorded_inputs(read(table)))
