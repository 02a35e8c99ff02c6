"""FLoRIST against its formula: the fewest directions of the mean product that hold a share of its energy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    COUNTS,
    LAYERS,
    aggregate,
    client_view,
    close,
    dense,
    mean_of_products,
    method,
    of_rank,
    products,
    server_view,
    svd,
    three,
)

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.methods.florist import leading_share


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (3, 1, 1)])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_the_merged_update_is_the_svd_of_the_mean_at_the_smallest_rank_with_that_share(
    ranks: Sequence[int], energy: float
) -> None:
    uploads = [products(100 * c, rank) for c, rank in enumerate(ranks)]
    update = method("florist", energy=energy).aggregate(uploads, COUNTS, server_view())
    assert not update.model
    for name in LAYERS:
        want = mean_of_products(uploads, name)
        shares = np.cumsum(np.linalg.svd(want, compute_uv=False) ** 2) / np.sum(want**2)
        k = int(np.argmax(shares >= energy)) + 1
        assert update.merge[name].rank == k
        close(dense(update.merge[name]), svd(want, k))


def test_with_all_energy_it_is_flora() -> None:
    uploads = three(2)
    update = method("florist", energy=1.0).aggregate(uploads, COUNTS, server_view())
    for name, product in aggregate("flora", uploads).merge.items():
        assert torch.equal(update.merge[name].B, product.B)


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=6),
    st.floats(0.01, 1),
)
def test_the_kept_share_is_enough_and_one_direction_less_is_not(sigma: list[float], share: float) -> None:
    values = torch.tensor(sorted(sigma, reverse=True), dtype=torch.float64)
    root = torch.diag(values.sqrt())
    kept = leading_share(LowRank(root, root), share)
    total, energies = float(values.square().sum()), values.square().cumsum(0)
    if total == 0 and share < 1:
        assert kept.rank == 0
    elif share < 1:
        assert float(energies[kept.rank - 1]) >= share * total * (1 - 1e-9)
        assert kept.rank == 1 or float(energies[kept.rank - 2]) < share * total * (1 + 1e-9)


def test_every_round_starts_afresh_at_the_clients_own_rank() -> None:
    for rank in (1, 3):
        starts = [method("florist").start(client_view(t, layers=of_rank(rank))) for t in (0, 1)]
        for name in LAYERS:
            assert not starts[0].lora[name].B.any()
            assert starts[0].lora[name].rank == rank
            assert not torch.equal(starts[0].lora[name].A, starts[1].lora[name].A)


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_a_share_out_of_range_is_refused(toy_table: dict[str, Any], energy: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.energy"):
        read(toy_table, {"method.name": "florist", "method.energy": energy})
