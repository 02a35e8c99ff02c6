"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.S | re.M)
    return [text for written_in, text in found if written_in == language]


@pytest.mark.report
def test_the_example_with_an_own_model_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if "Federation(" in block)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    accuracies = names["result"].values("accuracy")  # type: ignore[attr-defined]
    assert accuracies[0] < 0.6
    assert accuracies[-1] > 0.85
    assert (tmp_path / "runs" / "own-model" / "report.html").is_file()


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    from fedsmoothlora.config import read

    for example, column in zip(blocks("toml"), ("hospital", "site"), strict=True):
        (tmp_path / "own.toml").write_text(example, encoding="utf-8")
        assert read(tmp_path / "own.toml").partition.column == column


def test_every_command_that_the_readme_shows_exists() -> None:
    from typer.testing import CliRunner

    from fedsmoothlora.cli import app

    commands = set(re.findall(r"fedsmoothlora ([a-z]+) ?", "\n".join(blocks(""))))
    assert commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
