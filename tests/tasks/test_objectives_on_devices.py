"""Labels are checked on the host: a loss on an accelerator does not wait for it."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fake_device import FAKE, HOST_READS, FakeAccelerator, FakeDevice
from fedsmoothlora.data.examples import DeviceBatch, on_host, without
from fedsmoothlora.errors import DataError
from fedsmoothlora.tasks.objectives.classification import Classification
from fedsmoothlora.tasks.objectives.language import CausalLanguageModel
from fedsmoothlora.tasks.objectives.multi_label import MultiLabel
from fedsmoothlora.tasks.objectives.regression import Regression
from fedsmoothlora.tasks.objectives.token_classification import TokenClassification
from fedsmoothlora.training.loop import to_device


class Tokens(nn.Module):
    """Logits of 5 tokens or tags for each token, ``(rows, tokens, 5)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.embedding(input_ids)


ROWS = {"inputs": torch.ones(2, 4)}
TEXTS = {
    "input_ids": torch.tensor([[1, 2, 3], [0, 1, 2]]),
    "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
}
CASES = [
    (Classification(), nn.Linear(4, 3), ROWS, [0, 2], [0, 3], "label 3 in the data: the model has 3 logits"),
    (MultiLabel(), nn.Linear(4, 2), ROWS, [[0, 1], [1, 1]], [[0, 1], [2, 1]], "neither 0 nor 1"),
    (Regression(), nn.Linear(4, 1), ROWS, [0.5, 1.0], [0.5, torch.inf], "not a finite number"),
    (
        TokenClassification("abcde"),
        Tokens(),
        TEXTS,
        [[0, 4, -100]] * 2,
        [[0, 5, 1]] * 2,
        "label 5 in the data",
    ),
    (CausalLanguageModel(), Tokens(), TEXTS, [[-100, 4, 1]] * 2, [[0, 7, 1]] * 2, "the label 7 in the data"),
]


@pytest.mark.parametrize(
    ("objective", "model", "inputs", "right", "wrong", "words"),
    CASES,
    ids=[type(case[0]).__name__ for case in CASES],
)
def test_wrong_labels_are_found_without_waiting(
    objective: Any, model: nn.Module, inputs: dict[str, Tensor], right: Any, wrong: Any, words: str
) -> None:
    plain = objective.loss(model, {**inputs, "labels": torch.tensor(right)})
    with FakeDevice():
        model.to(FAKE)
        accelerator = FakeAccelerator()
        HOST_READS.clear()
        loss = objective.loss(model, to_device({**inputs, "labels": torch.tensor(right)}, accelerator))
        assert loss.device == FAKE
        with pytest.raises(DataError, match=words):
            objective.loss(model, to_device({**inputs, "labels": torch.tensor(wrong)}, accelerator))
        assert not HOST_READS
        assert float(loss.detach()) == float(plain.detach())


def test_a_batch_on_a_device_remembers_the_batch_on_the_host() -> None:
    host = {"inputs": torch.ones(2), "labels": torch.zeros(2)}
    moved = DeviceBatch({name: value + 1 for name, value in host.items()}, host)
    assert on_host(moved) == host
    assert on_host(without(moved, "labels")) == {"inputs": host["inputs"]}
    assert list(without(moved, "labels")) == ["inputs"]
    assert on_host(host) is host
    assert without(host, "inputs") == {"labels": host["labels"]}


def test_an_objective_may_change_the_batch_that_it_is_given() -> None:
    host = {"inputs": torch.ones(2), "labels": torch.zeros(2)}
    to_device(host, Accelerator(cpu=True)).pop("labels")
    with FakeDevice():
        moved = to_device(host, FakeAccelerator())
        moved.pop("labels")
    assert list(host) == ["inputs", "labels"]
    assert list(on_host(moved)) == ["inputs", "labels"]
