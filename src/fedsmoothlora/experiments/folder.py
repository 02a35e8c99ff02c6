"""The settings of a folder of many runs: written once, and compared by key afterwards."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from fedsmoothlora.config import Config, ConfigError, first_difference, flat, read, to_toml
from fedsmoothlora.config.renamed import translated
from fedsmoothlora.storage.files import write_text

# Fixed when the folder is created, so that another number of jobs changes no result.
_REMEMBERED = "machine.threads"


def remember(path: Path, config: Config, more: Mapping[str, Any], *, write: bool = True) -> Config:
    """Write the settings of a new folder, or compare them with those that were written before.

    Args:
        path: the file in the folder.
        config: the settings that all runs share.
        more: further values that must stay the same; new keys may be added.
        write: False for a dry run, which only compares.

    Returns:
        ``config`` with the number of threads that was written first.

    Raises:
        ConfigError: the folder has other settings, or contains something else.
    """
    if path.is_file():
        known = _read(path)
        begun = tomli_w.dumps(known["config"])
        config = replace(
            config, machine=replace(config.machine, threads=known["config"]["machine"]["threads"])
        )
        key = first_difference(to_toml(config), begun, ignoring=[_REMEMBERED], before_planning=True)
        before, now = flat(known.get("more", {})), flat(more)
        if key is None:
            key = next((key for key in now if key in before and now[key] != before[key]), None)
        if key is not None:
            raise ConfigError(
                f"{path.parent}: {key} differs from the settings of the runs there ({path.name}): "
                "keep it, or choose another --out"
            )
        more = _merged(known.get("more", {}), more)
    elif write and path.parent.exists() and (not path.parent.is_dir() or any(path.parent.iterdir())):
        raise ConfigError(f"{path.parent} already exists and is not empty: choose another --out")
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        # As read back, so that later comparisons see exactly the written values.
        write_text(path, tomli_w.dumps({"config": tomllib.loads(to_toml(config)), "more": dict(more)}))
    return config


def remembered(path: Path) -> dict[str, Any] | None:
    """The further values that `remember` wrote into a folder; None if the folder is new.

    Raises ``ConfigError`` if the file cannot be read.
    """
    return dict(_read(path).get("more", {})) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8"))
        known["config"] = translated(known["config"])  # an older version may have written it
        read(known["config"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return known


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(one)
    for key, value in other.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
