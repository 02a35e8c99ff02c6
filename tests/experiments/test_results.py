"""Results of a comparison from folders that are written by hand."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments import tables
from fedsmoothlora.experiments.curves import over_seeds, quality_by_bytes
from fedsmoothlora.experiments.page import client_mean, loss_jump, page
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.results import Results, RunResult, read_results
from fedsmoothlora.experiments.tuning_record import TuningRecord, TuningStatus
from fedsmoothlora.reports import charts
from fedsmoothlora.reports.charts import line_chart
from fedsmoothlora.reports.reading import Metrics

ROUNDS = 2
Curves = Mapping[str, Sequence[Sequence[float]]]


@pytest.fixture
def written(toy_table: dict[str, Any], tmp_path: Path) -> Callable[..., Results]:
    """``written({"fedit": [[0.1, 0.5, 0.7], ...]})``: accuracies by round, one list a seed."""

    def write(
        curves: Curves,
        more: Sequence[tuple[int, str | None, str, float]] = (),
        validation: float = 0.0,
        tuned: bool = True,
        **options: Any,
    ) -> Results:
        planned_runs = {}
        for label, by_seed in curves.items():
            for seed, values in enumerate(by_seed):
                config = read(
                    toy_table,
                    {
                        "training.rounds": ROUNDS,
                        "method.name": label.partition("-")[0],
                        "seed": seed,
                        "data.validation": validation,
                    },
                )
                planned_run = PlannedRun(
                    f"{label}, seed {seed}", config, tmp_path / "runs" / label / f"seed-{seed}"
                )
                _write_run(planned_run, values, more)
                planned_runs[label, seed] = planned_run
        if tuned:
            options["tuning"] = {label: TuningStatus(tuning_record()) for label in curves}
        return read_results(planned_runs, **options)

    return write


def tuning_record(**changes: Any) -> TuningRecord:
    record = TuningRecord(
        trials=3,
        seeds=(1_000_000, 1_000_001),
        metric="accuracy",
        score=0.5,
        grid={"training.lr": [0.1, 0.2, 0.3]},
        at_edge=(),
        config={},
    )
    return replace(record, **changes)


def _write_run(
    planned_run: PlannedRun, values: Sequence[float], more: Sequence[tuple[int, str | None, str, float]]
) -> None:
    (planned_run.folder / "checkpoints").mkdir(parents=True)
    lines = []
    for k, value in enumerate(values):
        lines += [(k, None, "accuracy", value), (k, None, "loss", 2 - value)]
        if k:
            lines += [
                (k, None, "bytes_up", 100.0 * k),
                (k, None, "bytes_down", 10.0),
                (k, None, "seconds_round", 3.0),
            ]
    lines += more
    keys = ("round", "client", "name", "value")
    text = "".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)
    (planned_run.folder / "metrics.jsonl").write_text(text)
    if len(values) > ROUNDS:
        (planned_run.folder / "checkpoints" / f"{ROUNDS:04d}.json").write_text("{}")
    else:
        planned_run.outcome_file.write_text(json.dumps({"state": "diverged", "reason": "too few uploads"}))


def test_means_differences_and_what_they_say(written: Callable[..., Results]) -> None:
    results = written(
        {
            "fedit": [[0.1, 0.3, 0.5], [0.1, 0.3, 0.6], [0.1, 0.3, 0.7]],
            "ffa": [[0.1, 0.3, 0.4], [0.1, 0.3, 0.5], [0.1, 0.3, 0.6]],
            "flora": [[0.1, 0.3, 0.6], [0.1, 0.3, 0.5], [0.1, 0.3, 0.7]],
        }
    )
    assert results.metric == "accuracy"
    assert results.baseline == "fedit"
    assert results.final("fedit").mean == pytest.approx(0.6)
    assert results.final("fedit").std == pytest.approx(0.1)
    assert results.difference("ffa").mean == pytest.approx(-0.1)
    assert results.verdict("ffa") == "worse"
    # d = 0.1, -0.1, 0: sd 0.1, t(2) = 4.303
    found = results.difference("flora")
    assert (found.low, found.high) == pytest.approx((-0.2484, 0.2484), abs=1e-4)
    assert results.verdict("flora") == "no difference seen"


@pytest.mark.parametrize("untuned", ["fedit", "ffa", "both"])
def test_without_tuning_of_both_no_variant_is_called_better_or_worse(
    written: Callable[..., Results], untuned: str
) -> None:
    curves = {
        "fedit": [[0.1, 0.3, 0.5], [0.1, 0.3, 0.6]],
        "ffa": [[0.1, 0.3, 0.7], [0.1, 0.3, 0.801]],
        "flora": [[0.1, 0.3, 0.2], [0.1, 0.3, 0.301]],
        "rolora": [[0.1, 0.3, 0.4], [0.1, 0.3, 0.7]],
    }
    never = TuningStatus(None, "no tuning is recorded")
    labels = ("fedit", "ffa", "flora", "rolora") if untuned == "both" else (untuned,)
    tuning = {label: TuningStatus(tuning_record()) for label in curves} | dict.fromkeys(labels, never)
    results = written(curves, tuned=False, tuning=tuning)
    assert results.verdict("ffa") == "untuned"
    assert results.verdict("flora") == ("worse" if untuned == "ffa" else "untuned")
    assert results.verdict("rolora") == "no difference seen"
    text = tables.markdown(results)
    assert f"Not tuned: {labels[0]} (no tuning is recorded)" in text
    assert "better" not in text.partition("## Tuning")[0]
    rows = {row["variant"]: row for row in csv.DictReader(io.StringIO(tables.variants_csv(results)))}
    assert rows["ffa"]["verdict"] == "untuned"
    assert {label for label, row in rows.items() if row["tuned"] == "False"} == set(labels)
    assert "not tuned, so no verdict" in page(results) or untuned == "rolora"


def test_tables_show_trials_seeds_and_edges_and_warn_of_unequal_numbers(
    written: Callable[..., Results],
) -> None:
    curves = {"fedit": [[0.1, 0.3, 0.5]], "ffa": [[0.1, 0.3, 0.7]], "flora": [[0.1, 0.3, 0.7]]}
    tuning = {
        "fedit": TuningStatus(tuning_record()),
        "ffa": TuningStatus(tuning_record(trials=9, seeds=(1_000_000,), at_edge=("training.lr",))),
        "flora": TuningStatus(None, "training.lr was 0.2 during tuning and is 0.3 here"),
    }
    results = written(curves, tuned=False, tuning=tuning)
    _, rows = tables.tuning_table(results)
    assert rows == [
        ["fedit", "yes", "3", "1000000 to 1000001", "training.lr: 0.1, 0.2, 0.3", "no"],
        ["ffa", "yes", "9", "1000000", "training.lr: 0.1, 0.2, 0.3", "training.lr"],
        ["flora", "no: training.lr was 0.2 during tuning and is 0.3 here", *["–"] * 4],
    ]
    untuned, unequal, edge = tables.tuning_notes(results)
    assert "flora (training.lr was 0.2" in untuned
    assert "fedit 3 trials, 2 seeds each; ffa 9 trials, 1 seed each" in unequal
    assert "ffa (training.lr)" in edge
    assert [row[5] for row in tables.quality_table(results)[1]] == [
        "3 trials, 2 seeds each",
        "9 trials, 1 seed each, at an edge",
        "no",
    ]
    assert tables.tuning_notes(written({"fedit-b": [[0.1, 0.3, 0.5]]})) == []


@given(
    before=st.floats(0.01, 100),
    factor=st.floats(0, 1e9),
)
def test_a_loss_has_exploded_if_it_ends_far_above_the_loss_before_training(
    before: float, factor: float
) -> None:
    metrics = Metrics(server={"loss": {0: before, ROUNDS: before * factor}})
    run = RunResult(
        label="fedit",
        seed=0,
        state="finished",
        reason="",
        folder=Path(),
        config=SimpleNamespace(training=SimpleNamespace(rounds=ROUNDS)),  # type: ignore[arg-type]
        metrics=metrics,
    )
    assert bool(run.loss_explosion) == (before * factor > 10 * before)
    assert not replace(run, state="diverged").loss_explosion
    lost = Metrics(server={"loss": {0: before, ROUNDS: math.nan}})
    assert "exploded" in replace(run, metrics=lost).loss_explosion


def test_the_cost_of_the_target_is_that_of_the_first_round_that_reaches_it(
    written: Callable[..., Results],
) -> None:
    results = written(
        {"fedit": [[0.1, 0.5, 0.6], [0.1, 0.2, 0.4]], "ffa": [[0.1, 0.2, 0.3], [0.6, 0.1, 0.1]]}
    )
    assert results.target == pytest.approx(0.5)
    cost, reached = results.cost_to_target("fedit")
    assert reached == 1
    assert cost is not None
    assert (cost.rounds, cost.bytes, cost.seconds) == (1, 110, 3)
    cost, reached = results.cost_to_target("ffa")  # before any training, and never
    assert reached == 1
    assert cost is not None
    assert (cost.rounds, cost.bytes) == (0, 0)
    whole = results.cost("fedit")
    assert whole is not None
    assert (whole.rounds, whole.bytes, whole.seconds) == (2, 320, 6)


def test_bytes_of_a_client_are_those_of_a_round_over_the_clients_that_took_part(
    written: Callable[..., Results],
) -> None:
    more = [(k, None, name, value) for k in (1, 2) for name, value in (("clients", 3), ("left_out", 1))]
    results = written({"fedit": [[0.1, 0.5, 0.6], [0.1, 0.5, 0.7]]}, more=more)
    found = [results.bytes_per_client("fedit", name) for name in ("bytes_up", "bytes_down")]
    assert found == [(100 + 200) / 8, (10 + 10) / 8]
    head, rows = tables.bytes_table(results)
    assert head == ["variant", "rank", "up", "down", "to target", "in all"]
    assert rows == [["fedit", "2", "38 B", "2 B", "320 B", "320 B"]]
    assert written({"ffa": [[0.1, 0.5, 0.6]]}).bytes_per_client("ffa", "bytes_up") is None  # an old folder


@pytest.mark.parametrize("times", [1, 13, 15, 1000])
def test_quality_by_bytes_has_bands_and_a_logarithmic_axis_where_amounts_are_far_apart(
    written: Callable[..., Results], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    results = written(
        {
            "fedit": [[0.1, 0.5, 0.6], [0.3, 0.5, 0.8]],
            "full": [[0.1, 0.5, 0.6], [0.1, 0.9]],
            "local": [[], []],
        }
    )
    runs = dict(results.runs)
    for key, run in runs.items():
        if run.label == "full":
            server = dict(run.metrics.server)
            for name in ("bytes_up", "bytes_down"):
                server[name] = {k: times * value for k, value in server[name].items()}
            runs[key] = replace(run, metrics=replace(run.metrics, server=server))
    figures = []
    monkeypatch.setattr(charts, "line_chart", lambda *a, **b: figures.append((a, b)) or line_chart(*a, **b))
    found = quality_by_bytes(replace(results, runs=runs))
    assert found is not None
    (((fedit, full),), options) = figures[0]
    far_apart = times * 110 > 5 * 320  # full's second seed has one round only
    assert options["logarithmic"] == far_apart
    assert ("logarithmic" in found.caption) == far_apart
    start = {} if far_apart else {0: 0.2}
    assert fedit.points == pytest.approx({**start, 110e-6: 0.5, 320e-6: 0.7})
    assert fedit.band.low == pytest.approx({**({} if far_apart else {0: 0.1}), 110e-6: 0.5, 320e-6: 0.6})
    assert fedit.band.high == pytest.approx({**({} if far_apart else {0: 0.3}), 110e-6: 0.5, 320e-6: 0.8})
    assert full.points == pytest.approx({**({} if far_apart else {0: 0.1}), times * 110e-6: 0.7})


def test_a_lower_loss_is_better(written: Callable[..., Results]) -> None:
    results = written(
        {"fedit": [[0.1, 0.5, 0.6], [0.1, 0.5, 0.7]], "ffa": [[0.1, 0.6, 0.8], [0.1, 0.7, 0.9]]},
        tuned=False,
        tuning=dict.fromkeys(("fedit", "ffa"), TuningStatus(tuning_record(metric="loss"))),
        metric="loss",
        target=1.45,
    )
    assert not results.larger_is_better
    assert results.verdict("ffa") == "better"
    assert results.difference("ffa").mean == pytest.approx(-0.2)
    cost, reached = results.cost_to_target("ffa")
    assert reached == 2
    assert cost is not None
    assert cost.rounds == 1


def test_a_metric_that_was_not_measured_is_refused_with_the_known_ones(
    written: Callable[..., Results],
) -> None:
    with pytest.raises(ConfigError, match=r"--metric auroc: was not measured; there are accuracy, loss$"):
        written({"fedit": [[0.1, 0.5, 0.6]]}, metric="auroc")


def test_a_diverged_run_is_reported_and_its_seed_left_out_of_the_pairs(
    written: Callable[..., Results],
) -> None:
    results = written(
        {
            "fedit": [[0.1, 0.3, 0.5], [0.1, 0.3, 0.6], [0.1, 0.3, 0.7]],
            "ffa": [[0.1, 0.3, 0.6], [0.1, 0.9], [0.1, 0.3, 0.9]],
        }
    )
    assert results.finals("ffa") == {0: 0.6, 2: 0.9}
    assert results.difference("ffa").n == 2
    assert results.difference("ffa").mean == pytest.approx(0.15)
    assert tables.runs_in_words(results, "ffa") == "2 of 3, 1 diverged"
    assert "ffa, seed 1: diverged, 1 of 2 rounds: too few uploads" in tables.markdown(results)
    row = list(csv.DictReader(io.StringIO(tables.variants_csv(results))))[1]
    assert (row["finished"], row["diverged"], row["pairs"]) == ("2", "1", "2")
    rows = list(csv.DictReader(io.StringIO(tables.runs_csv(results))))
    assert [one["accuracy"] for one in rows] == ["0.5", "0.6", "0.7", "0.6", "", "0.9"]


def test_seeds_that_diverged_do_not_make_a_variant_better(written: Callable[..., Results]) -> None:
    rounds = [0.1, 0.3]
    results = written(
        {
            "fedit": [[*rounds, 0.60], [*rounds, 0.61], [*rounds, 0.62]],
            "ffa": [[*rounds, 0.80], [*rounds, 0.81], [0.1, 0.9]],
            "flora": [[*rounds, 0.60], [*rounds, 0.61], [*rounds, 0.63]],
        }
    )
    assert results.difference("ffa").low > 0
    assert results.verdict("ffa") == "not all seeds"
    assert results.cost_to_target("ffa")[1] == 2  # the run that diverged had 0.9 before
    assert "Student's t over the seeds that both finished" in tables.markdown(results)
    assert "flora: no difference seen" in page(results)  # the highest mean of those with all seeds


def test_settings_tuned_by_accuracy_give_no_verdict_by_loss(written: Callable[..., Results]) -> None:
    curves = {"fedit": [[0.1, 0.3, 0.5], [0.1, 0.3, 0.6]], "ffa": [[0.1, 0.3, 0.7], [0.1, 0.3, 0.801]]}
    results = written(curves, metric="loss")
    assert results.verdict("ffa") == "untuned"
    assert "fedit (tuned by accuracy, and compared by loss)" in tables.markdown(results)


def test_a_run_that_finished_after_all_has_no_reason(written: Callable[..., Results], tmp_path: Path) -> None:
    results = written({"fedit": [[0.1, 0.3, 0.5]]})
    run = results.runs["fedit", 0]
    planned = PlannedRun("fedit, seed 0", run.config, run.folder)
    planned.outcome_file.write_text(json.dumps({"state": "failed", "reason": "killed"}))
    again = read_results({("fedit", 0): planned})
    assert (again.runs["fedit", 0].state, again.runs["fedit", 0].reason) == ("finished", "")
    assert tables.failed_runs(again) == []


def test_a_finished_run_whose_loss_exploded_is_reported(written: Callable[..., Results]) -> None:
    more = [(2, None, "loss", 4e7)]
    results = written({"fedit": [[0.1, 0.3, 0.5]]}, more=more)
    assert tables.runs_in_words(results, "fedit") == "1, 1 with exploded loss"
    text = "fedit, seed 0: finished, 2 of 2 rounds: the loss exploded: 4e+07 after the last round, 1.9 before"
    assert text in tables.markdown(results)
    assert text in page(results)


def test_without_a_finished_baseline_there_is_no_target_and_no_pair(written: Callable[..., Results]) -> None:
    results = written({"fedit": [[0.1]], "ffa": [[0.1, 0.3, 0.6]]})
    assert results.target is None
    assert results.verdict("ffa") == "no pair"
    assert "No target" in tables.markdown(results)
    assert math.isnan(results.final("fedit").mean)


def test_clients_are_measured_on_their_validation_rows_by_the_model_that_they_get(
    written: Callable[..., Results],
) -> None:
    more = [
        *((2, client, "accuracy", value) for client, value in (("0", 0.2), ("1", 0.5), ("2", 0.8))),
        *((2, client, "own_accuracy", value) for client, value in (("0", 0.6), ("1", 0.7), ("2", 0.8))),
    ]
    curve = [[0.1, 0.3, 0.5]]
    results = written({"fedit": curve, "local": curve}, more=more, validation=0.2)
    spread, own = results.clients("fedit"), results.clients("local")
    assert spread is not None
    assert own is not None
    assert (spread.worst, spread.middle, spread.best) == (0.2, 0.5, 0.8)
    assert spread.std == pytest.approx(math.sqrt(0.06))
    assert (own.metric, own.worst, own.best) == ("own_accuracy", 0.6, 0.8)
    assert tables.marked(results, "local") == "local*"
    assert "no global model" in tables.measure_note(results)


def test_without_validation_rows_the_training_loss_is_used(written: Callable[..., Results]) -> None:
    more = [(2, client, "train_loss", value) for client, value in (("0", 0.2), ("1", 0.5))]
    results = written({"fedit": [[0.1, 0.3, 0.5]]}, more=more)
    spread = results.clients("fedit")
    assert spread is not None
    assert (spread.metric, spread.worst, spread.best) == ("train_loss", 0.5, 0.2)
    assert "data.validation" in tables.clients_note(results)


def test_the_jump_at_a_boundary_is_the_loss_at_start_less_the_last_one_at_end() -> None:
    metrics = Metrics(
        clients={
            "loss_at_start": {"0": {1: 9.0, 2: 5.0, 4: 3.0}, "1": {2: 4.0}},
            "loss_at_end": {"0": {1: 2.0, 2: 1.0}, "1": {1: 3.5}},
        }
    )
    assert loss_jump(metrics) == {2: ((5 - 2) + (4 - 3.5)) / 2, 4: 2.0}
    assert client_mean(metrics, "loss_at_end") == {1: 2.75, 2: 1.0}


def test_a_band_leaves_out_what_is_not_finite() -> None:
    spread, mean = over_seeds([{0: 1.0, 1: math.nan}, {0: 3.0, 1: 5.0}])
    assert (dict(spread.low), dict(mean), dict(spread.high)) == (
        {0: 1.0, 1: 5.0},
        {0: 2.0, 1: 5.0},
        {0: 3.0, 1: 5.0},
    )


def test_tables_show_the_accuracy_of_always_predicting_the_most_frequent_class(
    written: Callable[..., Results],
) -> None:
    results = written({"fedit": [[0.1, 0.5, 0.6]]})
    (run,) = results.runs.values()
    matrix = {"round": 1, "classes": ["a", "b"], "matrix": [[2, 1], [0, 1]]}
    (run.folder / "confusion.json").write_text(json.dumps(matrix))

    note = "A model that always predicts the most frequent class has the accuracy 0.7500."
    assert note in tables.markdown(results)
