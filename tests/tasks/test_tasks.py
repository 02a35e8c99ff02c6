from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsmoothlora.tasks.objectives import Classification


class Table:
    """Rows whose logits are known."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.logits = rng.normal(0, 4, (rows, 7)).astype(np.float32)
        self.labels = rng.integers(0, 7, rows)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        index = np.asarray(rows)
        return {"x": torch.from_numpy(self.logits[index]), "labels": torch.from_numpy(self.labels[index])}


class Echo(nn.Module):
    """Returns its input as logits; dropout shows whether it is evaluated in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.dropout(x))


def by_numpy(table: Table) -> dict[str, float]:
    logits = table.logits.astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return {
        "accuracy": float((logits.argmax(axis=1) == table.labels).mean()),
        "loss": float(-np.log(shares[np.arange(len(table)), table.labels]).mean()),
    }


@pytest.mark.parametrize("batch_size", [1, 7, 100, 101, 1000])
def test_metrics_are_numpys_whatever_the_batch_size(batch_size: int) -> None:
    table = Table(101)
    model = Echo().train()
    got, wanted = (
        Classification().evaluate(model, table, batch_size, lambda batch: batch).metrics,
        by_numpy(table),
    )
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert got["accuracy"] == wanted["accuracy"]


def test_the_training_loss_is_the_mean_over_the_batch() -> None:
    table = Table(20)
    loss = Classification().loss(Echo().eval(), table.batch(range(20)))
    assert float(loss) == pytest.approx(by_numpy(table)["loss"], rel=1e-6)
