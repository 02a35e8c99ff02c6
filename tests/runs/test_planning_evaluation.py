"""``evaluation.test = false``: only the clients' validation rows are measured on."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from fedsmoothlora import Federation
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.runs.planning import build, plan


def test_the_test_set_is_gone_and_validation_rows_decide(toy_table: dict[str, Any]) -> None:
    changes = {"evaluation.test": False, "data.validation": 0.25, "training.rounds": 1}
    simulation = build(plan(read(toy_table, changes)))
    assert simulation.test is None
    record = list(run_rounds(simulation, Callback()))[-1]
    sizes = {client: len(rows) for client, rows in simulation.validation.items()}
    ours = {f.client: f.value for f in record.metrics if f.name == "accuracy" and f.client is not None}
    mean = sum(ours[client] * size for client, size in sizes.items()) / sum(sizes.values())
    assert record.value("accuracy") == pytest.approx(mean)


def test_an_evaluation_without_any_rows_is_refused(toy_table: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.test = false, so keep a share of every client's rows"
    ):
        plan(read(toy_table, {"evaluation.test": False}))


def test_a_federation_of_an_own_model_needs_rows_to_evaluate_on(tmp_path: Any) -> None:
    rows = TensorDataset(torch.randn(12, 6), torch.randint(3, (12,)))
    settings: dict[str, Any] = {
        "method": "fedit",
        "test": rows,
        "lora": {"r": 1, "target_modules": ["0"]},
        "training": {"rounds": 1, "steps": 1},
        "evaluation": {"test": False},
    }
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"evaluation\.test = false leaves nothing to evaluate on"):
        Federation(model, [rows, rows], **settings)
    validation = {"0": TensorDataset(torch.randn(7, 6), torch.randint(3, (7,)))}
    result = Federation(model, [rows, rows], validation=validation, **settings).run(
        out=tmp_path / "out", console=Console(file=io.StringIO())
    )
    own = [line["value"] for line in result.metrics if (line["client"], line["name"]) == ("0", "accuracy")]
    assert result.values("accuracy") == own
