"""FedSmoothLoRA with ``method.gradient = "sketch"``: starts without calibration gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import Layer
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from layer_names import QUERY

Make = Callable[..., Simulation]
# 8 columns for layers of 32 x 32: half the numbers.
SKETCH: dict[str, Any] = {"method.gradient": "sketch", "method.sketch_width": 4}
LAYER = Layer("layer", 64, 48, 2, scale=1.0, gradient_rank=48)
HEAD = Layer("head", 6, 48, 2, scale=1.0, gradient_rank=5)


def starts(federation: Simulation) -> tuple[dict[tuple[int, str, str], LowRank], list[float]]:
    """The LoRA of every start, and the loss after every round."""
    learner, method = federation.learner, federation.learner.method
    visit, start = learner.visit, method.start
    found: dict[tuple[int, str, str], LowRank] = {}
    now: list[Any] = [0, ""]

    def on_visit(client: str, data: Any, message: Message, *rest: Any) -> Any:
        now[:] = message.round, client
        return visit(client, data, message, *rest)

    def on_start(view: Any) -> Any:
        result = start(view)
        for name, product in result.lora.items():
            found[now[0], now[1], name] = product
        return result

    object.__setattr__(learner, "visit", on_visit)
    object.__setattr__(method, "start", on_start)
    losses = [record.value("loss") or 0.0 for record in run_rounds(federation, Callback())]
    return found, losses


def overlap(found: LowRank, wanted: LowRank) -> float:
    """The squared cosine of two products, where the signs of singular vectors do not count.

    `fix_signs` takes the sign of a vector from its largest entry. If two entries of opposite signs are nearly
    as large, a small error turns the vector round.
    """
    columns = torch.cosine_similarity(found.B, wanted.B, dim=0)
    rows = torch.cosine_similarity(found.A, wanted.A, dim=1)
    return float((columns * rows).abs().mean()) ** 2


def same(one: LowRank, other: LowRank) -> bool:
    """Whether two LoRAs have the same product, bit for bit."""
    return torch.equal(one.dense(), other.dense())


@pytest.mark.parametrize("passes", [2, 3])
def test_starts_are_near_those_from_gradients(toy_federation: Make, passes: int) -> None:
    exact, _ = starts(toy_federation())
    found, losses = starts(toy_federation({**SKETCH, "method.sketch_passes": passes}))
    assert losses[-1] < losses[0]
    first = [key for key in exact if key[0] == 0]  # at the same weights
    assert first
    close = [overlap(found[key], exact[key]) for key in first]
    assert sum(close) / len(close) > {2: 0.9, 3: 0.98}[passes]
    assert not all(same(found[key], exact[key]) for key in first)


def test_starts_from_one_pass_are_near_those_from_gradients(toy_federation: Make) -> None:
    # 4 columns on one side and 7 on the other
    overrides = {**SKETCH, "method.sketch_width": 2, "method.sketch_passes": 1, "lora.r": 1}
    exact, _ = starts(toy_federation({"lora.r": 1}))
    found, losses = starts(toy_federation(overrides))
    assert losses[-1] < losses[0]
    close = [overlap(found[key], exact[key]) for key in exact if key[0] == 0]
    assert sum(close) / len(close) > 0.5


def test_the_same_seed_gives_the_same_starts_and_every_client_its_own_sketch(toy_federation: Make) -> None:
    first, losses = starts(toy_federation(SKETCH))
    again, losses_again = starts(toy_federation(SKETCH))
    assert losses == losses_again
    assert all(same(first[key], again[key]) for key in first)
    other, _ = starts(toy_federation({**SKETCH, "seed": 1}))
    assert not any(same(first[key], other[key]) for key in first if key in other)


@pytest.mark.parametrize(
    "changes",
    [{"training.accumulation": 4}, {"training.precision": "bf16"}, {"training.gradient_checkpointing": True}],
    ids=["parts", "bfloat16", "checkpointing"],
)
def test_starts_do_not_depend_on_how_a_batch_is_computed(toy_federation: Make, changes: Any) -> None:
    overrides = {**SKETCH, "training.rounds": 1, "training.steps": 1, "training.epochs": None}
    plain, _ = starts(toy_federation(overrides))
    found, _ = starts(toy_federation({**overrides, **changes}))
    close = [overlap(found[key], plain[key]) for key in plain]
    assert sum(close) / len(close) > (0.8 if "training.precision" in changes else 0.999)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sketch_width": 4}, "method.sketch_width = 4 belongs to method.gradient = 'sketch'"),
        ({"sketch_passes": 2}, "method.sketch_passes = 2 belongs to method.gradient = 'sketch'"),
        ({"gradient": "sketch", "gradient_aligned": "shared"}, "sends whole gradients from client to client"),
        ({"gradient": "sketch", "gradient_aligned": "shuffled"}, "sends whole gradients"),
        ({"gradient": "sketch", "gradient_aligned": "weight"}, "'weight' takes no calibration gradient"),
        ({"gradient": "sketch", "gradient_aligned": "none"}, "'none' takes no calibration gradient"),
        ({"gradient": "sketch", "sketch_width": 20}, "saves no memory here"),
    ],
)
def test_sketches_without_effect_are_refused(options: dict[str, Any], reason: str) -> None:
    method = FedSmoothLoRA(**options)
    with pytest.raises(ValueError, match=reason):
        method.check({"layer": LAYER}, partial=False)


def test_a_layer_whose_gradient_is_smaller_than_its_sketch_uses_the_gradient() -> None:
    method = FedSmoothLoRA(gradient="sketch")
    assert method.sketch_size(LAYER) is not None
    assert method.sketch_size(HEAD) is None
    method.check({"layer": LAYER, "head": HEAD}, partial=False)


def test_the_start_of_a_sketched_softmax_head_has_columns_that_sum_to_zero(toy_federation: Make) -> None:
    """The rows of its gradient sum to zero, and so does every column of the start's B."""
    overrides = {
        **SKETCH,
        "method.sketch_width": 2,
        "method.round_matching": False,
        "model.head": "lora",
        "lora.target_modules": [QUERY, "classifier"],
        "lora.head_r": 1,
    }
    federation = toy_federation(overrides)
    head = next(layer for name, layer in federation.server.layers.items() if name.endswith("classifier"))
    assert federation.learner.method.sketch_size(head) is not None
    found, losses = starts(federation)
    assert losses[-1] < losses[0]
    for (_, _, name), product in found.items():
        if name.endswith("classifier"):
            dense = product.dense()
            assert float(dense.sum(dim=0).abs().max()) < 1e-4 * float(dense.abs().max())


def test_starts_have_the_same_size_as_with_gradients(toy_federation: Make) -> None:
    found, _ = starts(toy_federation({**SKETCH, "method.round_matching": False}))
    for product in found.values():
        sigma = torch.linalg.svdvals(product.dense())[:2]
        torch.testing.assert_close(sigma, torch.full_like(sigma, 32**0.5 / 64), rtol=1e-3, atol=0)
