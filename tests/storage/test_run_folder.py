"""Folders that are not runs are refused, and errors name the file in one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.errors import StateError, StorageError
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.storage.files import remove_parts, write_bytes, write_whole_folder
from fedsmoothlora.storage.run_folder import RunFolder

RECORD = RoundRecord(round=1, metrics=[Metric(None, "loss", 0.5)], confusion=torch.eye(2))


def test_a_folder_whose_run_had_not_begun_is_cleared(tmp_path: Path) -> None:
    """A process that was killed between writing its first files leaves such a folder."""
    out = tmp_path / "run"
    folder = RunFolder.create(out)
    folder.write_json("partition.json", {})
    folder.write_json("environment.json", {})
    (out / ".inputs.json.77.part").write_text("half")
    with pytest.raises(StateError, match="begin it with --out"):
        RunFolder.open(out)
    RunFolder.create(out)
    assert list(out.iterdir()) == []


def test_a_run_or_a_folder_of_something_else_is_not_cleared(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.begin("name = 'x'", {}, {"experiment": "x"})
    for name in ("photo.jpg", "partition.json/inside"):
        file = tmp_path / f"of-{name[:5]}" / name
        file.parent.mkdir(parents=True)
        file.write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "run", tmp_path / "of-photo"):
        with pytest.raises(FileExistsError, match="not empty"):
            RunFolder.create(out)
    with pytest.raises(StorageError):
        RunFolder.create(tmp_path / "of-parti")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["file/run", "x" * 300, "deep/" + "y" * 300])
def test_a_path_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        RunFolder.create(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_whose_name_is_too_long_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read: File name too long"):
        RunFolder.open(tmp_path / ("x" * 300))


def test_metrics_on_a_full_disk_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: No space left"):
        RunFolder(tmp_path).append_metrics(RECORD)


@pytest.mark.parametrize("line", ["{", "1", "[]", '{"round": 1}', "[" * 100_000])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: str) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics(RECORD)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StateError, match=r"metrics\.jsonl, line 2") as caught:
        folder.metrics()
    assert "\n" not in str(caught.value)


def test_metrics_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(StateError, match=r"metrics\.jsonl"):
        RunFolder(tmp_path).metrics()


@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_any_damage_to_a_json_file_is_one_line(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run")
    (path / "environment.json").write_bytes(content)
    with pytest.raises(StateError, match=r"environment\.json") as caught:
        _ = RunFolder(path).experiment
    assert "\n" not in str(caught.value).replace(repr(content), "")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"classes": ["only"]}'])
def test_a_damaged_partition_does_not_end_a_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "partition.json").write_text(content)
    RunFolder(tmp_path).write_confusion(RECORD)
    written: dict[str, Any] = json.loads((tmp_path / "confusion.json").read_text())
    assert written["classes"] == ["0", "1"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"

    def fail() -> None:
        with write_whole_folder(out) as folder:
            (folder / "one").write_text("1")
            raise OSError(28, os.strerror(28))

    with pytest.raises(StorageError, match="out cannot be written: No space left"):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []
    with write_whole_folder(out) as folder:
        (folder / "one").write_text("1")
    assert [path.name for path in out.iterdir()] == ["one"]


def test_half_written_files_are_removed_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".model.7.part").mkdir(parents=True)
    (tmp_path / "deep" / ".model.7.part" / "x").write_text("")
    (tmp_path / ".state.json.8.part").write_text("half")
    write_bytes(tmp_path / "deep" / "kept.part", b"")
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kept.part"]
