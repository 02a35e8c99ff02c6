"""Error feedback of packed transport: nothing is lost but what a cap cuts away."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsmoothlora import methods
from fedsmoothlora.algebra.alignment import truncated
from fedsmoothlora.algebra.coding import Packed, unpacked
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.schedules import zeta_at
from fedsmoothlora.algebra.sums import plus, remainder
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.changes import HEAD, added, code_changes
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.methods import ClientView, Layer, ServerView, Start, Update
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA

RANK, COUNTS, ROUNDS = 2, (3, 1, 4), 20
LAYERS = {
    name: Layer(name, m, n, RANK, scale=2.0, gradient_rank=min(m, n))
    for name, (m, n) in {"tall": (15, 11), "wide": (9, 18)}.items()
}
BITS: Any = (8, 4, 3)


def dense(value: Any) -> np.ndarray:
    value = unpacked(value)
    if isinstance(value, LowRank):
        return value.B.double().numpy() @ value.A.double().numpy()
    return np.asarray(value.double().numpy())


def drawn(seed: int, rank: int = RANK) -> dict[str, LowRank]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(torch.randn(layer.m, rank, generator=draw), torch.randn(rank, layer.n, generator=draw))
        for name, layer in LAYERS.items()
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zeta", [0.0, 0.6])
@pytest.mark.parametrize("name", ["fedsmoothlora", "flexlora"])
def test_the_servers_memory_is_all_that_decoded_updates_lack(name: str, zeta: float, bits: Any) -> None:
    """``E <- E + (1 - zeta) (mean of decoded uploads - S)``; at zeta 0, ``sum S + E = sum of means``."""
    options = {"zeta": zeta} if name == "fedsmoothlora" else {}
    method = methods.find(name)(**{"server_feedback": True, **options})  # type: ignore[arg-type]
    transport = Transport(bits)
    left = {layer: np.zeros((x.m, x.n)) for layer, x in LAYERS.items()}
    totals, memory = {layer: np.zeros((x.m, x.n)) for layer, x in LAYERS.items()}, {}
    weights = np.array(COUNTS) / sum(COUNTS)
    for t in range(ROUNDS):
        uploads = [transport.coded(drawn(100 * t + c)) for c in range(3)]
        view = ServerView(
            round=t, rounds=ROUNDS, layers=LAYERS, memory=memory, code=transport.code, packs=True
        )
        plain: list[Update] = [{k: unpacked(v) for k, v in upload.items()} for upload in uploads]
        update = method.aggregate(plain, COUNTS, view)
        memory = dict(update.memory)
        sent = update.merge or update.lora or {}
        carried = zeta_at(t + 1, ROUNDS, zeta=zeta) if name == "fedsmoothlora" else 0.0
        for layer in LAYERS:
            assert isinstance(sent[layer], Packed)
            assert sent[layer].rank <= RANK
            mean = sum(p * dense(upload[layer]) for p, upload in zip(weights, uploads, strict=True))
            left[layer] = left[layer] + (1 - carried) * (mean - dense(sent[layer]))
            totals[layer] += np.abs(mean)
            error = np.linalg.norm(dense(memory[layer]) - left[layer])
            assert error <= 1e-5 * np.linalg.norm(totals[layer])
    if name == "fedsmoothlora":
        assert isinstance(memory["tall"], torch.Tensor)  # of full rank, where factors are larger


def upload(
    method: FedSmoothLoRA, bits: Any, trained: Mapping[str, LowRank], kept: Update, shift: int
) -> tuple[dict[str, Any], Update]:
    def nothing(*_: Any) -> Any:
        raise AssertionError("not asked for")

    view = ClientView(
        round=1,
        rounds=9,
        layers=LAYERS,
        server_lora={},
        kept=kept,
        kept_round=0,
        received={},
        gradients=nothing,
        initial=nothing,
        generator=nothing,
        code=Transport(bits).code,
        packs=bits < 16,
    )
    found = method.upload(trained, Start(lora=trained, shift=drawn(shift)), view)
    return dict(found.sent), found.kept


@pytest.mark.parametrize("bits", [32, *BITS])
def test_accepted_uploads_and_what_the_client_keeps_are_all_its_accepted_changes(bits: Any) -> None:
    method = FedSmoothLoRA(zeta=0.0, client_feedback=True, feedback_rank=99)
    kept: Update = {}
    wanted = {layer: np.zeros((x.m, x.n)) for layer, x in LAYERS.items()}
    got = {layer: np.zeros((x.m, x.n)) for layer, x in LAYERS.items()}
    for t in range(12):
        trained = drawn(10 * t)
        sent, pending = upload(method, bits, trained, kept, 10 * t + 1)
        if t % 4 == 2:  # refused: the change is lost, and the memory stays as it was
            continue
        kept = pending
        for layer in LAYERS:
            wanted[layer] += dense(trained[layer]) + dense(drawn(10 * t + 1)[layer])
            got[layer] += dense(sent[layer])
    for layer, total in wanted.items():
        left = dense(kept[f"feedback:{layer}"])
        assert np.linalg.norm(left) > 0.01 * np.linalg.norm(total)
        assert np.linalg.norm(got[layer] + left - total) <= 1e-5 * np.linalg.norm(total)
        own = kept[layer]
        assert isinstance(own, LowRank)
        assert own.rank == RANK  # the client's own upload, uncoded and without the memory


def test_a_clients_memory_is_cut_off_at_its_rank_and_the_share_is_recorded() -> None:
    method = FedSmoothLoRA(zeta=0.0, client_feedback=True)
    _, kept = upload(method, 4, drawn(0), {}, 1)
    for layer in LAYERS:
        memory = kept[f"feedback:{layer}"]
        assert isinstance(memory, LowRank)
        assert memory.rank <= RANK


def test_client_feedback_with_round_matching_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"client_feedback needs method\.zeta = 0"):
        FedSmoothLoRA(client_feedback=True).check(LAYERS, partial=False)
    FedSmoothLoRA(client_feedback=True, zeta=0.0).check(LAYERS, partial=True)
    FedSmoothLoRA(client_feedback=True, round_matching=False).check(LAYERS, partial=True)
    FedSmoothLoRA(client_feedback=True, zeta=0.0, feedback_rank=3).check(LAYERS, partial=False)
    with pytest.raises(ConfigError, match="feedback_rank"):
        FedSmoothLoRA(zeta=0.0, feedback_rank=3).check(LAYERS, partial=False)


@pytest.mark.parametrize("bits", BITS)
def test_changes_and_what_is_left_of_them_are_all_changes(bits: int) -> None:
    held = {"w.lora_B": torch.randn(9, 2), "w.lora_A": torch.randn(2, 7), f"{HEAD}bias": torch.randn(5)}
    first, left, total = dict(held), {}, {key: torch.zeros_like(value) for key, value in held.items()}
    for t in range(15):
        draw = torch.Generator().manual_seed(t)
        keys = ["w.lora_B", "w.lora_A"] if t % 3 else ["w.lora_B", f"{HEAD}bias"]
        changes = {key: 0.1 * torch.randn(held[key].shape, generator=draw) for key in keys}
        coded, left = code_changes(changes, left, bits)
        assert coded.keys() == changes.keys()
        for key, change in changes.items():
            total[key] += change
        held = added(held, coded)
    for key, value in held.items():
        assert torch.allclose(value + left[key], first[key] + total[key], atol=1e-5)
        assert float(left[key].norm()) > 0


@pytest.mark.parametrize("shape", [(6, 5), (40, 30)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_sums_and_remainders_are_exact_as_factors_and_dense(shape: tuple[int, int], rank: int) -> None:
    m, n = shape
    draw = torch.Generator().manual_seed(0)
    one = LowRank(torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))
    other = LowRank(torch.randn(m, 2, generator=draw), torch.randn(2, n, generator=draw))
    for left in (one, one.dense()):
        for right in (other, other.dense()):
            np.testing.assert_allclose(dense(plus(left, right)), dense(one) + dense(other), atol=1e-5)
        np.testing.assert_allclose(dense(remainder(left, other)), dense(one) - dense(other), atol=1e-5)
        assert plus(left, None) is left
        U, sigma, Vt = np.linalg.svd(dense(left), full_matrices=False)
        best = (U[:, :2] * sigma[:2]) @ Vt[:2]
        for balance in ("sqrt", "left"):
            found = truncated(left, 2, balance)  # type: ignore[arg-type]
            assert found.rank == min(2, rank)
            np.testing.assert_allclose(dense(found), best, atol=1e-4)
    assert truncated(torch.zeros(m, n), 2).rank == 0


def test_a_method_may_be_replaced_by_one_with_feedback() -> None:
    method = FedSmoothLoRA(zeta=0.0)
    assert not method.clients_feed_back
    assert replace(method, client_feedback=True).clients_feed_back
