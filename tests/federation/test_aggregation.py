"""Combining a round's replies: robust rules against dense references, and their settings."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedsmoothlora.algebra.coding import Lazy
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Layer
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, FederationStoppedError
from fedsmoothlora.federation.aggregation import Aggregation
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.settings import ServerSettings
from fedsmoothlora.federation.simulation import Simulation

Make = Callable[..., Simulation]

LAYERS = {"w": Layer("w", 6, 5, 2, 0.5, 5)}
HEAD = {"bias": torch.zeros(3)}


def reply(client: int, product: LowRank, bias: torch.Tensor, samples: int = 1) -> Reply:
    return Reply(
        client=str(client),
        experiment="e",
        round=0,
        samples=samples,
        sent={"w": product},
        head={"bias": bias},
    )


def replies(count: int, seed: int = 0) -> list[Reply]:
    draw = torch.Generator().manual_seed(seed)
    return [
        reply(
            client,
            LowRank(torch.randn(6, 2, generator=draw), torch.randn(2, 5, generator=draw)),
            torch.randn(3, generator=draw),
            samples=1 + client,
        )
        for client in range(count)
    ]


def rule(name: str, byzantine: int | None = None, **options: Any) -> Aggregation:
    return Aggregation(settings=ServerSettings(aggregation=name, byzantine=byzantine), **options)  # type: ignore[arg-type]


def test_the_mean_is_weighted_by_samples() -> None:
    found = replies(3)
    combined = rule("mean").combine(found, LAYERS, HEAD)

    assert combined.weights == [1, 2, 3]
    assert [upload["w"] for upload in combined.uploads] == [one.sent["w"] for one in found]
    expected = sum(one.samples * one.head["bias"] for one in found) / 6
    torch.testing.assert_close(combined.head["bias"], expected)


def test_a_cap_limits_one_clients_weight_from_three_uploads_on() -> None:
    counted = zip(replies(3), (1, 1, 98), strict=True)
    large = [replace(one, samples=samples) for one, samples in counted]

    assert rule("mean", max_weight=0.4).combine(large, LAYERS, HEAD).weights == pytest.approx([0.3, 0.3, 0.4])
    assert rule("mean", max_weight=0.4).combine(large[1:], LAYERS, HEAD).weights == [1, 98]


@pytest.mark.parametrize("name", ["trimmed_mean", "median"])
@pytest.mark.parametrize("apart", [False, True])
def test_coordinates_are_combined_densely(name: str, apart: bool) -> None:
    found = replies(5)
    byzantine = 1 if name == "trimmed_mean" else None
    combined = rule(name, byzantine, factors_apart=apart).combine(found, LAYERS, HEAD)
    (upload,) = combined.uploads
    assert combined.weights == [1.0]

    def expected(stacked: np.ndarray) -> np.ndarray:
        return (
            np.median(stacked, axis=0) if name == "median" else stats.trim_mean(stacked, 0.2 + 1e-9, axis=0)
        )

    product = upload["w"]
    assert isinstance(product, LowRank)
    if apart:
        for part in ("B", "A"):
            stacked = np.stack([getattr(one.sent["w"], part).numpy() for one in found])
            np.testing.assert_allclose(getattr(product, part).numpy(), expected(stacked), rtol=1e-5)
    else:
        stacked = np.stack([one.sent["w"].dense().numpy() for one in found])  # type: ignore[union-attr]
        np.testing.assert_allclose(product.dense().numpy(), expected(stacked), rtol=1e-5, atol=1e-6)
    heads = np.stack([one.head["bias"].numpy() for one in found])
    np.testing.assert_allclose(combined.head["bias"].numpy(), expected(heads), rtol=1e-5)


@pytest.mark.parametrize(("name", "byzantine"), [("geometric_median", None), ("multi_krum", 1)])
def test_a_far_upload_has_little_weight(name: str, byzantine: int | None) -> None:
    found = replies(5)
    far = reply(5, LowRank(torch.full((6, 2), 1e4), torch.ones(2, 5)), torch.full((3,), 1e4), samples=10**6)
    max_weight = 0.3 if name == "geometric_median" else None
    combined = rule(name, byzantine, max_weight=max_weight).combine([*found, far], LAYERS, HEAD)

    assert combined.weights[5] < 1e-3 * max(combined.weights)
    assert combined.metrics["largest_weight"] == max(combined.weights)


@pytest.mark.parametrize(
    ("server", "method", "wrong"),
    [
        ({"aggregation": "multi_krum"}, "fedit", "needs server.byzantine"),
        ({"aggregation": "median", "byzantine": 1}, "fedit", "server.byzantine = 1 belongs to"),
        ({"aggregation": "median"}, "fedex", "does not work with method 'fedex'"),
        ({"aggregation": "geometric_median"}, "local", "does not work with method 'local'"),
        ({"aggregation": "krum"}, "fedit", "server.aggregation"),
    ],
)
def test_rules_that_do_not_fit_are_refused_with_the_reason(
    server: dict[str, Any], method: str, wrong: str, toy_table: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        read({**toy_table, "method": {"name": method}, "server": server})


@pytest.mark.parametrize("name", ["multi_krum", "trimmed_mean", "median"])
def test_a_largest_weight_goes_only_with_rules_that_use_sample_counts(
    name: str, toy_table: dict[str, Any]
) -> None:
    server = {"aggregation": name, **({} if name == "median" else {"byzantine": 1})}
    with pytest.raises(ConfigError, match=r"uses no sample counts: leave uploads\.max_weight out"):
        read({**toy_table, "server": server, "uploads": {"max_weight": 0.5}})


def test_multi_krum_does_not_weigh_by_claimed_samples() -> None:
    found = [replace(one, samples=10**6 if index == 0 else 1) for index, one in enumerate(replies(5))]
    weights = rule("multi_krum", 1).combine(found, LAYERS, HEAD).weights
    assert sorted(weights) == pytest.approx([0, 0.25, 0.25, 0.25, 0.25])


def test_too_few_clients_for_a_rule_are_refused_before_training(toy_federation: Make) -> None:
    with pytest.raises(ConfigError, match=r"needs 5 uploads, but 3 clients"):
        toy_federation({"server.aggregation": "multi_krum", "server.byzantine": 1})


@pytest.mark.parametrize("method", ["fedsmoothlora", "fedit", "flexlora", "ffa", "full"])
@pytest.mark.parametrize("name", ["geometric_median", "trimmed_mean", "median"])
def test_a_federation_learns_under_every_rule(name: str, method: str, toy_federation: Make) -> None:
    options = {"server.aggregation": name, "method.name": method, "training.rounds": 2}
    if name == "trimmed_mean":
        options["server.byzantine"] = 1
    records = list(run_rounds(toy_federation(options), Callback()))

    losses = [record.value("loss") for record in records]
    assert losses[-1] < losses[0]  # type: ignore[operator]


def test_a_run_with_too_few_uploads_for_the_rule_is_stopped(toy_federation: Make) -> None:
    simulation = toy_federation({"server.aggregation": "trimmed_mean", "server.byzantine": 1})
    simulation.clients = {client: simulation.clients[client] for client in list(simulation.clients)[:2]}

    with pytest.raises(
        FederationStoppedError, match=r"the 3 that server\.aggregation = 'trimmed_mean' needs"
    ):
        list(run_rounds(simulation, Callback()))


def test_a_single_upload_that_all_clients_receive_is_noted_once(toy_federation: Make) -> None:
    notes: list[str] = []

    class Notes(Callback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    list(run_rounds(toy_federation({"participation.clients": 1, "training.rounds": 2}), Notes()))

    assert sum("a single upload was accepted" in note for note in notes) == 1


def test_packed_uploads_are_decoded_one_layer_at_a_time() -> None:
    read: list[str] = []

    def layer(name: str) -> LowRank:
        read.append(name)
        return LowRank(torch.ones(6, 2), torch.ones(2, 5))

    lazy = [replace(one, sent=Lazy(["w"], layer)) for one in replies(3)]
    combined = rule("mean").combine(lazy, LAYERS, HEAD)
    assert not read

    assert isinstance(combined.uploads[0]["w"], LowRank)
    assert read == ["w"]
    rule("geometric_median").combine(lazy, LAYERS, HEAD)
    assert len(read) == 1 + len(lazy)
