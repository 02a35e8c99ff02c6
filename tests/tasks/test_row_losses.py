"""The loss of every row is that of the row alone, as sample-level privacy needs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsmoothlora.tasks.objectives import (
    CausalLanguageModel,
    Classification,
    DirectPreference,
    MultiLabel,
    Regression,
    SequenceToSequence,
    TokenClassification,
)
from fedsmoothlora.tasks.objectives.base import RowLosses

ROWS, WIDTH, OUTPUTS = 5, 4, 3


class Rows(nn.Module):
    """Logits of every row, or of every token of a row."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer, self.embedding = nn.Linear(WIDTH, outputs), nn.Embedding(9, WIDTH)

    def forward(self, inputs: Tensor | None = None, input_ids: Tensor | None = None, **_: Any) -> Any:
        found = inputs if input_ids is None else self.embedding(input_ids)
        return SimpleNamespace(logits=self.layer(found))


class Smoothed(Classification):
    def criterion(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, weights, label_smoothing=0.2)


def vectors(labels: Tensor) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(ROWS, WIDTH, generator=draw), "labels": labels}


def tokens(outputs: int) -> dict[str, Tensor]:
    """Rows with different numbers of labelled tokens."""
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(0, outputs, (ROWS, 6), generator=draw)
    for row in range(ROWS):
        labels[row, row + 2 :] = -100
    ids = torch.randint(0, 9, (ROWS, 6), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize(
    ("objective", "batch", "outputs"),
    [
        pytest.param(Classification(), vectors(torch.arange(ROWS) % OUTPUTS), OUTPUTS, id="classification"),
        pytest.param(Smoothed(), vectors(torch.arange(ROWS) % OUTPUTS), OUTPUTS, id="own-criterion"),
        pytest.param(Regression(), vectors(torch.arange(ROWS).float()), 1, id="regression"),
        pytest.param(MultiLabel(), vectors((torch.arange(15) % 2).view(ROWS, 3)), OUTPUTS, id="multi-label"),
        pytest.param(TokenClassification(["O", "A", "B"]), tokens(OUTPUTS), OUTPUTS, id="tokens"),
        pytest.param(CausalLanguageModel(), tokens(9), 9, id="language"),
        pytest.param(SequenceToSequence(), tokens(9), 9, id="sequence-to-sequence"),
    ],
)
def test_the_losses_of_a_batch_are_those_of_its_rows_alone(
    objective: Any, batch: dict[str, Tensor], outputs: int
) -> None:
    model = Rows(outputs)
    assert isinstance(objective, RowLosses)
    found = objective.losses(model, batch)
    alone = [
        objective.loss(model, {name: value[row : row + 1] for name, value in batch.items()})
        for row in range(ROWS)
    ]
    torch.testing.assert_close(found, torch.stack(alone))


def test_a_row_without_an_answer_has_the_loss_0() -> None:
    batch = tokens(9)
    batch["labels"][2] = -100
    assert float(CausalLanguageModel().losses(Rows(9), batch)[2].detach()) == 0.0


def test_pairs_have_no_losses_of_rows() -> None:
    assert not isinstance(DirectPreference(0.1), RowLosses)
