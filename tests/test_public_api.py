"""The public names of the package: imported on first use, documented, and known to type checkers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedsmoothlora

PUBLIC = [name for name in fedsmoothlora.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    docstring = getattr(fedsmoothlora, name).__doc__
    assert docstring
    assert not docstring.startswith(f"{name}(")  # the signature that a dataclass without one gets


def test_type_checkers_see_every_public_name_in_the_module_it_is_imported_from() -> None:
    tree = ast.parse(Path(fedsmoothlora.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    imported = {name: f"fedsmoothlora.{module}.{name}" for name, module in fedsmoothlora._MODULES.items()}
    assert seen == imported
    assert sorted(seen) == sorted(PUBLIC)
    assert dir(fedsmoothlora) == sorted(fedsmoothlora.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = fedsmoothlora.trian


def test_settings_methods_tasks_and_callbacks_import_no_torch() -> None:
    code = """
import sys
import fedsmoothlora
names = [name for name in fedsmoothlora.__all__ if name.endswith(("Settings", "Error"))]
for name in [*names, "Config", "Callback", "RunInfo", "Method", "Task"]:
    getattr(fedsmoothlora, name)
heavy = {"torch", "transformers", "peft", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
