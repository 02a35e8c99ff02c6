"""The package has layers, and no lower one imports a higher one."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedsmoothlora

PACKAGE = Path(fedsmoothlora.__file__).parent
# Lowest first. A name stands for the module or, with all that is in it, for the folder.
LAYERS = {
    "settings": {"errors", "federation_settings", "modeling", "training_settings"},
    "mathematics": {
        "alignment",
        "averaging",
        "diagnostics",
        "errors",
        "lowrank",
        "methods",
        "schedules",
        "seeds",
        "server_optimizers",
        "sketches",
        "spectral",
        "update",
    },
    "learning": {
        "adapters",
        "backbone",
        "branch",
        "calibration",
        "client",
        "client_state",
        "corrections",
        "data",
        "devices",
        "exchange",
        "fingerprint",
        "mapped",
        "models",
        "origin",
        "packages",
        "participation",
        "rounds",
        "server",
        "sources",
        "tasks",
        "training",
        "transport",
        "uploads",
        "watching",
    },
    "edges": {
        "__init__",
        "catalogue",
        "cli",
        "comparison",
        "config",
        "engines",
        "environment",
        "exports",
        "federation",
        "files",
        "generation",
        "logs",
        "method_table",
        "progress",
        "tracking",
        "report",
        "planning",
        "restoring",
        "running",
        "check",
        "run_folder",
        "state",
    },
}
ORDER = list(LAYERS)
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MATHEMATICS_MAY_IMPORT = {*sys.stdlib_module_names, "torch", "annotated_types", "fedsmoothlora"}


def layer_of(name: str) -> str | None:
    return next((layer for layer, names in LAYERS.items() if name in names), None)


def top(path: Path) -> str:
    """The first part of a module's path inside the package: ``data/raw.py`` is in ``data``."""
    return path.parts[0].removesuffix(".py")


def is_submodule(name: str) -> bool:
    return (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name / "__init__.py").is_file()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        for name in imported(node):
            yield node.lineno, name


def imported(node: ast.AST) -> Iterator[str]:
    """The dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_module_belongs_to_a_layer(path: Path) -> None:
    assert layer_of(top(path)), (
        f"src/fedsmoothlora/{path} is in no layer: add {top(path)!r} to a layer "
        f"in LAYERS of {Path(__file__).name}"
    )


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_module_imports_a_higher_layer(path: Path) -> None:
    own = ORDER.index(layer_of(top(path)) or ORDER[-1])
    for line, name in imports(path):
        root, *parts = name.split(".")
        if root != "fedsmoothlora" or not parts:
            continue
        part = parts[0] if is_submodule(parts[0]) else "__init__"
        layer = layer_of(part)
        assert layer is not None, (
            f"{path}:{line} imports {name}, which is in no layer of {Path(__file__).name}"
        )
        assert ORDER.index(layer) <= own, f"{path}:{line}: {ORDER[own]} imports {name}, which is in {layer}"


@pytest.mark.parametrize("path", [path for path in FILES if layer_of(top(path)) == "mathematics"], ids=str)
def test_mathematics_knows_no_library_but_torch(path: Path) -> None:
    for line, name in imports(path):
        assert name.split(".")[0] in MATHEMATICS_MAY_IMPORT, f"{path}:{line} imports {name}"


SETTINGS = [path for path in FILES if path.stem.endswith("settings")]
PARTITIONS = [path for path in FILES if path.parent == Path("data/partitioning")]


@pytest.mark.parametrize("path", [*SETTINGS, *PARTITIONS], ids=str)
def test_settings_and_partitions_are_light(path: Path) -> None:
    """Imports inside of functions and those for types only do not count."""
    may = {*sys.stdlib_module_names, "annotated_types", "pydantic"}
    for node in ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body:
        for name in imported(node):
            its_own = path in PARTITIONS and name.startswith("fedsmoothlora.data.partitioning.")
            assert its_own or name.split(".")[0] in may, f"{path}:{node.lineno} imports {name}"


def test_no_name_is_in_two_layers() -> None:
    names = [name for layer in LAYERS.values() for name in layer]
    assert len(names) == len(set(names))
