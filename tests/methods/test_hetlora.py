"""HetLoRA against its formula: padded factors, and weights from the norms of products."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    COUNTS,
    LAYERS,
    aggregate,
    client_view,
    close,
    dense,
    initial,
    method,
    of_rank,
    products,
    server_view,
    three,
)

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.runs.planning import plan


def by_hand(uploads: Sequence[dict[str, LowRank]], name: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The padded factors of a layer, averaged by the clients' norms."""
    norms = np.array([np.sqrt(sum(np.sum(dense(u[n]) ** 2) for n in LAYERS)) for u in uploads])
    layer = LAYERS[name]
    B, A = np.zeros((layer.m, rank)), np.zeros((rank, layer.n))
    for weight, upload in zip(norms / norms.sum(), uploads, strict=True):
        r = upload[name].rank
        B[:, :r] += weight * upload[name].B.numpy()
        A[:r] += weight * upload[name].A.numpy()
    return B, A


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (3, 1, 1)])
def test_padded_factors_are_averaged_by_the_norms_of_products(ranks: Sequence[int]) -> None:
    uploads = [products(100 * c, rank) for c, rank in enumerate(ranks)]
    update = aggregate("hetlora", uploads, layers=of_rank(max(ranks)))
    assert not update.merge
    for name in LAYERS:
        B, A = by_hand(uploads, name, max(ranks))
        close(update.model[name].B.numpy(), B)
        close(update.model[name].A.numpy(), A)


def test_weights_do_not_depend_on_numbers_of_samples_unless_all_products_are_zero() -> None:
    uploads = three(1)
    one, other = (aggregate_with(uploads, counts) for counts in (COUNTS, (1, 1, 1)))
    zero = [{n: LowRank(p.B, 0 * p.A) for n, p in upload.items()} for upload in uploads]
    third = aggregate_with(zero, COUNTS)
    for name in LAYERS:
        assert torch.equal(one[name].B, other[name].B)
        close(third[name].B.numpy(), np.einsum("c,cmr->mr", np.array(COUNTS) / 8, [u[name].B for u in zero]))


def aggregate_with(uploads: Sequence[dict[str, LowRank]], counts: Sequence[int]) -> dict[str, LowRank]:
    return dict(method("hetlora").aggregate(uploads, counts, server_view()).model)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_client_gets_the_first_directions(rank: int) -> None:
    model = products(4, 3)
    start = method("hetlora").start(client_view(1, layers=of_rank(rank), server_lora=model))
    for name in LAYERS:
        assert torch.equal(start.lora[name].B, model[name].B[:, :rank])
        assert torch.equal(start.lora[name].A, model[name].A[:rank])
    assert set(start.trains) == {"B", "A"}


def test_directions_that_no_client_of_a_round_has_stay_as_they_were() -> None:
    uploads, before = [products(1, 1), products(2, 1)], products(9, 2)
    for known, want in (({"model": before}, before), ({}, {name: initial(name) for name in LAYERS})):
        update = aggregate("hetlora", uploads, **known)
        for name in LAYERS:
            assert update.model[name].rank == 2
            assert torch.equal(update.model[name].A[1:], want[name].A[1:])
            assert torch.equal(update.model[name].B[:, 1:], want[name].B[:, 1:])


def test_one_client_continues_from_its_own_factors() -> None:
    uploads = three(3)[:1]
    for name, product in aggregate("hetlora", uploads).model.items():
        assert torch.equal(product.B, uploads[0][name].B)
        assert torch.equal(product.A, uploads[0][name].A)


def test_clients_that_miss_rounds_keep_directions_that_can_move(
    toy_federation: Callable[..., Simulation],
) -> None:
    federation = toy_federation(
        {
            "method.name": "hetlora",
            "lora.r": 4,
            "lora.client_ranks": [4, 1, 1],
            "participation.clients": 1,
            "training.rounds": 5,
        }
    )
    for record in run_rounds(federation, Callback()):
        if record.round:
            for product in federation.server.model.values():
                assert bool((product.A.norm(dim=1) > 0).all())


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"transport.bits": 4}, "averages the factors themselves"),
        ({"server.aggregation": "geometric_median"}, "norms of their products"),
        ({"uploads.max_weight": 0.5}, r"uploads\.max_weight.*norms of their products"),
        ({"training.scaffold": True}, "does not work with method 'hetlora'"),
    ],
    ids=["4 bits", "robust mean", "largest weight", "SCAFFOLD"],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(
    toy_table: dict[str, Any], overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(read(toy_table, {"method.name": "hetlora", **overrides}))
