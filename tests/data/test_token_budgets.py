"""Parts of a batch that a budget of tokens limits."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.data.tokens import Documents, TokenBudget, cut
from fedsmoothlora.errors import ConfigError

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=14)


@given(lengths=lengths, budget=st.integers(1, 60), together=st.sampled_from([1, 2]))
def test_every_row_is_in_one_part_within_the_budget(lengths: list[int], budget: int, together: int) -> None:
    lengths = [length for length in lengths for _ in range(together)]
    documents = Documents(
        [[row + 1] * length for row, length in enumerate(lengths)], torch.arange(len(lengths)), pad=0
    )
    parts = cut(documents.batch(range(len(lengths))), TokenBudget(budget), together=together)
    rows = [part["labels"].tolist() for part in parts]
    assert sorted(row for part in rows for row in part) == list(range(len(lengths)))
    for part, own in zip(parts, rows, strict=True):
        assert part["input_ids"].shape == (len(own), max(lengths[row] for row in own))
        assert part["input_ids"].numel() <= budget or len(own) == together
        assert [part["input_ids"][k].count_nonzero() for k in range(len(own))] == [
            lengths[row] for row in own
        ]
        if together == 2:  # both rows of a pair, in their order
            assert all(own[k] + 1 == own[k + 1] and own[k] % 2 == 0 for k in range(0, len(own), 2))
    longest = [max(lengths[row] for row in own) for own in rows]
    assert longest == sorted(longest)
    # Two neighbouring parts would not fit into one, so no cut into fewer parts of neighbours exists.
    for (one, other), width in zip(pairwise(rows), longest[1:], strict=True):
        assert (len(one) + together) * width > budget or len(other) == 0


@given(lengths=lengths, budget=st.integers(1, 60))
def test_no_cut_has_fewer_parts(lengths: list[int], budget: int) -> None:
    """Against dynamic programming over all cuts of the sorted rows."""
    ascending = sorted(lengths)
    fewest = [0]
    for end in range(1, len(ascending) + 1):
        fits = [
            start for start in range(end) if (end - start) * ascending[end - 1] <= budget or end - start == 1
        ]
        fewest.append(1 + min(fewest[start] for start in fits))
    assert len(TokenBudget(budget).sizes(ascending)) == fewest[-1]


def test_packed_sequences_are_all_as_wide_as_the_batch() -> None:
    batch = {"input_ids": torch.ones(5, 8, dtype=torch.int64), "labels": torch.ones(5, 8)}
    assert [len(part["labels"]) for part in cut(batch, TokenBudget(17))] == [2, 2, 1]


def test_batches_without_tokens_are_refused() -> None:
    batch = {"pixel_values": torch.ones(2, 3), "labels": torch.ones(2)}
    with pytest.raises(ConfigError, match=r"training\.tokens_per_batch = 17: the batches have no tokens"):
        cut(batch, TokenBudget(17))
