"""The data and configurations of the tutorials train, with a tiny model in place of the packaged one."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fedsmoothlora import Result, run
from fedsmoothlora.cli import app
from fedsmoothlora.config import read

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def blocks(page: str, language: str) -> list[str]:
    text = (TUTORIALS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def train(configuration: str, model: Path, folder: Path, **values: Any) -> Result:
    (folder / "tutorial.toml").write_text(configuration, encoding="utf-8")
    overrides = {
        "model.source": str(model),
        "training.rounds": 1,
        "training.precision": "fp32",
        "machine.device": "cpu",
        "machine.threads": 1,
    }
    table = overrides | {key.replace("__", "."): value for key, value in values.items()}
    return run(folder / "tutorial.toml", table, console=Console(quiet=True), outputs=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(folder: Path, rows: int) -> None:
    """Images in the layout of the tutorial: clients, and in each of them classes."""
    rng = np.random.default_rng(0)
    for client in ("hospital-a", "hospital-b"):
        for brightness, name in ((60, "effusion"), (180, "normal")):
            (folder / client / name).mkdir(parents=True)
            for number in range(rows):
                pixels = rng.normal(brightness, 20, (28, 28)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / client / name / f"{number:03}.png")


def test_the_folders_of_the_tutorial_on_images_become_clients(here: Path, tiny_folder: Path) -> None:
    images(here / "xrays", 20)
    (configuration,) = blocks("own-images.md", "toml")
    result = train(configuration, tiny_folder, here, model__image_size=28, training__batch_size=8)
    assert sorted(result.frame().client.dropna().unique()) == ["hospital-a", "hospital-b"]
    assert result.rounds == 1


def test_init_guesses_the_folders_of_the_tutorial_on_images(here: Path) -> None:
    images(here / "xrays", 20)
    done = CliRunner().invoke(app, ["init", "--data", "xrays", "xrays.toml"])
    assert done.exit_code == 0, done.output
    config = read("xrays.toml")
    (shown,) = blocks("own-images.md", "toml")
    (here / "shown.toml").write_text(shown, encoding="utf-8")
    assert config.partition == read("shown.toml").partition
    assert config.data.source == read("shown.toml").data.source


def repeated(page: str, name: str, times: int) -> str:
    """The page's lines of JSON, with a number in each so that no two rows are equal."""
    (lines,) = blocks(page, "jsonl")
    rows = [json.loads(line) for line in lines.splitlines()]
    written = []
    for number in range(times):
        for row in rows:
            text = json.dumps(row).replace(".", f" {number}.", 1)
            written.append(text)
    Path(name).write_text("\n".join(written) + "\n", encoding="utf-8")
    return name


def test_the_classifier_of_the_tutorial_on_texts_trains(here: Path, tiny_bert: Path) -> None:
    repeated("own-texts.md", "letters.jsonl", 20)
    classifier, _ = blocks("own-texts.md", "toml")
    result = train(classifier, tiny_bert, here, training__batch_size=8, training__steps=2)
    assert sorted(result.frame().client.dropna().unique()) == ["north", "south"]
    assert "accuracy" in result.names


def test_the_language_model_of_the_tutorial_on_texts_trains(here: Path, tiny_llama: Path) -> None:
    repeated("own-texts.md", "letters.jsonl", 20)
    _, generated = blocks("own-texts.md", "toml")
    values = {"task__max_length": 128, "training__batch_size": 8, "training__steps": 2}
    result = train(generated, tiny_llama, here, **values)
    assert {"loss", "exact_match"} <= set(result.names)


def test_the_conversations_of_the_tutorial_on_chats_train(here: Path, tiny_llama: Path) -> None:
    repeated("chat.md", "conversations.jsonl", 20)
    (configuration,) = blocks("chat.md", "toml")
    values = {"task__max_length": 128, "training__batch_size": 8, "training__steps": 2}
    result = train(configuration, tiny_llama, here, **values)
    assert sorted(result.frame().client.dropna().unique()) == ["north", "south"]
