from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from fedsmoothlora.data.own import OwnExamples
from fedsmoothlora.errors import DataError

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
def test_invalid_rows_are_refused_with_the_name_of_the_data_set(rows: list[Any], said: list[str]) -> None:
    with pytest.raises(ValueError, match="client a") as error:
        OwnExamples(Rows(rows), "client a")
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bool])
def test_labels_keep_their_type(dtype: torch.dtype) -> None:
    labels = torch.tensor([-0.45, 0.0, 1.75, 3.0, 0.5, 2.0]).to(dtype)
    named = Rows([{"x": x, "labels": y} for x, y in zip(X, labels, strict=True)])
    for data in (TensorDataset(X, labels), named):
        examples = OwnExamples(data, "mine")
        for found in (examples.batch(range(6))["labels"], examples.labels):
            assert found.dtype == dtype
            assert torch.equal(found, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integers_become_int64_with_the_same_values(dtype: torch.dtype) -> None:
    labels = torch.tensor([2, 0, 1, 2, 100, 0]).to(dtype)
    examples = OwnExamples(TensorDataset(X, labels), "mine")
    assert examples.batch(range(6))["labels"].dtype == examples.labels.dtype == torch.int64
    assert torch.equal(examples.batch(range(6))["labels"], labels.long())


def test_python_floats_are_labels_too() -> None:
    rows = Rows([(x, value) for x, value in zip(X, (-0.45, 0.0, 1.75, 3.0, 0.5, 2.0), strict=True)])
    assert OwnExamples(rows, "mine").batch([0, 2])["labels"].tolist() == [-0.45, 1.75]


def test_labels_of_tokens_may_be_floats_and_are_padded() -> None:
    rows = Rows([{"input_ids": [1, 2, 3], "labels": [0.5, -0.45, 1.0]}, {"input_ids": [4], "labels": [0.25]}])
    labels = OwnExamples(rows, "mine").batch([0, 1])["labels"]
    assert labels.tolist() == [[0.5, pytest.approx(-0.45), 1.0], [-100.0, -100.0, 0.25]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor([0.0, torch.nan])])
def test_a_label_that_is_not_finite_is_refused_with_its_row(value: Any) -> None:
    finite = torch.zeros(2) if isinstance(value, torch.Tensor) else 0.5
    examples = OwnExamples(Rows([(X[0], finite), (X[1], value)]), "client a")
    for read in (lambda: examples.batch([0, 1]), lambda: examples.labels):
        with pytest.raises(DataError, match=r"client a: the label of row 1 is .*(nan|inf).*finite"):
            read()


@pytest.mark.parametrize("label", ["cat", None, {"a": 1}])
def test_a_label_that_is_not_a_number_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"client a: the label of row 0 is .* should be a number"):
        OwnExamples(Rows([(X[0], label)]), "client a")
