"""Problems that a run's metrics show are told early, and runs without problems are told nothing."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.methods import Method, find
from fedsmoothlora.runs import health
from fedsmoothlora.runs.health import Health
from fedsmoothlora.runs.session import run
from fedsmoothlora.training.settings import TrainingSettings

FEDIT, OURS = find("fedit")(), find("fedsmoothlora")()


def record(
    round: int = 2, confusion: list[list[int]] | None = None, clients: Any = (), **metrics: float
) -> RoundRecord:
    """``clients``: metrics by client."""
    found = [Metric(None, name, value) for name, value in metrics.items()]
    found += [
        Metric(client, name, value) for client, one in dict(clients).items() for name, value in one.items()
    ]
    return RoundRecord(
        round=round, metrics=found, confusion=None if confusion is None else torch.tensor(confusion)
    )


def told(*records: RoundRecord, method: Method = OURS) -> list[str]:
    notes: list[str] = []
    callback = Health(TrainingSettings(), method, notes.append)
    for one in records:
        callback.on_round_end(one)
    return notes


EVEN, UNEVEN = [[5, 5], [5, 5]], [[80, 0], [20, 0]]


@pytest.mark.parametrize(
    ("confusion", "loss", "accuracy", "said"),
    [
        (EVEN, 0.7, 0.6, "the loss 0.7 is not below ln 2 = 0.6931"),
        (EVEN, math.nan, 0.6, "the loss nan"),
        (EVEN, 0.6, 0.5, "the accuracy 0.5 is not above the most frequent class's share 0.5"),
        (UNEVEN, 0.5, 0.8, "the accuracy 0.8 is not above the most frequent class's share 0.8"),
        (EVEN, 0.6, 0.6, ""),
        (UNEVEN, 0.5, 0.85, ""),
        (None, 9.0, 0.0, ""),
    ],
)
def test_a_model_that_guesses_is_told(
    confusion: list[list[int]] | None, loss: float, accuracy: float, said: str
) -> None:
    found = health.at_chance(record(confusion=confusion, loss=loss, accuracy=accuracy))
    assert said in found
    assert bool(said) == bool(found)


def test_chance_is_told_once_and_not_before_the_second_round() -> None:
    at_chance = [record(round, EVEN, loss=0.7, accuracy=0.5) for round in range(5)]
    assert told(*at_chance[:2]) == []
    [note] = told(*at_chance)
    assert note.startswith("round 2: the global model is no better than guessing")
    assert "training.lr than 0.003" in note
    assert "training.optimizer = 'adamw'" in note


def losses(first: float, mean: float, last: float) -> dict[str, float]:
    return {"train_loss_first": first, "train_loss": mean, "train_loss_last": last}


@pytest.mark.parametrize(
    ("first", "mean", "last", "rises"),
    [
        (1.6, 2.9, 4.0, True),
        (0.1, 0.8, 1.3, True),
        (1.6, 1.5, 4.0, False),  # one hard batch at the end
        (0.1, 0.2, 0.7, False),
        (5.0, 5.5, 6.5, False),
        (2.0, 1.0, 0.5, False),
    ],
)
def test_a_loss_that_rises_within_a_round_is_told(
    first: float, mean: float, last: float, rises: bool
) -> None:
    notes = list(health.rising_losses(record(clients={"a": losses(first, mean, last)})))
    assert len(notes) == rises
    assert all("client a: its loss rose" in note and "training.lr" in note for note in notes)


def test_a_client_far_above_the_others_is_told() -> None:
    clients = {"a": {"train_loss": 0.5}, "b": {"train_loss": 0.7}, "odd": {"train_loss": 4.0}}
    [note] = health.outlying_losses(record(clients=clients))
    assert note.startswith("client odd: its training loss 4 is far above")
    assert not list(health.outlying_losses(record(clients={**clients, "odd": {"train_loss": 1.2}})))
    two = {client: clients[client] for client in ("a", "odd")}
    assert not list(health.outlying_losses(record(clients=two)))  # nobody knows which of them is the odd one


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_at_most_half_of_the_clients_are_far_above_the_others(values: list[float]) -> None:
    clients = {str(i): {"train_loss": value} for i, value in enumerate(values)}
    assert 2 * len(list(health.outlying_losses(record(clients=clients)))) <= len(values)


def seconds(start: float, training: float) -> dict[str, float]:
    return {"seconds_start": start, "seconds_training": training, "seconds_upload": 0.0}


def test_the_share_of_calibration_is_told_with_the_key() -> None:
    half = record(1, clients={"a": seconds(40, 37), "b": seconds(37, 37)})
    [note] = told(half, half)  # once
    assert "calibration took 51% of the clients' time (77 of 151 s)" in note
    assert "8 batches of each client" in note
    assert "method.calibration_batches" in note
    assert told(half, method=FEDIT) == []  # its start needs no calibration
    assert told(record(1, clients={"a": seconds(4, 4)})) == []
    assert told(record(1, clients={"a": seconds(10, 90)})) == []


def test_a_loss_that_ends_far_above_its_beginning_is_told() -> None:
    records = [record(round, loss=loss) for round, loss in enumerate([1.6, 0.9, 4e7])]
    note = health.loss_far_above_the_first(records)
    assert "a loss of 4e+07, far above the 1.6" in note
    assert "the best was 0.9 in round 1" in note
    assert "diverged" in health.loss_far_above_the_first([record(0, loss=1.6), record(1, loss=math.nan)])
    assert health.loss_far_above_the_first(records[:2]) == ""
    assert health.loss_far_above_the_first([record(0, loss=1.6)]) == ""
    assert health.loss_far_above_the_first([]) == ""


class Notes(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def notes_of_run(table: dict[str, Any], folder: Path, changes: dict[str, Any]) -> list[str]:
    notes = Notes()
    run(
        read(table, changes),
        out=folder,
        console=Console(file=io.StringIO()),
        callbacks=[notes],
        outputs=False,
    )
    return notes.notes


def test_a_run_that_learns_is_told_nothing(toy_table: dict[str, Any], tmp_path: Path) -> None:
    # Large batches: with some draws of weights, the loss rises by chance from one small batch to another.
    changes = {"training.batch_size": 32, "training.epochs": 4}
    assert notes_of_run(toy_table, tmp_path / "run", changes) == []


def test_a_run_that_does_not_learn_is_told_after_two_rounds(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"training.lr": 1e-9, "training.rounds": 2, "method.name": "fedit"}
    [note] = notes_of_run(toy_table, tmp_path / "run", changes)
    assert note.startswith("round 2: the global model is no better than guessing")


def test_a_run_that_diverges_says_so_at_the_end(toy_table: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        "training.lr": 30.0,
        "training.max_grad_norm": 10.0,
        "training.rounds": 2,
        "method.name": "fedit",
        "uploads.min_clients": 1,
    }
    *_, note = [
        one for one in notes_of_run(toy_table, tmp_path / "run", changes) if "notes of this kind" not in one
    ]
    assert note.startswith("the run ends with a loss of ")
