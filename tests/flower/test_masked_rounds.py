"""Rounds with secure aggregation: sites in this process, all stages as Flower's messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from machines import SITES
from safetensors.torch import load_file
from test_flower_engine import DirectGrid, Setting, metrics, setting

pytest.importorskip("flwr")

from fedsmoothlora.flower.keys import write_node_key
from fedsmoothlora.flower.trusted import trusted_sites

__all__ = ["setting"]  # the fixture

MASKED = {
    "method.name": "fedit",
    "privacy.secure_aggregation": True,
    "privacy.most_rows": 40,
    "training.rounds": 2,
    "training.steps": 2,
}
STAGES = ["query.advertise", "query.share", "train.masked", "query.confirm", "query.reveal"]


def unmasked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if not key.startswith("privacy.")}


def masked_grid(setting: Setting, overrides: Mapping[str, Any] = MASKED) -> DirectGrid:
    """A grid whose sites have keys, and trust each other's."""
    setting.table["method"] = {"name": "fedsmoothlora"}
    grid = setting.grid(overrides)
    keys = setting.root / "keys"
    if not keys.exists():
        for site in SITES:
            write_node_key(keys / f"{site}.key")
        trusted_sites(keys).write(setting.root / "sites.toml")
    for node, values in grid.nodes.items():
        site = values["client-id"]
        grid.keys[node] = (keys / f"{site}.key.pub").read_bytes()
        values |= {"key": str(keys / f"{site}.key"), "sites": str(setting.root / "sites.toml")}
    return grid


def assert_close(one: Path, other: Path, tolerance: float = 2e-5) -> None:
    right, found = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    for name, value in right.items():
        assert float((value - found[name]).norm()) <= tolerance * float(value.norm()), name


def test_the_model_is_that_of_unmasked_rounds(setting: Setting) -> None:
    grid = masked_grid(setting)
    found = setting.coordinate(grid)
    assert_close(setting.in_process(unmasked(MASKED)), found)
    kinds = [kind for client, kind in grid.asked if client == "hospital-a"]
    assert kinds == ["query.agree", *STAGES, *STAGES]
    recorded = metrics(found)
    assert not [key for key in recorded if key[1] is not None]
    assert recorded[1, None, "clients"] == 3
    assert recorded[1, None, "numbers_cut"] == 0


def test_a_shared_subspace_has_two_sums_in_a_round(setting: Setting) -> None:
    overrides = {
        **{key: value for key, value in MASKED.items() if not key.startswith("method.")},
        **{"method.exchange": "subspace", "method.zeta": 0.0, "method.gamma": 64.0},
    }
    grid = masked_grid(setting, overrides)
    found = setting.coordinate(grid)
    assert_close(setting.in_process(unmasked(overrides)), found)
    kinds = [kind for client, kind in grid.asked if client == "hospital-a"]
    assert kinds == ["query.agree", *STAGES * 4]
