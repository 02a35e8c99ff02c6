"""The packaged recipes: the TOML files in ``recipes/``."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from fedsmoothlora.config.validation import suggestion
from fedsmoothlora.errors import ConfigError


def recipes() -> dict[str, str]:
    """Descriptions of the packaged recipes, by name."""
    tables = {name: tomllib.loads(file.read_text(encoding="utf-8")) for name, file in _files().items()}
    return {name: str(table["description"]) for name, table in tables.items()}


def recipe_text(name: str) -> str:
    """The TOML text of a recipe.

    Raises ``ConfigError`` that lists the recipes if there is none of this name.
    """
    known = _files()
    if name not in known:
        raise ConfigError(
            f"{name!r} is neither a TOML file nor a recipe{suggestion(name, known)} "
            f"Recipes: {', '.join(known)}"
        )
    return known[name].read_text(encoding="utf-8")


@cache
def _files() -> dict[str, Traversable]:
    folder = resources.files("fedsmoothlora.config").joinpath("recipes")
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file for file in files if file.name.endswith(".toml")}
