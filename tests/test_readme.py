"""The examples of the README and of the pages in docs/ work as they stand there."""

import ast
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fedsmoothlora
from fedsmoothlora import errors
from fedsmoothlora.config import parse_override, read, recipes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README, OWN_MODEL = ROOT / "README.md", DOCS / "how-to" / "own-model.md"
WRITING = DOCS / "tutorials" / "writing-a-method.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = [page for page in PAGES if page.parent.name in ("tutorials", "how-to")]


def blocks(language: str, page: Path = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [text for written_in, text in found if written_in == language]


def examples(language: str, pages: list[Path]) -> list[Any]:
    """Every block in the language, with the page and the block's number as its id."""
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT).as_posix()}-{number}")
        for page in pages
        for number, text in enumerate(blocks(language, page), start=1)
    ]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.report
def test_the_example_with_an_own_model_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = executed(OWN_MODEL, "Federation(")
    accuracies = names["result"].values("accuracy")
    assert accuracies[0] < 0.6
    assert accuracies[-1] > 0.85
    assert (tmp_path / "runs" / "own-model" / "report.html").is_file()


def test_the_tutorial_on_methods_writes_a_method_that_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = executed(WRITING, "Federation(")
    accuracies = names["result"].values("accuracy")
    assert accuracies[0] < 0.6
    assert accuracies[-1] > 0.8


def test_the_example_of_an_error_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    executed(DOCS / "errors.md", "except")
    assert "training.rounds" in capsys.readouterr().out


def executed(page: Path, part: str) -> dict[str, Any]:
    """The names that the page's one Python example with ``part`` in it defines."""
    (example,) = (block for block in blocks("python", page) if part in block)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, page.name, "exec"), names)
    return names


@pytest.mark.parametrize("example", examples("python", [README, *GUIDES, *DOCS.glob("[!e]*.md")]))
def test_examples_in_python_import_names_that_exist(example: str) -> None:
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fedsmoothlora"):
            module = import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize(
    ("page", "column"),
    [("how-to/configurations.md", "hospital"), ("data.md", "site"), ("chat.md", "site")],
)
def test_the_example_configurations_are_valid(page: str, column: str, tmp_path: Path) -> None:
    (example,) = blocks("toml", DOCS / page)
    (tmp_path / "own.toml").write_text(example, encoding="utf-8")
    assert read(tmp_path / "own.toml").partition.column == column


@pytest.mark.parametrize("example", examples("toml", GUIDES))
def test_every_configuration_of_the_guides_is_valid(example: str, tmp_path: Path) -> None:
    """A configuration without a model is a part of one, which a recipe completes."""
    table = tomllib.loads(example)
    if "model" in table:
        (tmp_path / "own.toml").write_text(example, encoding="utf-8")
        assert read(tmp_path / "own.toml").name == table["name"]
    else:
        keys = {f"{section}.{key}": value for section, part in table.items() for key, value in part.items()}
        config = read("quickstart", keys)
        for key, value in keys.items():
            section, _, name = key.partition(".")
            options = config.method.options() if section == "method" else {}
            assert options.get(name, getattr(getattr(config, section), name, None)) == value


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


def test_the_recipes_and_values_in_commands_are_valid() -> None:
    shown = "\n".join(block for page in [README, *GUIDES, *DOCS.glob("*.md")] for block in blocks("", page))
    lines = re.findall(
        r"^fedsmoothlora (?:run|check|compare|tune|attack) (.*)", shown.replace("\\\n", " "), re.M
    )
    checked = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] in recipes() and "$SMALL" not in words:
            sets = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
            read(words[0], dict(parse_override(text) for text in sets))
            checked += 1
    assert checked > 10


def test_pages_with_packaged_models_install_what_reads_them() -> None:
    """A command that installs one extra leaves out the others."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        installed = re.findall(r"pip install ['\"](?:fedsmoothlora|\.)\[([\w,]+)\]", text)
        if installed and re.search(r'^source = "pkg:', text, re.M):
            assert any("packages" in extras.split(",") for extras in installed), page.name


def test_the_site_shows_every_page_and_every_page_is_there() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", menu, re.M)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_api_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: fedsmoothlora\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(set(fedsmoothlora.__all__) - {"__version__"})


def test_the_page_on_errors_names_every_error_and_says_which_are_public() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    table = text.partition("## By class")[2]
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(re.findall(r"`(\w+Error)`", table)) == found - {"FedSmoothLoRAError"}
    public = {name for name in fedsmoothlora.__all__ if name.endswith("Error")}
    assert set(re.findall(r"\*\*`(\w+Error)`\*\*", table)) == public - {"FedSmoothLoRAError"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_links_to_or_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:src|tests|docs|tools|benchmarks)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_messages_that_the_page_on_errors_quotes_exist() -> None:
    situations = (DOCS / "errors.md").read_text(encoding="utf-8").partition("## By situation")[2]
    quoted = re.findall(r"(?<!\*)\*([^*|]+)\*(?!\*)", situations.partition("## By class")[0])
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    code = re.sub(r"\"\s+f?\"", "", "\n".join(sources))  # one text of several lines
    assert len(quoted) > 8
    assert [text for text in quoted if text not in code] == []
