"""The notebooks in notebooks/ run, and they are stored without outputs."""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code(notebook: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code"]


class Screen:
    """The output of a notebook: results of cells, and drawings that are replaced."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def display(self, value: Any, display_id: bool = False) -> "Screen":
        html = getattr(value, "_repr_html_", None)
        self.shown.append(html() if html is not None else repr(value))
        return self

    update = display


def run_cell(source: str, names: dict[str, Any], screen: Screen) -> None:
    """Execute a cell as IPython does: the value of its last expression is shown."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        if value is not None:
            screen.display(value)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_are_stored_without_outputs_and_their_code_compiles(notebook: Path) -> None:
    for cell in cells(notebook):
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    for source in code(notebook):
        ast.parse(source)


@pytest.mark.release
@pytest.mark.report
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    interactive = ModuleType("IPython.display")
    interactive.display = screen.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", interactive)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for source in code(notebook):
        run_cell(source, names, screen)
    assert screen.shown
    if "result" in names:
        assert any("<svg" in shown for shown in screen.shown)
        values = names["result"].values("accuracy")
        assert values[-1] > values[0]
