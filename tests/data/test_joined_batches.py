"""The batches of several clients as one batch, padded to the widest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.data.tokens import Completions, Documents, joined
from fedsmoothlora.errors import DataError

ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=2, max_size=8)


@given(ROWS, st.data())
def test_joined_batches_are_the_batch_of_all_rows(ids: list[list[int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(ids) - 1))
    parts = [list(range(cut)), list(range(cut, len(ids)))]
    for rows, left in (
        (Documents(ids=ids, labels=torch.arange(len(ids)), pad=0), False),
        (Completions(prompts=ids, answers=ids[::-1], pad=0), True),
    ):
        whole, found = rows.batch(range(len(ids))), joined([rows.batch(part) for part in parts], left=left)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_rows_of_different_shapes_need_an_attention_mask() -> None:
    batches = [{"inputs": torch.zeros(2, width), "labels": torch.zeros(2)} for width in (3, 5)]
    with pytest.raises(DataError, match=r"inputs: rows of clients have the shapes \(3,\) and \(5,\)"):
        joined(batches, left=False)
