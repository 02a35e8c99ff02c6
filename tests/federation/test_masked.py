"""The integers that clients mask, and what a client feeds back of numbers that are cut."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora import Federation, compare, run
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.subspace import product
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, DivergedError
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.masked import masked_code, masked_numbers
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.runs.planning import plan

RANGE = 4.0


def a_reply(seed: int, scale: float = 1.0) -> tuple[Reply, dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=draws)

    head = {"bias": torch.arange(3.0)}
    reply = Reply(
        client=str(seed),
        round=0,
        samples=1,
        sent={"q": LowRank(normal(4, 2), normal(2, 5)), "v": normal(4, 2)},
        head={"bias": head["bias"] + normal(3)},
    )
    return reply, head


@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=6), scale=st.sampled_from([1e-3, 0.3, 1.0])
)
@settings(max_examples=25, deadline=None)
def test_the_sum_decodes_to_the_weighted_mean(weights: list[float], scale: float) -> None:
    total, tensors = 0, []
    for seed, weight in enumerate(weights):
        reply, head = a_reply(seed, scale)
        total = total + masked_numbers(reply, head, RANGE, len(weights), weight)
        moved = reply.head["bias"] - head["bias"]
        sent: Any = reply.sent
        tensors.append({"q/B": sent["q"].B, "q/A": sent["q"].A, "v": sent["v"], "head:bias": moved})
    shapes = {name: value.shape for name, value in tensors[0].items()}
    code = masked_code(shapes, RANGE, len(weights))
    assert isinstance(total, np.ndarray)
    found = code.decode(total, len(weights))
    # The rounding of numbers, of float32, and of the weights themselves.
    allowed = len(weights) * RANGE / (2 * code.limit * sum(weights)) + 2e-6
    for name in shapes:
        parts = [w * one[name].double().clamp(-RANGE, RANGE) for w, one in zip(weights, tensors, strict=True)]
        mean = sum(parts) / sum(weights)
        assert np.abs(found.tensors[name] - mean.numpy()).max() <= allowed
    assert found.saturated == sum(int((abs(v) > RANGE).sum()) for one in tensors for v in one.values())


@pytest.mark.parametrize("masked", [False, True])
def test_rows_weigh_once(masked: bool) -> None:
    """Under a mask, the code multiplies by the weight, so the tensors must not be multiplied before."""
    privacy = SimpleNamespace(hides_counts=False, secure_aggregation=masked)
    client: Any = SimpleNamespace(privacy=privacy)
    assert Learner._weight(client, range(400)) == (1 if masked else 400)  # type: ignore[arg-type]


def test_an_upload_that_is_not_finite_has_diverged() -> None:
    reply, head = a_reply(0, float("nan"))
    with pytest.raises(DivergedError, match="its upload is not finite"):
        masked_numbers(reply, head, RANGE, 3, 1.0)


def test_the_head_of_a_second_exchange_is_a_change() -> None:
    reply, head = a_reply(0)
    change = {"bias": reply.head["bias"] - head["bias"]}
    second = Reply(client="0", round=0, exchange=1, samples=1, sent=reply.sent, head=change)
    assert (masked_numbers(second, None, RANGE, 3, 1.0) == masked_numbers(reply, head, RANGE, 3, 1.0)).all()


def test_a_client_keeps_what_is_cut_of_its_second_upload() -> None:
    draws = torch.Generator().manual_seed(1)
    change = torch.randn(6, 5, generator=draws)
    left = torch.linalg.qr(torch.randn(6, 2, generator=draws)).Q
    method = FedSmoothLoRA(upload_form="subspace", zeta=0.0)
    pending: Any = {"q": LowRank.of(change)}
    upload = method.second_upload({"q": left}, pending, limit=0.5)
    sent: Any = upload.sent["q"]
    (kept,) = upload.kept.values()
    assert float(sent.abs().max()) > 0.5
    arrived = product(left, sent.clamp(-0.5, 0.5)).dense()
    dense = kept if isinstance(kept, torch.Tensor) else kept.dense()
    torch.testing.assert_close(arrived + dense, change, atol=1e-5, rtol=1e-5)
    free = method.second_upload({"q": left}, pending)
    assert torch.equal(free.sent["q"], sent)  # type: ignore[arg-type]


def test_other_engines_than_flower_are_refused(toy_table: dict[str, Any], tmp_path: Path) -> None:
    masked = {**toy_table, "method": {"name": "fedit"}, "privacy": {"secure_aggregation": True}}
    for begin in (run, partial(compare, methods=["fedit"], out=tmp_path / "compared")):
        with pytest.raises(ConfigError, match=r"nobody to hide uploads from.*--engine flower"):
            begin(masked)  # type: ignore[operator]
    rows = {"input": torch.zeros(2, 3), "labels": torch.tensor([0, 1])}
    with pytest.raises(ConfigError, match="nobody to hide uploads from"):
        Federation(
            torch.nn.Sequential(torch.nn.Linear(3, 2)),
            [[rows]] * 3,  # type: ignore[list-item]
            method="fedit",
            test=[rows],  # type: ignore[arg-type]
            lora={"target_modules": ["0"]},
            privacy={"secure_aggregation": True},
        )


def test_rounds_of_two_clients_are_refused(toy_table: dict[str, Any]) -> None:
    masked = {**toy_table, "method": {"name": "fedit"}, "privacy": {"secure_aggregation": True}}
    with pytest.raises(ConfigError, match=r"2 clients in a round.*let at least 3 take part"):
        plan(read({**masked, "partition": {"kind": "iid", "clients": 2}}))
    with pytest.raises(ConfigError, match=r"privacy\.threshold = 2 with 4 clients.*from 3 to 4"):
        plan(read({**masked, "partition": {"kind": "iid", "clients": 4}}, {"privacy.threshold": 2}))
