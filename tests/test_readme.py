"""The examples of the README and of the pages in docs/ work as they stand there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, DATA, CHAT = ROOT / "README.md", ROOT / "docs" / "data.md", ROOT / "docs" / "chat.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, page: Path = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
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


@pytest.mark.parametrize(("page", "column"), [(README, "hospital"), (DATA, "site"), (CHAT, "site")])
def test_the_example_configurations_are_valid(page: Path, column: str, tmp_path: Path) -> None:
    from fedsmoothlora.config import read

    (example,) = blocks("toml", page)
    (tmp_path / "own.toml").write_text(example, encoding="utf-8")
    assert read(tmp_path / "own.toml").partition.column == column


def test_every_command_and_option_that_a_page_shows_exists() -> None:
    import typer

    from fedsmoothlora.cli import app

    group = typer.main.get_command(app)
    shown = "\n".join(block for page in PAGES for language in ("", "sh") for block in blocks(language, page))
    lines = re.findall(r"^fedsmoothlora ((?:flower )?)(\w+)(.*)", shown.replace("\\\n", " "), re.M)
    assert {"run", "check", "compare", "tune", "export", "init", "migrate"} <= {name for _, name, _ in lines}
    for flower, name, arguments in lines:
        commands = (group.commands["flower"] if flower else group).commands  # type: ignore[attr-defined]
        options = {option for one in commands[name].params for option in one.opts}
        written = re.findall(r"(?<!\S)--[a-z-]+", arguments.partition("#")[0])
        assert set(written) <= options, (name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_or_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:src|tests|docs|tools|benchmarks)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
