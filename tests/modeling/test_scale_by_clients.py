"""SFed-LoRA's scale: alpha sqrt(N / r), with N the clients of a round."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.exports.run_model import load_run_model, open_run
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run


@pytest.mark.parametrize(("rank", "count"), [(1, 1), (8, 5), (3, 100)])
def test_the_scale_is_that_of_the_formula(rank: int, count: int) -> None:
    settings = LoraSettings(r=8, alpha=6, scale="clients").for_clients(count)
    assert settings.scale_of(rank) == pytest.approx(6 * math.sqrt(count / rank))
    with pytest.raises(ValueError, match="needs the number of clients"):
        LoraSettings(scale="clients").scale_of(rank)
    assert LoraSettings(alpha=6).for_clients(count) == LoraSettings(alpha=6)


def test_only_clients_of_a_round_count(toy_table: dict[str, Any]) -> None:
    for overrides, count in (({}, 3), ({"participation.clients": 2}, 2), ({"partition.clients": 5}, 5)):
        planned = plan(read(toy_table, {"lora.scale": "clients", **overrides}))
        assert [x.scale for x in planned.layers.values()] == pytest.approx([4 * math.sqrt(count / 2)] * 6)


def test_a_run_is_that_with_the_same_scale_written_as_alpha(
    toy_federation: Callable[..., Simulation],
) -> None:
    own = {"lora.scale": "clients", "lora.client_ranks": "halving"}
    written = {"lora.alpha": 4 * math.sqrt(3), "lora.use_rslora": True, "lora.client_ranks": "halving"}
    losses = [
        [record.value("loss") for record in run_rounds(toy_federation(overrides), Callback())]
        for overrides in (own, written)
    ]
    assert losses[0] == losses[1]


def test_an_export_finds_the_scale_of_the_run(toy_table: dict[str, Any], tmp_path: Path) -> None:
    config = read(toy_table, {"lora.scale": "clients", "training.rounds": 1, "training.steps": 1})
    run(config, out=tmp_path / "run", console=Console(quiet=True))
    layers = load_run_model(open_run(tmp_path / "run"), print).server.layers.values()
    assert [layer.scale for layer in layers] == pytest.approx([4 * math.sqrt(3 / 2)] * 6)


def test_two_scales_are_refused(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="two scales"):
        read(toy_table, {"lora.scale": "clients", "lora.use_rslora": True})
