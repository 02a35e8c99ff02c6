from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsmoothlora.data.examples import BatchOrder, Subset
from fedsmoothlora.data.tokens import Completions, Dialogues, Documents, Pairs, TaggedWords, Translations


def order(rows: int, batch_size: int, seed: int = 0) -> BatchOrder:
    return BatchOrder(rows, batch_size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 3), (12, 4), (5, 8), (1, 1)])
def test_every_row_occurs_once_in_a_pass(rows: int, batch_size: int) -> None:
    batches = order(rows, batch_size)
    a_pass = batches.batches_per_pass
    taken = batches.take(3 * a_pass)
    for first in range(0, 3 * a_pass, a_pass):
        one = taken[first : first + a_pass]
        assert sorted(chain(*one)) == list(range(rows))
        assert all(len(batch) == batch_size for batch in one[:-1])


def test_every_row_occurs_once_in_a_pass_for_any_calls_of_take() -> None:
    batches = order(12, 4)
    assert Counter(chain(*batches.take(1), *batches.take(2))) == Counter(range(12))


def test_each_pass_has_a_new_order_drawn_by_the_generator_alone() -> None:
    first, again, other = (order(50, 7, seed).take(16) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[:8] != first[8:]


def test_part_of_a_pass_is_the_beginning_of_the_whole() -> None:
    assert order(20, 3).take(2) == order(20, 3).take(7)[:2]


@pytest.mark.parametrize(("rows", "batch_size"), [(0, 4), (4, 0)])
def test_batches_without_rows_are_an_error(rows: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        order(rows, batch_size)


class Numbers:
    def __len__(self) -> int:
        return 10

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        return {"labels": torch.tensor(rows) * 100}


def test_a_subset_has_its_own_row_numbers() -> None:
    subset = Subset(Numbers(), np.array([7, 2, 5]))
    assert len(subset) == 3
    assert subset.batch([2, 0]).keys() == {"labels"}
    assert subset.batch([2, 0])["labels"].tolist() == [500, 700]
    assert subset.batch(range(1, 3))["labels"].tolist() == [200, 500]


class Counted(list[list[int]]):
    """Rows that count how often all of them are read."""

    readings = 0

    def __iter__(self) -> Any:
        self.readings += 1
        return super().__iter__()


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(lambda ids: Documents(ids, torch.zeros(4), pad=0), id="texts"),
        pytest.param(lambda ids: TaggedWords(ids, ids, pad=0), id="tags"),
        pytest.param(lambda ids: Translations(ids, ids, pad=0), id="translations"),
        pytest.param(lambda ids: Completions(ids, [[1]] * 4, pad=0), id="completions"),
        pytest.param(lambda ids: Dialogues(ids, [[True] * 2] * 4, pad=0), id="dialogues"),
        pytest.param(lambda ids: Pairs(Completions(ids, [[1]] * 4, pad=0)), id="pairs"),
    ],
)
def test_lengths_of_many_clients_are_counted_once_for_all(of: Callable[[Counted], Any]) -> None:
    ids = Counted([[1] * length for length in (3, 1, 2, 4)])
    rows = of(ids)
    lengths = [Subset(rows, np.array([row])).lengths for row in range(len(rows)) for _ in range(2)]
    assert len(set(map(str, lengths))) == len(rows)
    assert ids.readings == 1
