from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from fedsmoothlora.data.own import OwnExamples

X = torch.arange(24.0).view(6, 4)
Y = torch.tensor([2, 0, 1, 2, 1, 0])


class Rows(Dataset):
    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


PAIRS = [
    TensorDataset(X, Y),
    Rows([(x, int(y)) for x, y in zip(X, Y, strict=True)]),
    Rows([[x.numpy(), np.int64(y)] for x, y in zip(X, Y, strict=True)]),
    Subset(TensorDataset(X.flip(0), Y.flip(0)), [5, 4, 3, 2, 1, 0]),
]


@pytest.mark.parametrize("data", PAIRS)
@pytest.mark.parametrize("rows", [[0], [4, 1, 1], range(6)])
def test_pairs_become_inputs_and_labels_in_the_order_asked_for(data: Any, rows: Sequence[int]) -> None:
    examples = OwnExamples(data, "mine")
    assert len(examples) == 6
    batch = examples.batch(rows)
    assert batch.keys() == {"inputs", "labels"}
    assert torch.equal(batch["inputs"], X[list(rows)])
    assert torch.equal(batch["labels"], Y[list(rows)])
    assert batch["labels"].dtype == torch.int64


def test_dictionaries_keep_their_keys() -> None:
    rows = [{"tokens": x, "mask": x > 3, "labels": int(y)} for x, y in zip(X, Y, strict=True)]
    batch = OwnExamples(Rows(rows), "mine").batch([5, 2])
    assert type(batch) is dict
    assert batch.keys() == {"tokens", "mask", "labels"}
    assert torch.equal(batch["tokens"], X[[5, 2]])
    assert torch.equal(batch["mask"], X[[5, 2]] > 3)
    assert torch.equal(batch["labels"], Y[[5, 2]])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ["client a", "no rows"]),
        ([{"x": 1, "label": 0}], ["client a", "['label', 'x']", "must have 'labels'"]),
        ([(X[0], 1, 2)], ["client a", "tuple", "(input, label)"]),
        ([(X[0],)], ["client a", "tuple", "(input, label)"]),
        ([X[0, :2]], ["client a", "Tensor", "(input, label)"]),
        ([3], ["client a", "int", "(input, label)"]),
    ],
)
def test_rows_that_cannot_be_right_are_refused_by_the_data_sets_name(
    rows: list[Any], said: list[str]
) -> None:
    with pytest.raises(ValueError, match="client a") as error:
        OwnExamples(Rows(rows), "client a")
    for words in said:
        assert words in str(error.value)
