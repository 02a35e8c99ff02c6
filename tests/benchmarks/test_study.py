"""The study: nothing runs twice, all variants have as many trials, and the page agrees with the records."""

import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from benchmarks.study import __main__ as command
from benchmarks.study import driver, equal_bytes, page
from benchmarks.study import setting as setting_module
from benchmarks.study.driver import BusyError, Study
from benchmarks.study.figures import against_bytes, by_round, curves, overview
from benchmarks.study.findings import Findings, best_trial
from benchmarks.study.first_study import BEYOND, balance
from benchmarks.study.records import RESULTS, Records
from benchmarks.study.records import by_round as records_by_round
from benchmarks.study.repeat import Repetition, repeat
from benchmarks.study.setting import ORDER, SETTINGS, Setting, read_setting
from benchmarks.study.tables import quality, speed, summary_table
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.compare import FIRST_TUNING_SEED
from fedsmoothlora.experiments.display import Display
from fedsmoothlora.experiments.planned_runs import PlannedRun, write_outcome
from fedsmoothlora.experiments.variants import collect
from fedsmoothlora.reports.reading import Metrics

DOCS = Path(__file__).parents[2] / "docs"
SETTING_PAGES = DOCS / page.SETTINGS


def toy_setting(table: Mapping[str, Any], **changes: Any) -> Setting:
    values: dict[str, Any] = {
        "name": "toy",
        "about": "",
        "config": table,
        "common": {"training.rounds": 2, "training.steps": 3},
        "scenarios": {"only": {}},
        "variants": collect(["fedit", "paper: fedsmoothlora method.gamma=64"]),
        "grid": {"training.lr": [0.001, 0.05]},
        "trials": 2,
        "tuning_seeds": {"only": 2},
        "seeds": range(2),
        "metric": "accuracy",
        "ours": {"only": ["paper"]},
        "baselines": ["fedit"],
        "only": {},
        "pairs": (),
        "not_counted": (),
    }
    return Setting(**{**values, **changes})


def study(setting: Setting, folder: Path) -> Study:
    console = Console(file=io.StringIO())
    return Study(setting, "only", work=folder / "work", results=folder / "results", console=console)


def records(folder: Path) -> Records:
    return Records(folder / "results" / "toy" / "only")


def test_a_stopped_study_goes_on_and_runs_nothing_twice(
    toy_table: dict[str, Any], tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Records.add_run

    def killed(self: Records, record: dict[str, Any]) -> None:
        kept(self, record)
        if len(begun) == 5:  # four trials and the first run
            with (self.folder / "runs.jsonl").open("a") as file:
                file.write('{"variant": "fed')  # torn
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "add_run", killed)
    with pytest.raises(KeyboardInterrupt):
        study(toy_setting(toy_table), tmp_path).run()
    monkeypatch.setattr(Records, "add_run", kept)
    shutil.rmtree(tmp_path / "work")  # what is finished is in the records alone
    assert study(toy_setting(toy_table), tmp_path).run() == []
    # Two variants: two trials of two seeds each, and two runs.
    assert len(begun) == len(set(begun)) == 2 * (2 * 2 + 2)
    runs = records(tmp_path).runs()
    assert runs.keys() == {(label, seed) for label in ("fedit", "paper") for seed in (0, 1)}
    monkeypatch.delattr(driver.tuning, "prepare")  # of what is recorded, data may be gone
    assert study(toy_setting(toy_table), tmp_path).dry_run() == 0.0
    for run_ in runs.values():
        assert (run_["state"], len(run_["rounds"]["accuracy"])) == ("finished", 3)
    trials = records(tmp_path).trials()
    assert {seed for _, _, seed in trials} == {FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1}
    before = len(begun)
    assert study(toy_setting(toy_table), tmp_path).run() == []
    assert len(begun) == before


