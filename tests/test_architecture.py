"""docs/architecture.md names the folders in the order of the import contract, and files that exist."""

import re
import tomllib
from pathlib import Path

import fedsmoothlora

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fedsmoothlora.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_the_table_has_the_layers_of_the_import_contract_from_the_lowest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", PAGE, re.MULTILINE)
    assert rows == contract["layers"][::-1]


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`(\w+(?:/\w+)+\.py)`", PAGE))
    assert len(named) > 20
    assert not {path for path in named if not (PACKAGE / path).is_file()}
