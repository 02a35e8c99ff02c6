"""Callbacks: a run notifies them of every step, in order, and of its end even if one of them raises."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsmoothlora import run, tasks
from fedsmoothlora.callbacks import Callback, EarlyStopping, ProgressLoss, RunInfo, setbacks
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.reports.metrics import METRICS, larger_is_better, main_metrics
from fedsmoothlora.reports.report import write_report
from fedsmoothlora.reports.terminal import result
from fedsmoothlora.runs.result import Result


class Seen(Callback):
    """Keeps the events of a run; raises once a round is finished, if asked to."""

    def __init__(self, raises_after: int | None = None) -> None:
        self.events: list[tuple[str, Any]] = []
        self._raises_after = raises_after

    def on_run_begin(self, run: RunInfo) -> None:
        self.events.append(("run", (run.name, run.method, run.rounds, run.clients)))

    def on_round_begin(self, round: int, rounds: int, clients: int) -> None:
        self.events.append(("round", round))

    def on_client_end(self, client: str) -> None:
        self.events.append(("client", client))

    def on_round_end(self, record: Any) -> None:
        self.events.append(("record", record.round))
        if record.round == self._raises_after:
            raise RuntimeError("enough")

    def on_run_end(self) -> None:
        self.events.append(("end", None))


def events(rounds: int) -> list[tuple[str, Any]]:
    """The events of a run of ``toy_table`` up to that round."""
    found: list[tuple[str, Any]] = [("run", ("toy", "fedsmoothlora", 2, 3)), ("record", 0)]
    for round in range(rounds):
        found += [("round", round), *(("client", client) for client in "012"), ("record", round + 1)]
    return [*found, ("end", None)]


def test_a_callback_is_notified_of_every_step_in_order(toy_table: dict[str, Any], tmp_path: Path) -> None:
    seen = Seen()

    run(toy_table, {"training.rounds": 2}, out=tmp_path / "run", callbacks=[seen])

    assert seen.events == events(2)


def test_an_exception_of_a_callback_ends_the_run_which_can_be_resumed(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    first, again = Seen(raises_after=1), Seen()
    with pytest.raises(RuntimeError, match="enough"):
        run(toy_table, {"training.rounds": 2}, out=tmp_path / "run", callbacks=[first])
    assert first.events == events(1)

    run(resume=tmp_path / "run", callbacks=[again])

    # The checkpoint of round 1 was not written, so that round is run again.
    assert [event for event in again.events if event[0] == "record"] == [("record", 1), ("record", 2)]
    assert again.events[-1] == ("end", None)


def record(round: int, **metrics: float) -> RoundRecord:
    """A record with metrics of the global model."""
    return RoundRecord(round=round, metrics=[Metric(None, name, value) for name, value in metrics.items()])


def stops_after(stopping: EarlyStopping, values: list[float], name: str = "accuracy") -> int | None:
    """The round after which the callback ends a run with these values; None if it does not."""
    for round, value in enumerate(values):
        stopping.on_round_end(record(round, **{name: value}))
        if stopping.stop_reason is not None:
            return round
    return None


@pytest.mark.parametrize(
    ("values", "patience", "options", "last"),
    [
        ([0.1, 0.2, 0.2, 0.2, 0.9], 2, {}, 3),
        ([0.1, 0.2, 0.15, 0.3, 0.4], 2, {}, None),
        ([0.1, 0.2, math.nan, 0.1], 2, {}, 3),
        ([0.1, 0.15, 0.19], 2, {"min_delta": 0.1}, 2),
        ([2.0, 1.0, 1.5, 1.2], 2, {"larger_is_better": False}, 3),
        ([0.5, 0.1], 1, {}, 1),
    ],
)
def test_early_stopping_waits_for_patience_rounds_without_a_better_value(
    values: list[float], patience: int, options: dict[str, Any], last: int | None
) -> None:
    assert stops_after(EarlyStopping("accuracy", patience, **options), values) == last


def test_early_stopping_of_a_metric_that_is_not_recorded_is_refused() -> None:
    with pytest.raises(ConfigError, match="no metric 'acuracy'; the run records accuracy, loss"):
        EarlyStopping("acuracy", 2).on_round_end(record(0, accuracy=0.1, loss=2.0))


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"patience": 1, "min_delta": math.nan}])
def test_early_stopping_refuses_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="it must be at least"):
        EarlyStopping("loss", **wrong)


class StopsAfter(Callback):
    """Ends the run after a round."""

    def __init__(self, round: int) -> None:
        self._round = round

    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == self._round:
            self.stop_reason = "enough"


def test_a_run_that_a_callback_ends_has_its_outputs_and_can_go_on_without_it(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(toy_table, {"training.rounds": 3}, out=tmp_path / "whole", outputs=False)
    stopped = run(toy_table, {"training.rounds": 3}, out=tmp_path / "run", callbacks=[StopsAfter(2)])

    assert stopped.rounds == 2
    assert stopped.stopped == "enough"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()

    resumed = run(resume=tmp_path / "run", outputs=False)

    assert resumed.stopped is None
    assert resumed.values("loss") == whole.values("loss")


def test_patience_ends_a_run_and_a_resumed_run_ends_at_the_same_round(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    frozen = {**toy_table["training"], "lr": 1e-12, "rounds": 5, "patience": 2}
    table = {**toy_table, "training": frozen}

    once = run(table, out=tmp_path / "once", outputs=False)
    with pytest.raises(RuntimeError, match="enough"):
        run(table, out=tmp_path / "run", callbacks=[Seen(raises_after=2)], outputs=False)
    resumed = run(resume=tmp_path / "run", outputs=False)
    again = run(resume=tmp_path / "run", outputs=False)

    assert once.rounds == resumed.rounds == again.rounds < 5
    assert once.stopped == resumed.stopped == again.stopped
    assert once.values("loss") == resumed.values("loss") == again.values("loss")


def falls(values: list[float], *, metric: str = "accuracy", resumed_after: int | None = None) -> list[str]:
    """The notes of a run with these values, which is resumed after a round or not."""
    notes: list[str] = []
    records = [
        RoundRecord(round=round, metrics=[Metric(None, metric, value)]) for round, value in enumerate(values)
    ]
    history = records[: 0 if resumed_after is None else resumed_after + 1]
    callback = ProgressLoss(metric, notes.append, larger_is_better=metric != "loss")
    callback.on_run_begin(
        RunInfo(name="", folder=Path(), method="", rounds=9, clients=1, layers={}, head=[], history=history)
    )
    for record in records[len(history) :]:
        callback.on_round_end(record)
    return notes


@pytest.mark.parametrize(
    ("values", "rounds"),
    [
        ([0.1, 0.5, 0.7], []),
        ([0.1, 0.7, 0.41], []),  # just more than half is left
        ([0.1, 0.7, 0.39], [2]),
        ([0.1, 0.7, 0.2, 0.1, 0.3], [2]),  # one note for one fall
        ([0.1, 0.7, 0.2, 0.8, 0.2], [2, 4]),
        ([0.1, 0.7, math.nan], [2]),
        ([0.1, 0.12, 0.1], []),  # a gain that chance makes
        ([math.nan, 0.7, 0.1], []),
        ([0.5, 0.4, 0.3], []),
    ],
)
def test_a_run_that_loses_more_than_half_of_its_gain_says_so(values: list[float], rounds: list[int]) -> None:
    notes = falls(values)
    assert [int(note.split()[1].rstrip(":")) for note in notes] == rounds
    assert all("accuracy fell to" in note and "training.lr" in note for note in notes)
    for resumed_after in range(len(values)):
        assert (
            falls(values, resumed_after=resumed_after)
            == notes[len(notes) - sum(r > resumed_after for r in rounds) :]
        )


def test_a_loss_that_rises_again_is_noted_too() -> None:
    assert falls([2.0, 1.0, 1.4], metric="loss") == []
    (note,) = falls([2.0, 1.0, 1.6], metric="loss")
    assert "loss fell to" not in note
    assert "round 2" in note


def test_a_metric_that_is_measured_in_some_rounds_is_followed_over_the_others() -> None:
    values = {0: 0.1, 3: 0.7, 6: 0.2, 9: 0.8}
    (found,) = setbacks("exact_match", values)
    assert (found.round, found.best_round, found.first, found.best) == (6, 3, 0.1, 0.7)
    notes: list[str] = []
    callback = ProgressLoss("exact_match", notes.append)
    for round in range(10):
        metrics = [Metric(None, "exact_match", values[round])] if round in values else []
        callback.on_round_end(RoundRecord(round=round, metrics=[Metric(None, "loss", 1.0), *metrics]))
    (note,) = notes
    assert note.startswith(str(found))


def test_a_metric_that_is_no_number_at_first_is_followed_from_its_first_number_on() -> None:
    """Before training, a model for numbers may predict a constant, which has no correlation."""
    nan = float("nan")
    (found,) = setbacks("pearson", {0: nan, 1: 0.1, 2: 0.9, 3: 0.2})
    assert (found.round, found.first, found.best, found.best_round) == (3, 0.1, 0.9, 2)
    (found,) = setbacks("pearson", {0: nan, 1: 0.1, 2: 0.9, 3: nan})
    assert found.round == 3
    assert setbacks("pearson", {0: nan, 1: nan}) == []


@pytest.mark.parametrize("task", tasks.names())
def test_every_tasks_main_metric_is_followed_in_its_direction(task: str) -> None:
    name = tasks.find(task).metrics[0]
    best = tasks.find(task).defaults.get("checkpoint.best", "accuracy")
    assert {name, best} <= {*main_metrics(best)}
    for one in (name, best):
        better, first, worse = (0.9, 0.1, 0.15) if larger_is_better(one) else (0.1, 2.0, 1.9)
        (found,) = setbacks(one, {0: first, 1: better, 2: worse}, larger_is_better=larger_is_better(one))
        assert found.round == 2
        assert METRICS[one].larger_is_better is not None


def test_report_terminal_and_result_name_the_round_in_which_a_run_fell_back(tmp_path: Path) -> None:
    series = {
        "loss": {0: 2.0, 1: 1.5, 2: 1.4},
        "exact_match": {0: 0.1, 2: 0.8},
        "accuracy": {0: 0.1, 1: 0.7, 2: 0.2},
    }
    lines = [
        {"round": round, "client": None, "name": name, "value": value}
        for name, values in series.items()
        for round, value in values.items()
    ]
    (tmp_path / "config.toml").write_text('[training]\nrounds = 2\n[checkpoint]\nbest = "loss"\n')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = "round 2: accuracy fell to 0.2, which loses more than half of its way from 0.1 to 0.7 (round 1)"
    assert [str(line) for line in result(tmp_path)][1:] == [said]
    assert said[1:] in write_report(tmp_path).read_text(encoding="utf-8")
    recorded = Result(folder=tmp_path, metrics=lines)
    assert [str(one) for one in recorded.setbacks("accuracy")] == [said]
    assert recorded.setbacks("loss") == recorded.setbacks("exact_match") == []


def test_the_console_of_a_run_that_falls_back_says_so(toy_table: dict[str, Any], tmp_path: Path) -> None:
    class Notes(Callback):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def on_note(self, text: str) -> None:
            self.texts.append(text)

    class Spoils(Notes):
        """Takes the gain away from what is recorded in the last round."""

        def on_round_end(self, record: RoundRecord) -> None:
            if record.round == 2:
                metrics = [replace(m, value=0.0) if m.name == "accuracy" else m for m in record.metrics]
                object.__setattr__(record, "metrics", metrics)

    spoils = Spoils()
    overrides = {"training.rounds": 2, "training.lr": 0.05}
    run(toy_table, overrides, out=tmp_path / "run", callbacks=[spoils], outputs=False)
    assert [text for text in spoils.texts if "loses more than half" in text]
