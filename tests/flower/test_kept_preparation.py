"""A site whose data and model stay in memory gives the bits of one that loads them for every message."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import SITES
from safetensors.torch import load_file
from test_flower_engine import Answer, DirectGrid, Setting, metrics, setting

pytest.importorskip("flwr")
from flwr.app import Context, Message

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import BehindError
from fedsmoothlora.federation.messages import Message as RoundMessage
from fedsmoothlora.flower.client_app import client_app
from fedsmoothlora.flower.site import KeptPreparation, Site

__all__ = ["setting"]  # the fixture


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = sorted((*folder.glob("updates/*.safetensors"), *folder.glob("model/*.safetensors")))
    return {str(path.relative_to(folder)): load_file(path) for path in found}


def kept(preparation: KeptPreparation, config: Path) -> Callable[[Message, Context, Answer], Message]:
    return lambda message, context, app: client_app(config, preparation)(message, context)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            {"flower.clients": ["hospital-a"], "training.rounds": 2, "data.validation": 0.2}, id="one site"
        ),
        pytest.param(
            {"data.validation": 0.2, "participation.clients": 2}, marks=pytest.mark.slow, id="fedsmoothlora"
        ),
        pytest.param({"method.name": "full"}, marks=pytest.mark.slow, id="full"),
        pytest.param(
            {"method.name": "fedsa", "transport.bits": 16, "data.validation": 0.2},
            marks=pytest.mark.slow,
            id="fedsa",
        ),
        pytest.param(
            {"method.name": "fedit", "transport.bits": 4}, marks=pytest.mark.release, id="fedit in 4 bits"
        ),
    ],
)
def test_kept_data_and_models_give_the_same_bits(setting: Setting, overrides: dict[str, Any]) -> None:
    if "data.validation" in overrides:
        del setting.table["data"]["test"]

    def grid() -> DirectGrid:
        made = setting.grid(overrides)
        for node, site in list(made.nodes.items()):
            if site["client-id"] not in overrides.get("flower.clients", SITES):
                del made.nodes[node]
        return made

    cold = setting.coordinate(grid(), "cold")
    sites = grid()
    preparations = {node: KeptPreparation() for node in sites.nodes}
    for node, preparation in preparations.items():
        sites.stand_in[node] = kept(preparation, sites.config)
    warm = setting.coordinate(sites, "warm")
    assert metrics(warm) == metrics(cold)
    right, got = tensors(cold), tensors(warm)
    assert right.keys() == got.keys()
    for name, values in right.items():
        assert all(torch.equal(value, got[name][key]) for key, value in values.items()), name
    # A model that has trained still has the fingerprint of its base weights.
    config, node = read(sites.config), next(iter(sites.nodes))
    info = Site.at(config, sites.nodes[node], preparations[node]).info()
    assert info == Site.at(config, sites.nodes[node]).info()


def test_a_model_is_loaded_again_only_if_other_updates_are_wanted(setting: Setting) -> None:
    grid = setting.grid()
    loads: list[str] = []

    class Counted(KeptPreparation):
        def __init__(self) -> None:
            super().__init__()
            load = self._load
            self._load = lambda planned: loads.append("load") or load(planned)  # type: ignore[func-returns-value]

    site = Site.at(read(grid.config), grid.nodes[10], Counted())

    def merged(scale: float, *rounds: int) -> float:
        """Send updates of these rounds; the mean absolute change of the first layer's weight."""
        planned, _ = site._plan()
        layer = next(iter(planned.layers.values()))
        update = {layer.name: LowRank(torch.full((layer.m, 1), scale), torch.ones(1, layer.n))}
        for round in rounds:
            message = RoundMessage(
                experiment="0" * 32, round=round, first_update=max(round - 1, 0), updates=update
            )
            simulation, _ = site._caught_up(message, Callback())
        backbone = simulation.learner.model.backbone
        change = backbone.weight(layer.name) - backbone.pretrained(layer.name)
        return float(change.mean()) / layer.scale

    assert merged(1.0, 0, 1, 2) == pytest.approx(2.0, rel=1e-5)
    assert loads == ["load"]
    assert merged(3.0, 2) == pytest.approx(4.0, rel=1e-5)  # the second update is replaced
    assert loads == ["load", "load"]


def test_updates_that_are_merged_are_not_read_again_before_the_process_ends(setting: Setting) -> None:
    grid = setting.grid()

    def caught_up(site: Site, round: int) -> None:
        planned, _ = site._plan()
        layer = next(iter(planned.layers.values()))
        update = {layer.name: LowRank(torch.ones(layer.m, 1), torch.ones(1, layer.n))}
        first = max(round - 1, 0)
        message = RoundMessage(experiment="0" * 32, round=round, first_update=first, updates=update)
        site._caught_up(message, Callback())

    warm = Site.at(read(grid.config), grid.nodes[10], KeptPreparation())
    for round in range(3):
        caught_up(warm, round)
    (first,) = (warm.state / ("0" * 32) / "updates").glob("*/updates-0001-*")
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    caught_up(warm, 3)
    with pytest.raises(BehindError, match="lacks server updates before round 5"):
        caught_up(Site.at(read(grid.config), grid.nodes[10], KeptPreparation()), 4)
    assert not first.exists()  # it is forgotten, so that the server sends its update again


def test_a_message_that_leaves_a_gap_changes_nothing(setting: Setting) -> None:
    grid = setting.grid()
    site = Site.at(read(grid.config), grid.nodes[10], KeptPreparation())
    planned, _ = site._plan()
    layer = next(iter(planned.layers.values()))
    update = {layer.name: LowRank(torch.ones(layer.m, 1), torch.ones(1, layer.n))}

    def message(first: int, round: int) -> RoundMessage:
        return RoundMessage(experiment="0" * 32, round=round, first_update=first, updates=update)

    site._caught_up(message(0, 2), Callback())
    folder = site.state / ("0" * 32) / "updates"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for gap in (message(3, 4), message(1, 3)):
        with pytest.raises(BehindError):
            site._caught_up(gap, Callback())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    site._caught_up(message(2, 3), Callback())


def test_a_site_without_a_warm_process_answers_by_itself_and_says_why(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    setting.table["flower"]["warm"] = True
    grid = setting.grid({"training.rounds": 1})
    grid.preparation = None
    grid.keys[10] = b"a key"
    for site in SITES:
        (setting.root / "state" / site / "warm").mkdir(parents=True)
        (setting.root / "state" / site / "warm").chmod(0o755)
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        folder = setting.coordinate(grid)
    finally:
        logger.removeHandler(caplog.handler)
    assert (folder / "model").exists()
    assert "answers without a warm process" in caplog.text
    # The federation ends at nodes with keys; those of Flower's simulation have none.
    assert [client for client, kind in grid.asked if kind == "query.end"] == ["hospital-a"]
