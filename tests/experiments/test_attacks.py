"""Attacks: every one changes what it says and nothing else, and a small suite from end to end."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import textures
from fedsmoothlora import tasks
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.experiments import attacks
from fedsmoothlora.experiments.attack_suite.forging import ForgingEngine, norm_of
from fedsmoothlora.experiments.attack_suite.poisoning import StampedImages, Trigger
from fedsmoothlora.experiments.attack_suite.results import AttackResults, Pair
from fedsmoothlora.experiments.attack_suite.suite import attack, dry_run, prepare
from fedsmoothlora.experiments.attack_suite.threat import Threat, build_threatened
from fedsmoothlora.experiments.attacks import DataAttack
from fedsmoothlora.experiments.display import PlannedRunCallback
from fedsmoothlora.experiments.intervals import Difference
from fedsmoothlora.experiments.planned_runs import PlannedRun, carry_out, from_message, to_message
from fedsmoothlora.federation.engines.batched import Batched
from fedsmoothlora.federation.engines.processes import Processes
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.runs.planning import Plan, plan
from fedsmoothlora.runs.session import run


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def replies_of(simulation: Simulation) -> dict[str, Reply]:
    answers = simulation.engine.train(
        simulation, list(simulation.clients), simulation.server.message, Callback()
    )
    return {answer.client: answer.reply for answer in answers}


@pytest.fixture
def planned(toy_table: dict[str, Any]) -> Plan:
    toy_table["training"] |= {"rounds": 1, "steps": 1}
    toy_table["partition"] = {"kind": "iid", "clients": 3}
    return plan(read(toy_table))


def threatened(planned: Plan, text: str) -> Simulation:
    found = attacks.parsed(text)
    measured = (found,) if isinstance(found, DataAttack) else ()
    return build_threatened(planned, Threat(malicious=1, attack=found, measured=measured))


@pytest.mark.parametrize(("key", "kind"), [("jobs", Processes), ("batch_clients", Batched)])
def test_clients_under_attack_train_as_the_machine_says(
    toy_table: dict[str, Any], key: str, kind: type
) -> None:
    engine = threatened(plan(read(toy_table, {f"machine.{key}": 2})), "sign_flip").engine
    assert isinstance(engine, ForgingEngine)
    assert isinstance(engine.engine, kind)


def dense(value: Any) -> torch.Tensor:
    return value.dense() if isinstance(value, LowRank) else value


@pytest.mark.parametrize("method", ["fedsmoothlora", "fedit", "full"])
@pytest.mark.parametrize(("text", "factor"), [("sign_flip:strength=2", -2.0), ("scale:factor=3", 3.0)])
def test_an_upload_attack_multiplies_the_upload_and_the_change_of_the_head(
    toy_table: dict[str, Any], method: str, text: str, factor: float
) -> None:
    toy_table["training"] |= {"rounds": 1, "steps": 1}
    planned = plan(read(toy_table | {"method": {"name": method}}))
    honest = replies_of(
        build_threatened(planned, Threat(malicious=1, attack=attacks.parsed("scale:factor=1")))
    )
    forged_simulation = threatened(planned, text)
    head = dict(forged_simulation.server.head)
    forged = replies_of(forged_simulation)
    first, *others = honest
    for client in others:
        for name, value in honest[client].sent.items():
            assert torch.equal(dense(value), dense(forged[client].sent[name]))
    for name, value in honest[first].sent.items():
        assert type(forged[first].sent[name]) is type(value)
        torch.testing.assert_close(dense(forged[first].sent[name]), factor * dense(value))
    assert honest[first].head
    for name, value in honest[first].head.items():
        torch.testing.assert_close(
            forged[first].head[name] - head[name], factor * (value - head[name]), atol=1e-6, rtol=1e-4
        )
    assert forged[first].samples == honest[first].samples
    assert replies_keep_their_dtypes(honest[first], forged[first])


def replies_keep_their_dtypes(honest: Reply, forged: Reply) -> bool:
    return all(forged.sent[name].dtype == value.dtype for name, value in honest.sent.items())


def test_one_layer_keeps_the_norm_of_the_upload_and_reverses_its_largest_layer(planned: Plan) -> None:
    honest = replies_of(threatened(planned, "scale:factor=1"))["0"]
    forged = replies_of(threatened(planned, "one_layer:strength=1"))["0"]
    norms = {name: norm_of(value) for name, value in honest.sent.items()}
    largest = max(norms, key=lambda name: norms[name])
    found = {name: norm_of(value) for name, value in forged.sent.items()}
    assert found[largest] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-5)
    assert all(norm == 0 for name, norm in found.items() if name != largest)
    product = (dense(honest.sent[largest]) * dense(forged.sent[largest])).sum()
    assert product < 0


def test_label_flip_relabels_the_rows_of_one_class_at_the_malicious_client_only(planned: Plan) -> None:
    simulation = threatened(planned, "label_flip:source=plain:target=rows")
    for client, rows in simulation.clients.items():
        honest = torch.from_numpy(planned.train.labels[planned.training_rows(client)])
        expected = torch.where(honest == 3, 0, honest) if client == "0" else honest
        batch = rows.batch(range(len(rows)))
        assert torch.equal(batch["labels"], expected)
    assert (honest == 3).any()


def test_label_flip_takes_the_most_frequent_class_unless_told(planned: Plan) -> None:
    setting = Threat(malicious=1).setting(planned)
    found = attacks.parsed("label_flip")
    source, target = found.flipped(setting)  # type: ignore[attr-defined]
    counts = np.bincount(planned.train.labels[planned.training_rows("0")], minlength=4)
    assert (source, target) == (counts.argmax(), (counts.argmax() + 1) % 4)
    with pytest.raises(ConfigError, match="both 'plain'"):
        attacks.parsed("label_flip:source=plain:target=plain").flipped(setting)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no class 'dog'; there are rows, columns"):
        attacks.parsed("label_flip:source=dog").flipped(setting)  # type: ignore[attr-defined]


def test_backdoor_stamps_a_share_of_the_rows_of_the_malicious_client(planned: Plan) -> None:
    simulation = threatened(planned, "backdoor:target=checks:share=0.25:patch=0.25")
    honest = planned.task_data.train
    own = planned.training_rows("0")
    before = honest.batch(own.tolist())
    after = simulation.clients["0"].batch(range(len(own)))
    differs = (before["pixel_values"] != after["pixel_values"]).flatten(1)
    stamped = differs.any(dim=1)
    assert int(stamped.sum()) == round(0.25 * len(own))
    outside = (before["pixel_values"] != after["pixel_values"]).clone()
    outside[..., -7:, -7:] = False
    assert not outside.any()
    patches = after["pixel_values"][stamped][..., -7:, -7:]
    assert (patches.amax(dim=(-1, -2)) == patches.amin(dim=(-1, -2))).all()
    assert (after["labels"][stamped] == 2).all()
    assert torch.equal(after["labels"][~stamped], before["labels"][~stamped])
    for client in ("1", "2"):
        rows = simulation.clients[client]
        same = honest.batch(planned.training_rows(client).tolist())
        assert torch.equal(rows.batch(range(len(rows)))["pixel_values"], same["pixel_values"])


def test_the_success_of_a_backdoor_is_measured_on_triggered_rows_of_other_classes(planned: Plan) -> None:
    found = attacks.parsed("backdoor:target=columns")
    assert isinstance(found, DataAttack)
    success = found.success(Threat(malicious=1).setting(planned))
    assert success is not None
    assert (success.target, len(success.examples)) == (1, 48)
    batch = success.examples.batch(range(48))
    assert not (batch["labels"] == 1).any()
    patches = batch["pixel_values"][..., -6:, -6:]
    assert (patches.amax(dim=(-1, -2)) == patches.amin(dim=(-1, -2))).all()


def test_the_trigger_of_a_text_is_its_first_word() -> None:
    texts = Texts({"text": ["one", "two"]}, np.array([0, 1]), ("a", "b"))
    stamped = Trigger(patch=0.2, word="cf").stamped(texts, np.array([True, False]), np.array([1, 1]))
    assert isinstance(stamped, Texts)
    assert stamped.columns["text"] == ["cf one", "two"]
    assert stamped.labels.tolist() == [1, 1]


def test_stamped_images_can_be_taken_apart() -> None:
    images = textures(8, 0)
    stamped = StampedImages(
        images=images, chosen=np.arange(8) % 2 == 0, labels=np.zeros(8, np.int64), patch=0.1
    )
    part = stamped.take(np.array([3, 4]))
    assert (len(part), part.chosen.tolist(), part.classes) == (2, [False, True], images.classes)


def test_the_attack_free_run_leaves_the_malicious_clients_out(planned: Plan) -> None:
    simulation = build_threatened(planned, Threat(malicious=1))
    assert list(simulation.clients) == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sign_flp", "did you mean 'sign_flip'"),
        ("scale:factor=0", "scale.factor = 0"),
        ("scale:strength=2", "scale.strength: unknown key"),
        ("backdoor:share=1.5", "backdoor.share = 1.5"),
    ],
)
def test_a_wrong_attack_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attacks.parsed(text)


def test_names_of_classes_may_look_like_numbers() -> None:
    found = attacks.parsed("backdoor:target=3:share=1")
    assert found.table() == {"kind": "backdoor", "target": "3", "share": 1.0, "patch": 0.2, "word": "cf"}
    assert found.label == "backdoor-target=3-share=1.0"


@pytest.mark.parametrize("name", attacks.names())
def test_a_planned_run_with_its_threat_goes_to_a_worker_and_back(
    toy_table: dict[str, Any], tmp_path: Path, name: str
) -> None:
    found = attacks.parsed(name)
    measured = (found,) if isinstance(found, DataAttack) else ()
    planned_run = PlannedRun(
        "x", read(toy_table), tmp_path, Threat(malicious=2, attack=found, measured=measured)
    )
    assert from_message(to_message(planned_run)).threat == planned_run.threat


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


@pytest.fixture
def table(toy_table: dict[str, Any]) -> dict[str, Any]:
    toy_table["training"] |= {"rounds": 1, "steps": 1}
    toy_table["partition"] = {"kind": "iid", "clients": 4}
    return toy_table


@pytest.mark.slow
@pytest.mark.report
def test_a_suite_writes_tables_and_a_page_and_refuses_what_does_not_fit(
    table: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    names = ["scale:factor=20", "backdoor"]
    done = attack(table, names, out=out, defences=["mean", "multi_krum", "median"], seeds=1, console=silent())
    rows = {(row["attack"], row["defence"]): row for row in rows_of(out / "attacks.csv")}
    assert len(rows) == 9
    assert not done.failed
    assert "needs 5 uploads" in rows["backdoor", "multi_krum"]["refused_reason"]
    free, hit = rows["none", "mean"], rows["scale-factor=20.0", "mean"]
    assert (float(free["movement"]), free["uploads_refused"]) == (1.0, "0")
    assert (hit["finished"], hit["uploads_refused"]) == ("1", "1")
    assert 0 <= float(rows["backdoor", "mean"]["attack_success"]) <= 1
    assert rows["backdoor", "mean"]["attack_success_without_attack"] != ""
    # The refused upload was that of the client which the attack-free run leaves out.
    assert hit["mean"] == free["mean"]
    page = done.page.read_text(encoding="utf-8")
    markdown = (out / "attacks.md").read_text(encoding="utf-8")
    for text in (page, markdown):
        assert "needs 5 uploads" in text
        assert "backdoor: best is" in text
        assert "1 of 4 clients is malicious (0)" in text


@pytest.mark.slow
def test_a_suite_is_continued_and_its_runs_are_not_resumed_without_their_attack(
    table: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    attack(table, ["sign_flip"], out=out, defences=["mean"], seeds=1, console=silent())
    folder = out / "runs" / "sign_flip+mean" / "seed-0"
    before = (folder / "metrics.jsonl").read_bytes()
    recorded = json.loads((folder / "inputs.json").read_text())
    assert recorded["attack"]["attack"] == {"kind": "sign_flip", "strength": 5.0}
    with pytest.raises(ConfigError, match="without its attack"):
        run(resume=folder, console=silent())
    attack(table, ["sign_flip"], out=out, defences=["mean", "clip"], seeds=1, console=silent())
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert (out / "runs" / "sign_flip+clip" / "seed-0").is_dir()
    with pytest.raises(ConfigError, match=r"training\.lr"):
        attack(table, ["sign_flip"], {"training.lr": 0.5}, out=out, seeds=1, console=silent())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"malicious": 2}, "more than half of the clients must be honest"),
        ({"defences": ["krum"]}, "unknown defence 'krum'"),
        ({"attacks": ["backdoor:target=dog"]}, "no class 'dog'"),
        ({"attacks": ["backdoor:target=a/b", "backdoor:target=a_b"]}, "same folder, backdoor-target=a_b"),
        ({"seeds": 0}, "must be at least 1"),
        ({"overrides": {"uploads.clip_to_median": True}}, "--defences sets these keys"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    table: dict[str, Any], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        attack(table, **{"attacks": ["scale"], "out": tmp_path / "out", "console": silent(), **options})
    assert not (tmp_path / "out").exists()


def test_a_dry_run_forecasts_each_defence(table: dict[str, Any], tmp_path: Path) -> None:
    found = dry_run(
        table, ["scale", "sign_flip"], out=tmp_path / "out", defences=["mean"], seeds=1, console=silent()
    )
    assert {name: one.runs for name, one in found.items()} == {"mean": 3}
    assert not (tmp_path / "out").exists()


def test_an_attack_changes_the_run_and_its_folder_says_so(table: dict[str, Any], tmp_path: Path) -> None:
    found = attacks.parsed("sign_flip")
    for threat in (Threat(malicious=1), Threat(malicious=1, attack=found)):
        name = "free" if threat.attack is None else "hit"
        planned_run = PlannedRun(name, read(table), tmp_path / name, threat)
        assert carry_out(planned_run, PlannedRunCallback()) == "finished"
    recorded = json.loads((tmp_path / "hit" / "inputs.json").read_text())
    assert recorded["attack"]["attack"] == {"kind": "sign_flip", "strength": 5.0}
    with pytest.raises(ConfigError, match="without its attack"):
        run(resume=tmp_path / "hit", console=silent())


@pytest.mark.parametrize(("method", "defence"), [("fedex", "median"), ("local", "geometric_median")])
def test_a_defence_that_does_not_fit_the_method_is_refused_with_the_reason(
    table: dict[str, Any], tmp_path: Path, method: str, defence: str
) -> None:
    prepared = prepare(
        table | {"method": {"name": method}},
        ["sign_flip"],
        ["mean", defence],
        out=tmp_path / "out",
        malicious=1,
        seeds=1,
        jobs=1,
    )
    assert list(prepared.refused) == [f"none+{defence}", f"sign_flip+{defence}"]
    for reason in prepared.refused.values():
        assert f"{defence!r} does not work with method {method!r}" in reason
    assert {label for label, _ in prepared.planned_runs} == {"none+mean", "sign_flip+mean"}


def stand_in(two_exchanges: bool = False) -> Any:
    """A setting with what a refusal looks at, and nothing else."""
    config = SimpleNamespace(
        task=tasks.find("causal-lm")(),
        transport=SimpleNamespace(bits=32),
        method=SimpleNamespace(two_exchanges=two_exchanges),
    )
    return SimpleNamespace(planned=SimpleNamespace(config=config))


def test_attacks_on_data_are_refused_where_there_are_no_classes() -> None:
    for name in ("label_flip", "backdoor"):
        assert "has no classes" in str(attacks.parsed(name).refusal(stand_in()))
    assert attacks.parsed("sign_flip").refusal(stand_in()) is None


def test_attacks_on_uploads_are_refused_with_two_exchanges() -> None:
    assert "method.exchange" in str(attacks.parsed("sign_flip").refusal(stand_in(two_exchanges=True)))


def test_without_a_test_set_the_honest_clients_validation_rows_evaluate(toy_table: dict[str, Any]) -> None:
    toy_table |= {"partition": {"kind": "iid", "clients": 3}}
    overrides = {"data.validation": 0.25, "evaluation.test": False}
    planned = plan(read(toy_table, overrides))
    setting = Threat(malicious=1).setting(planned)
    assert set(planned.validation["0"]).isdisjoint(setting.validation)
    assert len(setting.validation) == len(planned.validation["1"]) + len(planned.validation["2"])
    labels = planned.train.labels[setting.validation]
    for text, wanted in (("label_flip:source=plain", labels == 3), ("backdoor:target=rows", labels != 0)):
        found = attacks.parsed(text)
        assert isinstance(found, DataAttack)
        success = found.success(setting)
        assert success is not None
        assert len(success.examples) == wanted.sum()
    simulation = threatened(planned, "scale")
    assert list(simulation.validation) == ["1", "2"]


def test_attacks_are_listed_without_importing_torch() -> None:
    code = "import sys; from fedsmoothlora.experiments import attacks; print(*attacks.names()); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["backdoor", "label_flip", "one_layer", "scale", "sign_flip"]


class Stopping(PlannedRunCallback):
    """Stops a run after some visits of clients, as Ctrl-C does."""

    def __init__(self, visits: int) -> None:
        self.visits = visits

    def on_client_end(self, client: str) -> None:
        self.visits -= 1
        if not self.visits:
            raise KeyboardInterrupt


def test_an_attacked_run_that_was_stopped_ends_as_one_that_was_not(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["training"]["rounds"] = 2
    threat = Threat(malicious=1, attack=attacks.parsed("sign_flip"))
    whole, stopped = (PlannedRun(name, read(table), tmp_path / name, threat) for name in ("whole", "stopped"))
    assert carry_out(whole, PlannedRunCallback()) == "finished"
    with pytest.raises(KeyboardInterrupt):
        carry_out(stopped, Stopping(visits=7))
    assert carry_out(stopped, PlannedRunCallback()) == "finished"
    lines = [
        [line for line in map(json.loads, text.splitlines()) if not line["name"].startswith("seconds")]
        for text in ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped"))
    ]
    assert lines[0] == lines[1]


def test_a_defence_whose_runs_all_finished_comes_before_one_that_an_attack_ended() -> None:
    differences = {
        "sign_flip+mean": Difference(-0.3, -0.5, -0.1, 3),
        "sign_flip+clip": Difference(-0.005, -0.1, 0.1, 3),
        "sign_flip+multi_krum": Difference(0.0, 0.0, 0.0, 2),  # one run was ended by the attack
        "scale+multi_krum": Difference(0.0, 0.0, 0.0, 2),
    }
    parsed = {name: attacks.parsed(name) for name in ("sign_flip", "scale")}
    pairs = {
        label: Pair(attack=parsed[label.partition("+")[0]], defence=label.partition("+")[2])
        for label in differences
    }
    runs = SimpleNamespace(
        seeds=[0, 1, 2], larger_is_better=True, difference=lambda label: differences[label]
    )
    results = AttackResults(runs=runs, pairs=pairs, refused={}, malicious=["0"], clients=5)  # type: ignore[arg-type]
    assert results.best("sign_flip") == "sign_flip+clip"
    assert results.withstood("sign_flip")
    assert results.best("scale") == "scale+multi_krum"
    assert not results.withstood("scale")
