"""The commands about configurations: config, show, init and migrate."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsmoothlora import cli
from fedsmoothlora.cli.configuration import rewrite
from fedsmoothlora.config import read, recipes
from fedsmoothlora.config.shipped import recipe_text
from fedsmoothlora.errors import ConfigError

RENAMED = {"training.learning_rate": "training.lr"}
OLD = "[training]\nlearning_rate = 0.1  # slow\nrounds = 2\n"

Said = Callable[..., str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    """Run a command in an empty folder; return its output, or its one line of error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fedsmoothlora", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            if stop.code:
                line = capsys.readouterr().err
                assert line.startswith("error: ")
                assert line.count("\n") == 1
                return line
        return capsys.readouterr().out

    return call


def test_config_lists_sections_keys_and_one_key(said: Said) -> None:
    assert "[participation]" in said("config")
    assert "batch_size" in said("config", "training")
    one = said("config", "method.gamma")
    assert "256.0" in one
    assert "zeta" not in one
    assert "did you mean 'lr'" in said("config", "training.lrr")


@pytest.mark.parametrize("recipe", recipes())
def test_show_prints_a_recipe(said: Said, recipe: str) -> None:
    assert said("show", recipe) == recipe_text(recipe)


def test_show_refuses_an_unknown_recipe(said: Said) -> None:
    assert "did you mean 'quickstart'" in said("show", "quikstart")


def test_init_copies_a_recipe_and_never_overwrites(said: Said, tmp_path: Path) -> None:
    assert "fedsmoothlora check my.toml" in said("init", "quickstart", "my.toml")
    assert read(tmp_path / "my.toml") == read("quickstart")
    (tmp_path / "my.toml").write_text("mine")
    assert "my.toml exists and is not overwritten" in said("init", "quickstart", "my.toml")
    assert (tmp_path / "my.toml").read_text() == "mine"
    said("init", "minilm-bbc")
    assert (tmp_path / "minilm-bbc.toml").is_file()


def test_init_with_data_writes_a_configuration_for_these_data(said: Said, tmp_path: Path) -> None:
    (tmp_path / "news.csv").write_text("text,label\n" + "goal,sport\nvote,politics\n" * 20)
    assert "news.toml" in said("init", "--data", "news.csv")
    assert read(tmp_path / "news.toml").data.source == "news.csv"
    said("init", "--data", "news.csv", "other.toml")
    assert read(tmp_path / "other.toml").name == "news"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--data PATH"),
        (["quikstart"], "did you mean 'quickstart'"),
        (["--data", "gone.csv"], "gone.csv: there is no such file or folder"),
        (["--data", "x.csv", "quickstart", "my.toml"], "not both quickstart and my.toml"),
        (["quickstart", "gone/my.toml"], "gone/my.toml"),
    ],
)
def test_errors_of_init_are_one_line(said: Said, tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in said("init", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_migrate_leaves_a_current_file_as_it_is(said: Said, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(recipe_text("quickstart"))
    assert said("migrate", "my.toml") == "my.toml: all names are current; nothing to do\n"
    assert (tmp_path / "my.toml").read_text() == recipe_text("quickstart")
    assert "there is no such file" in said("migrate", "gone.toml")


@pytest.mark.parametrize("text", [OLD, OLD.replace("\n", "\r\n")])
def test_a_rewritten_file_keeps_comments_and_line_endings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "old.toml"
    file.write_bytes(text.encode())
    differences = rewrite(file, RENAMED, dry_run=True)
    assert file.read_bytes() == text.encode()
    assert {"-learning_rate = 0.1  # slow", "+lr = 0.1  # slow"} < set(differences)
    assert rewrite(file, RENAMED, dry_run=False) == differences
    assert file.read_bytes() == text.replace("learning_rate", "lr").encode()
    assert rewrite(file, RENAMED, dry_run=False) == []


def test_a_file_that_cannot_be_rewritten_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text("training = {learning_rate = 1}")
    with pytest.raises(ConfigError, match=r"old\.toml: .* by hand"):
        rewrite(file, RENAMED, dry_run=False)
    assert file.read_text() == "training = {learning_rate = 1}"