def test_trials_on_the_test_set_use_other_seeds_than_the_comparison(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    private = {
        **{"privacy.unit": "client", "privacy.noise_multiplier": 1.0, "privacy.delta": 1e-3},
        **{"privacy.clip_norm": 0.1, "training.rounds": 1, "training.steps": 1},
    }
    grid = {"privacy.clip_norm": [0.1, 0.2]}
    setting = toy_setting(
        toy_table,
        variants=collect(["fedit"]),
        common=private,
        grid={},
        grids={"only": grid},
        tunes_on_test=True,
        tuning_seeds={},
        seeds=range(1),
    )
    assert study(setting, tmp_path).run() == []
    found = records(tmp_path)
    assert [(number, seed) for _, number, seed in found.trials()] == [(1, 100), (2, 100)]
    assert all(one["score"] is not None for one in found.trials().values())
    assert list(found.runs()) == [("fedit", 0)]
    assert study(setting, tmp_path).dry_run() == 0.0


def test_a_setting_with_removed_options_is_refused_with_the_commit_that_has_them(
    toy_table: dict[str, Any], tmp_path: Path, begun: list[str]
) -> None:
    dropped = study(toy_setting(toy_table, dropped_after="abc123"), tmp_path)
    for command_ in (dropped.run, dropped.dry_run):
        with pytest.raises(ConfigError, match="git checkout abc123"):
            command_()
    assert not begun


def test_the_comparison_uses_the_best_trial(toy_table: dict[str, Any], tmp_path: Path) -> None:
    study(toy_setting(toy_table, tuning_seeds={}, seeds=range(1)), tmp_path).run()
    found = records(tmp_path)
    for label in ("fedit", "paper"):
        scores = {
            one["score"]: one["settings"] for (name, *_), one in found.trials().items() if name == label
        }
        assert found.runs()[label, 0]["settings"] == scores[max(scores)]


def test_another_grid_or_other_rounds_are_refused_once_a_trial_is_recorded(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    small = toy_setting(toy_table, tuning_seeds={}, seeds=range(1), variants=collect(["fedit"]))
    study(small, tmp_path).run()
    other = replace(small, grid={"training.lr": [0.001, 0.06]})
    with pytest.raises(ConfigError, match="the grid of recorded trials cannot change"):
        study(other, tmp_path).run()
    longer = replace(small, common={"training.rounds": 3, "training.steps": 3})
    with pytest.raises(ConfigError, match=r"were run with training\.rounds = 2, but the setting has 3"):
        study(longer, tmp_path).run()


def repeated(setting: Setting, count: int, folder: Path, only: Sequence[str] = ()) -> list[Repetition]:
    found, failed = repeat(
        setting,
        "only",
        count,
        scratch=folder / "scratch",
        here={},
        only=only,
        results=folder / "results",
        console=Console(file=io.StringIO()),
    )
    assert failed == []
    return found


def test_repeated_runs_are_compared_with_their_unchanged_records(
    toy_table: dict[str, Any], tmp_path: Path, begun: list[str]
) -> None:
    setting = toy_setting(toy_table, variants=collect(["fedit"]), tuning_seeds={}, seeds=range(2))
    study(setting, tmp_path).run()
    file = records(tmp_path).folder / "runs.jsonl"
    runs = list(records(tmp_path).runs().values())
    runs[1]["rounds"]["accuracy"][1] += 0.25
    runs[1]["rounds"]["loss"][2] *= 1.01
    file.write_text("".join(json.dumps(run) + "\n" for run in runs))
    before = file.read_bytes()
    del begun[:]
    found = repeated(setting, 2, tmp_path)
    assert [name.rpartition(": ")[2] for name in begun] == ["fedit, seed 0", "fedit, seed 1"]
    assert found[0] == Repetition("fedit, seed 0", 0.0, 0.0)
    assert (found[1].metric, found[1].loss) == pytest.approx((0.25, 0.01), rel=0.02)
    assert file.read_bytes() == before


def test_only_runs_of_the_named_variants_are_repeated(
    toy_table: dict[str, Any], tmp_path: Path, begun: list[str]
) -> None:
    setting = toy_setting(toy_table, variants=collect(["fedit", "ffa"]), tuning_seeds={}, seeds=range(2))
    study(setting, tmp_path).run()
    del begun[:]
    found = repeated(setting, 9, tmp_path, only=["ffa"])
    assert [name.rpartition(": ")[2] for name in begun] == ["ffa, seed 0", "ffa, seed 1"]
    assert found == [Repetition("ffa, seed 0", 0.0, 0.0), Repetition("ffa, seed 1", 0.0, 0.0)]


def test_a_repeated_run_that_ends_differently_is_said_to(
    toy_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = toy_setting(toy_table, variants=collect(["fedit"]), tuning_seeds={}, seeds=range(2))
    study(setting, tmp_path).run()
    file = records(tmp_path).folder / "runs.jsonl"
    runs = list(records(tmp_path).runs().values())
    del runs[0]["rounds"]["accuracy"][2]
    file.write_text("".join(json.dumps(run) + "\n" for run in runs))
    (found,) = repeated(setting, 1, tmp_path)
    assert str(found) == "fedit, seed 0: was finished after 1 rounds, and is now finished after 2 rounds"
    file.write_text(json.dumps(runs[1]) + "\n")  # one of two seeds is recorded: only it is run again
    monkeypatch.setattr(driver, "carry_out_all", fails)
    _, failed = repeat(
        *(setting, "only", 5),
        scratch=tmp_path / "again",
        here={},
        results=tmp_path / "results",
        console=Console(file=io.StringIO()),
    )
    assert [reason.rpartition("fedit, ")[2] for reason in failed] == ["seed 1: disk full"]
    assert repeat(setting, "other", 1, scratch=tmp_path, here={}, results=tmp_path) == ([], [])


def fails(planned_runs: Sequence[PlannedRun], jobs: int, display: Display) -> None:
    for one in planned_runs:
        write_outcome(one, "failed", "disk full")


@pytest.mark.parametrize(
    ("ended", "said"),
    [("failed", "disk full"), ("waiting", "interrupted; the same command continues it")],
)
def test_a_run_that_did_not_end_is_reported_and_not_recorded(
    toy_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str, said: str
) -> None:
    setting = toy_setting(toy_table, variants=collect(["fedit"]))
    # The process of a run may be stopped from outside.
    monkeypatch.setattr(driver, "carry_out_all", fails if ended == "failed" else lambda *_: None)
    failed = study(setting, tmp_path).run()
    assert len(failed) == 4
    assert all(reason.endswith(f": {said}") for reason in failed)
    assert records(tmp_path).trials() == {}


def test_a_variant_without_a_finished_trial_is_reported_and_not_planned(
    toy_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(planned_runs: Sequence[PlannedRun], jobs: int, display: Display) -> None:
        for one in planned_runs:
            write_outcome(one, "diverged", "no upload")

    setting = toy_setting(toy_table, variants=collect(["fedit"]))
    monkeypatch.setattr(driver, "carry_out_all", diverges)
    for _ in range(2):
        assert study(setting, tmp_path).run() == ["fedit: no trial finished; give it another label and grid"]
    assert study(setting, tmp_path).dry_run() == 0.0
    assert Findings(setting, "only", records(tmp_path)).lost == ["fedit"]


def test_a_trial_whose_loss_exploded_has_no_score(
    toy_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = driver.by_round

    def grown(metrics: Metrics, metric: str) -> dict[str, list[float | None]]:
        rounds = kept(metrics, metric)
        assert rounds["loss"][0] is not None
        return {**rounds, "loss": [rounds["loss"][0], 1.0, 10.1 * rounds["loss"][0]]}

    monkeypatch.setattr(driver, "by_round", grown)
    study(toy_setting(toy_table, variants=collect(["fedit"])), tmp_path).run()
    trials = list(records(tmp_path).trials().values())
    assert [(one["state"], one["score"]) for one in trials] == [("exploded", None)] * 4


def test_how_trials_are_scored_belongs_to_the_records(toy_table: dict[str, Any], tmp_path: Path) -> None:
    setting = toy_setting(toy_table, variants=collect(["fedit"]), seeds=range(1))
    study(setting, tmp_path).run()
    for change, key in (
        ({"metric": "loss"}, r"study\.metric = 'accuracy', but the setting has 'loss'"),
        ({"tuning_seeds": {}}, r"study\.tuning_seeds = 2, but the setting has 1"),
        ({"tunes_on_test": True}, r"study\.tunes_on_test = False"),
        ({"config": toy_table | {"seed": 5}}, r"config = "),
    ):
        with pytest.raises(ConfigError, match=key):
            study(replace(setting, **change), tmp_path).run()


def test_the_values_of_a_recipe_belong_to_the_records() -> None:
    setting = read_setting("low-bit")
    common = setting.in_common("partial")
    assert common["training.epochs"] == 1  # from the recipe
    assert common["participation.clients"] == 6  # from the scenario
    assert "description" not in common


def test_records_of_another_scenario_are_not_continued(tmp_path: Path) -> None:
    first = {"config": "quickstart", "training.rounds": 2, "partition.classes": (1, 2)}
    Records(tmp_path).belong_to(first)
    Records(tmp_path).belong_to(first)
    with pytest.raises(ConfigError, match=r"with training\.rounds = 2, but the setting has 3"):
        Records(tmp_path).belong_to({**first, "training.rounds": 3})
    with pytest.raises(ConfigError, match=r"with training\.steps = None, but the setting has 5"):
        Records(tmp_path).belong_to({**first, "training.steps": 5})


@pytest.mark.parametrize("name", ORDER)
def test_records_belong_to_the_current_setting(name: str) -> None:
    setting = read_setting(name)
    recorded = [one for one in setting.scenarios if (RESULTS / name / one).is_dir()]
    for scenario in recorded:
        assert (RESULTS / name / scenario / "scenario.json").is_file()
        Records(RESULTS / name / scenario).belong_to(setting.in_common(scenario))


def test_two_commands_do_not_work_on_one_scenario(toy_table: dict[str, Any], tmp_path: Path) -> None:
    setting = toy_setting(toy_table)
    with driver._alone(records(tmp_path).folder), pytest.raises(BusyError):
        study(setting, tmp_path).run()


def test_the_best_trial_has_the_best_mean_and_all_its_runs_finished() -> None:
    scores = {1: [0.9, None], 2: [0.5, 0.9], 3: [0.75, 0.75], 4: [0.7, 0.6]}
    trials = [
        {"trial": number, "score": score, "settings": {"number": number}}
        for number, found in scores.items()
        for score in found
    ]
    assert best_trial(trials, "accuracy") == {"number": 3}
    assert best_trial(trials, "loss") == {"number": 4}
    assert best_trial(trials[:2], "accuracy") is None


def test_the_chosen_settings_are_all_that_were_tuned_and_edges_are_marked(tmp_path: Path) -> None:
    found = written(tmp_path, toy_setting({}), {"fedit": [[0, 0.5], [0, 0.6]], "paper": [[0, 0.5], [0, 0.6]]})
    rates = [(0.1, 1.0), (0.1, 2.0), (0.2, 1.0), (0.2, 2.0), (0.3, 1.0), (0.3, 2.0)]
    for number, (lr, head_lr) in enumerate(rates, start=1):
        settings = {"method.name": "fedit", "training.lr": lr, "training.head_lr": head_lr}
        settings |= {"lora.client_ranks": [4, 2]}
        trial = {"variant": "fedit", "trial": number, "seed": 9, "settings": settings, "state": "finished"}
        found.trials["fedit", number, 9] = trial | {"score": 0.9 if (lr, head_lr) == (0.2, 2.0) else 0.1}
    row, other = quality(found).splitlines()[2:]
    assert row.startswith("| fedit | lr 0.2, head_lr 2! | 0.5500 ")
    assert other.startswith("| paper | – | 0.5500 ")


def written(
    folder: Path,
    setting: Setting,
    metrics: Mapping[str, list[list[float]]],
    jumps: Mapping[str, list[float]] | None = None,
) -> Findings:
    """Records by hand: a round costs 10 bytes up, 20 down and 2 seconds; jumps after the first, by seed."""
    for label, by_seed in metrics.items():
        for seed, values in enumerate(by_seed):
            spent = {"bytes_up": 10.0, "bytes_down": 20.0, "seconds_round": 2.0}
            rounds: dict[str, list[float | None]] = {setting.metric: list(values)}
            rounds |= {name: [None, *[value] * (len(values) - 1)] for name, value in spent.items()}
            if jumps:
                rounds |= {"loss_at_end": [None, 0.0], "loss_at_start": [None, 9.0, jumps[label][seed]]}
            record = {"variant": label, "seed": seed, "settings": {}, "state": "finished", "rounds": rounds}
            Records(folder).add_run(record)
    return Findings(setting, "only", Records(folder))


def test_speed_is_the_cost_of_reaching_the_baselines_final_metric_by_seed(tmp_path: Path) -> None:
    accuracies = {
        "fedit": [[0.1, 0.4, 0.5], [0.1, 0.7, 0.6]],
        "paper": [[0.1, 0.6, 0.7], [0.1, 0.3, 0.5]],
    }
    text = speed(written(tmp_path, toy_setting({}), accuracies))
    row = text.splitlines()[2]
    # fedit is at its own end after 2 and 1 rounds; paper at fedit's after 1, and with the second seed never.
    assert row == "| fedit | 1.5 rounds, 45 B, 3.0 s | 1.0 rounds, 30 B, 2.0 s (1 of 2 seeds) |"


def test_the_summary_says_better_only_where_the_interval_does(tmp_path: Path) -> None:
    surely = written(
        tmp_path / "a",
        toy_setting({}),
        {"fedit": [[0, 0.50], [0, 0.60]], "paper": [[0, 0.700], [0, 0.801]]},
    )
    perhaps = written(
        tmp_path / "b",
        toy_setting({}),
        {"fedit": [[0, 0.50], [0, 0.60]], "paper": [[0, 0.9], [0, 0.61]]},
    )
    lines = summary_table([surely, perhaps]).splitlines()[2:]
    assert lines == [
        "| toy: only | paper | fedit | – | – | – |",
        "| toy: only | paper | – | fedit | – | – |",
    ]


def test_the_balance_counts_verdicts_but_not_of_first_passes(tmp_path: Path) -> None:
    surely = {"fedit": [[0, 0.50], [0, 0.60]], "paper": [[0, 0.700], [0, 0.801]]}
    perhaps = {"fedit": [[0, 0.50], [0, 0.60]], "paper": [[0, 0.9], [0, 0.61]]}
    beyond = {
        "variants": collect(["fedit", "paper: fedsmoothlora", "zeta0-feedback: fedsmoothlora method.zeta=0"]),
        "ours": {"only": ["paper", "zeta0-feedback"]},
    }
    found = [
        written(tmp_path / "a", toy_setting({}), surely, {"fedit": [2.0, 1.0], "paper": [1.5, 0.49]}),
        written(tmp_path / "b", toy_setting({}), perhaps, {"fedit": [2.0, 1.0], "paper": [2.1, 0.9]}),
        written(tmp_path / "c", toy_setting({}, metric="loss"), surely),
        written(tmp_path / "d", toy_setting({}, **beyond), surely | {"zeta0-feedback": [[0, 0.3], [0, 0.4]]}),
        written(tmp_path / "e", toy_setting({}, not_counted=["only"]), surely),
    ]
    assert balance(found).splitlines()[2:] == [
        "| fedit | 2 | 1 | 1 | 0 | 0 | 1 |",
        "| fedit, by its loss jump | 1 | 1 | 0 | 0 | 0 | 0 |",
    ]


def test_seeds_that_diverged_do_not_favour_a_method(tmp_path: Path) -> None:
    values = {"fedit": [[0, 0.5]] * 3, "weights": [[0, 0.70], [0, 0.71], [0, 0.72]]}
    found = at_equal_bytes(tmp_path, values)
    assert found.verdict("weights", "fedit") == "better"
    found.runs["weights", 2]["state"] = "diverged"
    assert found.verdict("weights", "fedit") == "not all seeds"
    said = " ".join(equal_bytes.verdict([found]).split())
    assert "in 0 of 1 scenarios on whole models" in said
    assert "in 0 of 0 comparisons" in said
    assert summary_table([found]).splitlines()[2].endswith("| weights | – | – | – | fedit |")
    (row,) = (line for line in quality(found).splitlines() if line.startswith("| weights"))
    assert row.endswith("| not all seeds | 0 of 0 | 1 of 3 |")


def test_runs_that_exploded_are_counted(tmp_path: Path) -> None:
    values = {"fedit": [[0, 0.5]] * 2, "weights": [[0, 0.70], [0, 0.71]]}
    found = at_equal_bytes(tmp_path, values)
    for (label, seed), run in found.runs.items():
        run["rounds"]["loss"] = [2.0, 20.1 if (label, seed) == ("fedit", 1) else 20.0]
    row, other = quality(found).splitlines()[2:]
    assert row.endswith("| 1 of 2 |")
    assert other.endswith("| 0 of 2 |")
    assert "counts as diverged" in page.section(found)


def test_a_scenario_in_which_no_run_of_fedit_finished_is_left_out(tmp_path: Path) -> None:
    found = at_equal_bytes(tmp_path, {"fedit": [[0, 0.5]] * 2, "weights": [[0, 0.70], [0, 0.71]]})
    for seed in (0, 1):
        found.runs["fedit", seed]["state"] = "diverged"
    assert equal_bytes.of_this_study([found]) == []


def test_the_curve_of_a_method_goes_on_after_a_run_that_diverged(tmp_path: Path) -> None:
    found = at_equal_bytes(tmp_path, {"fedit": [[0, 0.5, 0.6], [0, 0.2]], "weights": [[0, 0.7, 0.8]] * 2})
    lines = {one.get_label(): list(one.get_ydata()) for one in curves(found).axes[0].lines}
    assert lines["fedit"] == pytest.approx([0, 0.35, 0.6])


def test_a_run_that_diverged_reaches_nothing(tmp_path: Path) -> None:
    found = at_equal_bytes(tmp_path, {"fedit": [[0, 0.5]] * 2, "weights": [[0, 0.70], [0, 0.71]]})
    found.runs["weights", 1]["state"] = "diverged"
    row = speed(found).splitlines()[2]
    assert row == "| fedit | 1.0 rounds, 30 B, 2.0 s | 1.0 rounds, 30 B, 2.0 s (1 of 2 seeds) |"
    found.runs["fedit", 1]["state"] = "diverged"  # then there is one seed to reach
    row = speed(found).splitlines()[2]
    assert row == "| fedit | 1.0 rounds, 30 B, 2.0 s | 1.0 rounds, 30 B, 2.0 s |"


def test_a_variant_with_runs_left_is_not_reported(tmp_path: Path) -> None:
    found = written(tmp_path, toy_setting({}), {"fedit": [[0, 0.5], [0, 0.6]], "paper": [[0, 0.9]]})
    assert (found.labels, found.left) == (["fedit"], ["paper"])


def test_a_jump_is_between_the_end_of_a_round_and_the_start_of_the_next(tmp_path: Path) -> None:
    found = Findings(toy_setting({}), "only", Records(tmp_path))
    rounds = {"loss_at_start": [None, 5.0, 2.0, 1.5], "loss_at_end": [None, 1.0, 1.2, 0.1]}
    assert found.loss_jump({"rounds": rounds}) == pytest.approx(((2.0 - 1.0) + (1.5 - 1.2)) / 2)
    assert found.loss_jump({"rounds": {}}) is None


def test_means_over_clients_give_no_jump_where_only_some_take_part(tmp_path: Path) -> None:
    setting = toy_setting({}, scenarios={"only": {"participation.clients": 2}})
    found = Findings(setting, "only", Records(tmp_path))
    rounds = {"loss_at_start": [None, 5.0, 2.0], "loss_at_end": [None, 1.0, 1.2]}
    assert found.loss_jump({"rounds": rounds}) is None
    assert found.loss_jump({"rounds": {**rounds, "loss_jump": [None, None, 0.25]}}) == 0.25


def test_the_recorded_jump_is_that_of_each_client() -> None:
    """Client 1 misses the second round, so its loss after the first is compared with the third."""
    clients = {
        "loss_at_start": {"0": {1: 9.0, 2: 5.0, 3: 4.0}, "1": {1: 9.0, 3: 2.0}},
        "loss_at_end": {"0": {1: 4.0, 2: 3.5, 3: 1.0}, "1": {1: 1.0, 3: 1.0}},
    }
    metrics = Metrics(server={"score": {0: 0.1, 3: 0.5}}, clients=clients)
    kept = records_by_round(metrics, "score")
    assert kept["loss_jump"] == [None, None, 1.0, ((4.0 - 3.5) + (2.0 - 1.0)) / 2]
    assert kept["score"] == [0.1, None, None, 0.5]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[study]", "[study", "Expected"),
        ("trials = ", "tries = ", "'trials' is missing"),
        ("[tuning_seeds]\n", "[tuning_seeds]\nidd = 2\n", "tuning_seeds has idd"),
        ('"weights", "low-bit"],', '"weights", "low-bits"],', "pairs have low-bits"),
        ("[scenario.iid]\n", "[scenario.iid]\nseed = 3\n", r"scenario\.iid\.seed"),
    ],
)
def test_a_setting_with_names_that_would_be_ignored_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    text = (SETTINGS / "low-bit.toml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "low-bit.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr(setting_module, "SETTINGS", tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_setting("low-bit")


def test_every_setting_has_its_place() -> None:
    assert sorted(ORDER) == sorted(file.stem for file in SETTINGS.glob("*.toml"))


@pytest.mark.parametrize("name", ORDER)
def test_a_setting_is_valid_and_has_the_same_number_of_trials_for_every_variant(name: str) -> None:
    setting = read_setting(name)
    assert setting.ours.keys() == setting.scenarios.keys()
    assert set(setting.not_counted) <= setting.scenarios.keys()
    assert {label for pair in setting.pairs for label in pair} <= {one.label for one in setting.variants}
    for scenario in setting.scenarios:
        tried = setting.trials_of(scenario)
        for points in tried.values():
            assert len({tuple(point.items()) for point in points}) == setting.trials
        labels = [one.label for one in setting.variants_of(scenario)]
        assert {*setting.ours[scenario], *setting.only.get(scenario, ())} <= set(labels)
        assert set(labels) & set(setting.baselines)
        for variant in setting.variants_of(scenario) if not setting.dropped_after else ():
            for point in tried[variant.label]:
                overrides = {**setting.overrides(scenario), **variant.overrides, **point}
                config = read(setting.config, overrides)
                assert config.training.count_calibration
                assert config.machine.threads == 1


def test_the_overview_has_what_is_ahead_on_the_right(tmp_path: Path) -> None:
    values = {"fedit": [[0, 0.50], [0, 0.60]], "paper": [[0, 0.75], [0, 0.81]]}
    accurate = written(tmp_path / "accuracy", toy_setting({}), values)
    lossy = written(tmp_path / "loss", toy_setting({}, metric="loss"), values)
    figure = overview([accurate, lossy])
    figure.canvas.draw()
    dots = [axes.containers[0].lines[0].get_xdata()[0] for axes in figure.axes]
    assert dots == pytest.approx([0.23, -0.23])


def at_equal_bytes(tmp_path: Path, metrics: Mapping[str, list[list[float]]], **bytes_up: float) -> Findings:
    """A scenario of the second study; a method uploads 10 bytes a round unless said otherwise."""
    variants = {
        "fedit": "fedit",
        "flora": "flora",
        "full": "full",
        "weights": "weights: fedsmoothlora method.preset=weights",
        "low-bit": "low-bit: fedsmoothlora method.preset=low_bit",
    }
    setting = toy_setting(
        {},
        variants=collect([variants[label] for label in metrics]),
        seeds=range(len(metrics["fedit"])),
        ours={"only": [label for label in equal_bytes.OURS if label in metrics]},
        baselines=[label for label in metrics if label not in equal_bytes.OURS],
        equal_bytes=True,
    )
    written(tmp_path, setting, metrics)
    runs = list(Records(tmp_path).runs().values())
    for run in runs:
        count = len(run["rounds"]["bytes_up"]) - 1
        run["rounds"]["bytes_up"] = [None, *[bytes_up.get(run["variant"], 10.0)] * count]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    return Findings(setting, "only", Records(tmp_path))


def test_methods_with_longer_uploads_are_not_at_equal_bytes(tmp_path: Path) -> None:
    same = [[0, 0.5], [0, 0.5]]
    labels = dict.fromkeys(("fedit", "flora", "full", "weights"), same)
    found = at_equal_bytes(tmp_path / "a", labels, flora=10.3)
    assert equal_bytes.lora_baselines(found, at_its_bytes=True) == ["fedit", "flora"]
    longer = at_equal_bytes(tmp_path / "b", labels, flora=10.4)
    assert equal_bytes.lora_baselines(longer, at_its_bytes=True) == ["fedit"]
    assert equal_bytes.lora_baselines(longer) == ["fedit", "flora"]


def test_the_second_summary_says_where_ours_are_ahead_and_level(tmp_path: Path) -> None:
    found = at_equal_bytes(
        tmp_path,
        {
            "fedit": [[0, 0.50], [0, 0.60], [0, 0.55]],
            "flora": [[0, 0.88], [0, 0.79], [0, 0.85]],
            "full": [[0, 0.800], [0, 0.801], [0, 0.810]],
            "weights": [[0, 0.801], [0, 0.800], [0, 0.811]],
        },
        flora=40.0,
        full=100.0,
    )
    said = " ".join(equal_bytes.verdict([found]).split())
    assert "with uploads of FedIT's size in 1 of 1 scenarios on whole models, and of those" in said
    assert "that send more in 0 of 1 scenarios on whole models. Against full" in said
    assert "Against full fine-tuning: level (within 0.01) in 1." in said
    (row,) = equal_bytes.differences([found]).splitlines()[2:]
    assert row.endswith("| – | – | `weights`: 1 of 2 (`flora`) |")
    (row,) = equal_bytes.quality([found]).splitlines()[2:]
    assert row.endswith("| – | 0.8037 ± 0.0055 (4) |")  # 120 by 30 bytes a round
    assert "| 0.8400 ± 0.0458 `flora` (2) |" in row  # 60 by 30
    (row,) = equal_bytes.cost([found]).splitlines()[2:]
    ours = "1.0 rounds, 30 B, 2.0 s"
    assert row.endswith(f"| {ours} | {ours} | – | 1.0 rounds, 120 B, 2.0 s |")


def test_the_second_summary_counts_whole_models_and_frozen_features_apart(tmp_path: Path) -> None:
    ahead = {"fedit": [[0, 0.5], [0, 0.6]], "weights": [[0, 0.70], [0, 0.81]]}
    behind = {"fedit": ahead["weights"], "weights": ahead["fedit"]}
    whole = at_equal_bytes(tmp_path / "whole", behind)
    features = at_equal_bytes(tmp_path / "features", ahead)
    features.setting = replace(features.setting, config=equal_bytes.FROZEN_FEATURES)
    said = " ".join(equal_bytes.verdict([whole, features]).split())
    both = "in 0 of 1 scenarios on whole models and 1 of 1 scenarios on frozen features"
    assert f"{both}, including those that send more" in said
    assert "they are behind in 1 and ahead in 1" in said


def test_a_method_of_which_no_run_finished_is_no_best_one(tmp_path: Path) -> None:
    values = {"fedit": [[0, 0.5], [0, 0.6]], "flora": [[0, 0.9], [0, 0.9]], "weights": [[0, 0.7], [0, 0.81]]}
    found = at_equal_bytes(tmp_path, values)
    for seed in (0, 1):
        found.runs["flora", seed]["state"] = "diverged"
    (row,) = equal_bytes.quality([found]).splitlines()[2:]
    assert "`flora`" not in row
    (row,) = equal_bytes.differences([found]).splitlines()[2:]
    assert row.endswith("| `weights`: 1 of 2 (`flora`) |")
    said = " ".join(equal_bytes.verdict([found]).split())
    assert "in 1 of 1 scenarios on whole models, and of those that send more in 0 of 1" in said
    against_bytes([found], equal_bytes.OURS)


def test_differences_that_many_comparisons_explain_do_not_remain(tmp_path: Path) -> None:
    noise, barely = [-0.1, 0.0, 0.2], [0.03 + d for d in (-0.0104, 0, 0.0104)]
    ours = [0.9, 0.9, 0.9]
    found = at_equal_bytes(
        tmp_path,
        {
            "fedit": [[0, a - b] for a, b in zip(ours, noise, strict=True)],
            "flora": [[0, a - b] for a, b in zip(ours, barely, strict=True)],
            "weights": [[0, a] for a in ours],
        },
    )
    t = 0.03 / (0.0104 / 3**0.5)
    # The distribution function of Student's t with 2 degrees of freedom in closed form.
    assert equal_bytes.p_value(found, "weights", "flora") == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    said = " ".join(equal_bytes.verdict([found]).split())
    assert "in 1 of 2 comparisons" in said
    assert "behind in 0 and ahead in 1" in said
    assert "0 remain" in said  # its p of 0.04 is doubled
    assert equal_bytes.p_value(found, "weights", "weights") == 1.0


def test_the_picture_has_every_method_at_its_bytes_and_its_mean(tmp_path: Path) -> None:
    values = {"fedit": [[0, 0.50], [0, 0.60]], "weights": [[0, 0.75], [0, 0.81]]}
    found = at_equal_bytes(tmp_path, values, fedit=10.0, weights=30.0)
    figure = against_bytes([found], equal_bytes.OURS)
    figure.canvas.draw()
    dots = [tuple(float(x[0]) for x in one.lines[0].get_data()) for one in figure.axes[0].containers]
    assert dots == [pytest.approx((30.0, 0.55)), pytest.approx((50.0, 0.78))]


def test_the_picture_by_round_has_the_means_of_the_methods_that_matter(tmp_path: Path) -> None:
    values = {
        "fedit": [[0, 0.50, 0.55], [0, 0.60, 0.65]],
        "flora": [[0, 0.70, 0.75], [0, 0.70, 0.75]],
        "weights": [[0, 0.75, 0.8], [0, 0.81, 0.9]],
        "full": [[0, 0.75, 0.8], [0, 0.85, 0.9]],
    }
    found = at_equal_bytes(tmp_path, values, fedit=10.0, flora=30.0)
    figure = by_round([found], equal_bytes.shown)
    lines = {one.get_label(): list(one.get_ydata()) for one in figure.axes[0].lines}
    assert list(lines) == ["weights", "fedit", "full"]  # flora's uploads are longer
    assert lines["weights"] == pytest.approx([0, 0.78, 0.85])
    assert [axes.get_visible() for axes in figure.axes] == [True, False]


@pytest.fixture(scope="module")
def findings() -> list[Findings]:
    return page.all_findings()


def test_every_link_and_picture_of_the_pages_exists() -> None:
    for file in (DOCS / page.SECOND, DOCS / page.FIRST, *SETTING_PAGES.glob("*.md")):
        targets = re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8"))
        assert targets
        assert [name for name in targets if not (file.parent / name).is_file()] == [], file


def test_the_pages_match_the_records(findings: list[Findings], tmp_path: Path) -> None:
    for name, blocks in page.summaries(findings).items():
        copy = Path(shutil.copy(DOCS / name, tmp_path))
        for block, text in blocks.items():
            page.write_between(copy, block, text)
        assert copy.read_text(encoding="utf-8") == (DOCS / name).read_text(encoding="utf-8")
    written = {file.name: file.read_text(encoding="utf-8") for file in SETTING_PAGES.iterdir()}
    assert written == page.pages(findings)


@pytest.mark.parametrize("name", [page.SECOND, page.FIRST])
def test_the_pages_are_short_and_their_prose_has_no_number_of_its_own(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    for not_prose in (r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"arXiv [\d.]+", "SmolLM2-135M", "zeta 0"):
        prose = re.sub(not_prose, "", prose, flags=re.DOTALL)
    assert re.findall(r".*\d.*", prose) == []


def test_the_advice_of_the_page_holds_in_the_records(findings: list[Findings]) -> None:
    by_name = {(one.setting.name, one.scenario): one for one in findings}
    for found in findings:
        if found.is_counted and BEYOND in found.labels:
            others = [other for other in found.baselines() if other != "full"]
            assert "worse" not in [found.verdict(BEYOND, other) for other in others]
    verdicts = {
        ("screen", "iid"): "no difference seen",
        ("asdiv", "head-frozen"): "better",
        ("fashion", "iid-lora"): "worse",
        ("fashion", "iid-full"): "no difference seen",
    }
    for name, expected in verdicts.items():
        assert by_name[name].verdict("paper", BEYOND) == expected
    assert by_name["partial", "ten-of-fifty"].verdict("staleness-0", "staleness-1") == "better"
    reuters = by_name["reuters", "head-lora"]
    means = {label: fmean(value or 0.0 for value in reuters.finals(label)) for label in ("cosine", BEYOND)}
    assert means["cosine"] > means[BEYOND]
    screen = by_name["screen", "dirichlet"]
    assert screen.verdict("paper", "ga-off") == "no difference seen"
    assert screen.verdict(BEYOND, "zeta0-ga-off-feedback") == "better"


def test_the_command_prints_the_summary_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [Path(shutil.copy(DOCS / name, tmp_path)) for name in (page.SECOND, page.FIRST)]
    monkeypatch.setattr(page, "write_figure", lambda figure, file: None)
    monkeypatch.setattr("sys.argv", ["study", "--tables", "--docs", str(tmp_path)])
    assert command.main() == 0
    said = capsys.readouterr().out
    for copy in copies:
        blocks = re.findall(r"<!-- (?:\w+) -->\n(.*?)\n<!--", copy.read_text("utf-8"), flags=re.DOTALL)
        assert blocks
        assert [block for block in blocks if block not in said] == []
    assert {file.name for file in (tmp_path / "results").iterdir()} >= {"all.md", "screen.md"}


@pytest.mark.parametrize(
    ("option", "name", "has"),
    [
        ("--scenario", "nothing", "screen"),
        ("--variant", "nothing", "screen"),
        ("--variant", "zeta0", "bbc"),
    ],
)
def test_a_name_that_a_setting_does_not_have_is_refused_before_any_is_run(
    option: str, name: str, has: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "run", lambda _: pytest.fail("was run"))
    monkeypatch.setattr("sys.argv", ["study", "--setting", "screen", "--setting", "bbc", option, name])
    with pytest.raises(ConfigError, match=f"{option} {name}: {has} has"):
        command.main()


def test_a_variant_that_a_scenario_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["study", "--setting", "screen", "--scenario", "iid", "--variant", "ffa"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(ConfigError, match="--variant ffa: screen: iid has fedit, "):
        command.main()


@pytest.mark.parametrize("option", ["--jobs", "--repeat"])
def test_less_than_one_is_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["study", option, "0"])
    with pytest.raises(SystemExit):
        command.main()
    assert f"argument {option}: must be at least 1" in capsys.readouterr().err


def test_a_scenario_that_is_busy_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(_: Study) -> list[str]:
        raise BusyError("iid: another command works on it")

    monkeypatch.setattr(Study, "run", busy)
    monkeypatch.setattr(command, "write_pages", lambda docs: {})
    monkeypatch.setattr("sys.argv", ["study", "--setting", "screen", "--scenario", "iid"])
    assert command.main() == 1
    assert "failed: iid: another command works on it; skipped" in capsys.readouterr().out


def test_keys_of_a_setting_cannot_be_set_by_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "run", lambda _: pytest.fail("was run"))
    monkeypatch.setattr("sys.argv", ["study", "--setting", "bbc", "--set", "training.rounds=1"])
    with pytest.raises(ConfigError, match=r"--set training\.rounds: the setting decides that"):
        command.main()


def test_a_page_that_is_missing_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DOCS / page.SECOND, tmp_path)
    monkeypatch.setattr(Study, "run", lambda _: pytest.fail("was run"))
    monkeypatch.setattr("sys.argv", ["study", "--setting", "screen", "--docs", str(tmp_path)])
    with pytest.raises(SystemExit):
        command.main()
    said = " ".join(capsys.readouterr().err.split())
    assert f"--docs {tmp_path}: there is no {page.FIRST}; copy it from docs there" in said
