"""The output of `fedsmoothlora check` against the tests' own counts and a real run."""

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from families import PREDICTABLE
from fedsmoothlora import cli
from fedsmoothlora.algebra.seeds import seed_for
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.data.partitioning.dirichlet import dirichlet
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.methods import names
from fedsmoothlora.reports.formats import readable_bytes
from fedsmoothlora.runs.check import check, estimate, partition_view
from fedsmoothlora.runs.planning import build, plan
from layer_names import NOT_QUERY, OUTPUT, QKV, QUERY, attention

CLASS_NAMES = ("rows", "columns", "checks", "plain")
WIDTH, CLASSES, RANK = 32, 4, 2
ADAPTED = [attention(block, part) for block in (0, 1) for part in QKV]
FACTORS = 6 * RANK * (WIDTH + WIDTH) * 4
DENSE = 6 * WIDTH * WIDTH * 4


def said(
    table: dict[str, Any],
    overrides: dict[str, Any] | None = None,
    site: str | None = None,
    width: int = 200,
) -> str:
    written = io.StringIO()
    check(read(table, overrides), Console(file=written, width=width), site=site)
    return written.getvalue()


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def class_counts() -> dict[str, list[int]]:
    """Rows by client and class, counted row by row; the toy's labels are 0, 1, 2, 3, 0, 1 ..."""
    labels = np.arange(96) % CLASSES
    clients = dirichlet(labels, alpha=1.0, clients=3, min_size=8, seed=seed_for(0, "partition")).clients
    return {
        client: [sum(labels[row] == label for row in rows) for label in range(CLASSES)]
        for client, rows in clients.items()
    }


def test_rows_and_classes_are_listed_by_client(toy_table: dict[str, Any]) -> None:
    text = said(toy_table)
    assert "data: pkg:textures, 96 training rows, 64 test rows, 4 classes" in text
    assert ["client", "rows", "steps", "a", "round", *CLASS_NAMES] in words(text)
    counts = class_counts()
    assert sum(map(sum, counts.values())) == 96
    for client, row in counts.items():
        rows = sum(row)
        assert [client, str(rows), str(-(-rows // 8)), *map(str, row)] in words(text)
    assert "trained whole: classifier" in text
    assert "device: cpu, machine.device = " in text
    assert "everything that can be checked before training is in order" in text


def test_rows_kept_for_validation_are_not_steps(toy_table: dict[str, Any]) -> None:
    text = said(toy_table, {"data.validation": 0.5})
    samples = {
        metric.client: metric.value
        for record in run_rounds(
            build(plan(read(toy_table, {"data.validation": 0.5, "training.rounds": 1}))), Callback()
        )
        for metric in record.metrics
        if metric.name == "samples"
    }
    for client, row in class_counts().items():
        assert [client, str(sum(row)), str(int(-(-samples[client] // 8)))] in [one[:3] for one in words(text)]


@pytest.mark.parametrize("head", ["full", "lora"])
def test_every_adapted_layer_is_listed_with_shape_rank_and_scale(
    toy_table: dict[str, Any], head: str
) -> None:
    changes: dict[str, Any] = {"model.head": head}
    if head == "lora":
        changes |= {"lora.target_modules": [*QKV, "classifier"], "lora.head_r": 1}
    text = said(toy_table, changes)
    listed = [line for line in words(text) if line[:1] and line[0].startswith(("dinov2.", "classifier"))]
    patterns = dict.fromkeys(name.replace(".0.", ".*.").replace(".1.", ".*.") for name in ADAPTED)
    wanted = [[name, "32", "x", "32", "2", "2", "2"] for name in patterns]
    if head == "lora":  # the class token and the mean of the patches
        wanted.append(["classifier", "4", "x", "64", "1", "4", "1"])
    assert listed == wanted
    assert ("trained whole" in text) == (head == "full")


def test_ranks_of_clients_are_listed_where_they_differ(toy_table: dict[str, Any]) -> None:
    text = said(toy_table, {"lora.client_ranks": [2, 1, 2]})
    rows = [line for line in words(text) if line[0] in ("0", "1", "2") and len(line) == 8]
    assert [row[3] for row in rows] == ["2", "1", "2"]
    assert "LoRA rank" in text
    assert "LoRA rank" not in said(toy_table)


def test_many_clients_are_counted_rather_than_listed(toy_table: dict[str, Any]) -> None:
    toy_table["partition"] = {"kind": "iid", "clients": 40}
    assert ["...", "10", "more", "clients", "with", "2", "rows"] in words(said(toy_table))


@pytest.mark.parametrize("ranks", [False, True])
def test_in_a_narrow_terminal_columns_of_classes_are_summarised(ranks: bool) -> None:
    names = [f"[red]{number}\n{'of a long list of classes'[number:]}" for number in range(20)]
    clients = {f"hospital-of-a-long-name-{number}-unit": [number, 3, *[0] * 18] for number in range(50)}
    steps = dict.fromkeys(clients, 12)
    view = partition_view(names, clients, steps, steps if ranks else {}, 80)
    written = io.StringIO()
    Console(file=written, width=80).print(view)
    lines = written.getvalue().splitlines()
    assert len(lines) == 2 + 50
    assert lines[1].split()[-4:] == ["classes", "most", "frequent", "class"]
    assert len({line[:17] for line in lines[2:]}) == 50
    assert [line.split()[-1] for line in (lines[2], lines[-1])] == ["(100%)", "(94%)"]
    assert "[red]0" in lines[-1]
    columns = partition_view(["cat", "dog"], {"a": [3, 4]}, {"a": 2}, {}, 80).columns
    assert [str(column.header) for column in columns] == ["client", "rows", "steps a round", "cat", "dog"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"method.name": name} for name in names() if name != "fedsmoothlora"),
        {"lora.target_modules": []},
        {
            "model.head": "lora",
            "lora.target_modules": [QUERY, OUTPUT, "classifier"],
            "lora.r": 3,
            "lora.head_r": 1,
        },
    ],
    ids=["fedsmoothlora", *(n for n in names() if n != "fedsmoothlora"), "head alone", "no head"],
)
def test_the_bytes_of_a_round_are_those_that_a_run_measures(
    toy_table: dict[str, Any], changes: dict[str, Any]
) -> None:
    changes = {**changes, **PREDICTABLE.get(changes.get("method.name", ""), {})}
    planned = plan(read(toy_table, changes))
    costs = estimate(planned)
    records = list(run_rounds(build(planned), Callback()))
    ups = [f.value for one in records[1:] for f in one.metrics if f.name == "bytes_up" and f.client]
    downs = [record.value("bytes_down") for record in records[2:]]
    if changes.get("method.name") == "fed_sb":  # round 0 exchanges gradients
        ups, downs = ups[3:], downs[1:]
    if changes.get("method.name") == "rolora":  # a round's factor is B or A
        ups, downs = [max(ups)], [max(value or 0 for value in downs)]
    assert set(ups) == {costs.up}
    assert set(downs) == {3 * costs.down}
    line = (
        f"a round: 3 clients; up {readable_bytes(costs.up)} and down {readable_bytes(costs.down)} a client, "
        f"{readable_bytes(3 * (costs.up + costs.down))} in all"
    )
    assert line in said(toy_table, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"method.gradient_aligned": "shared"},
        {"method.gradient_aligned": "shuffled"},
        *(
            {"method.name": name, "training.scaffold": True, "training.momentum": 0.0}
            for name in ("fedit", "ffa", "full")
        ),
    ],
    ids=["shared", "shuffled", "scaffold fedit", "scaffold ffa", "scaffold full"],
)
def test_gradients_and_control_variates_that_are_exchanged_are_counted(
    toy_table: dict[str, Any], changes: dict[str, Any]
) -> None:
    del toy_table["training"]["max_grad_norm"]
    planned = plan(read(toy_table, {**changes, "training.steps": 1}))
    costs = estimate(planned)
    records = list(run_rounds(build(planned), Callback()))
    for record in records[2:]:
        assert record.value("bytes_up") == 3 * costs.up
        assert record.value("bytes_down") == 3 * costs.down


@pytest.mark.parametrize(
    ("changes", "copies", "calibration"),
    [
        ({}, 3, DENSE),  # momentum 0.9
        ({"training.momentum": 0.0}, 2, DENSE),
        ({"training.optimizer": "adamw"}, 4, DENSE),
        ({"method.name": "fedit"}, 3, 0),
        ({"method.gradient_aligned": "none"}, 3, 0),
        ({"method.gradient": "sketch", "method.sketch_width": 4}, 3, DENSE // 2),  # 8 (32 + 32) numbers
    ],
)
def test_the_parts_of_the_memory_are_those_counted_by_hand(
    toy_table: dict[str, Any], changes: dict[str, Any], copies: int, calibration: int
) -> None:
    memory = estimate(plan(read(toy_table, changes))).memory
    real = AutoModelForImageClassification.from_pretrained(toy_table["model"]["source"], num_labels=CLASSES)
    head = (2 * WIDTH * CLASSES + CLASSES) * 4  # the class token and the mean of the patches
    wanted = {
        "weights": 4 * sum(parameter.numel() for parameter in real.parameters()),
        "pretrained copy of the adapted layers": DENSE,
        "trained parameters, with gradients and optimiser": (FACTORS + head) * copies,
        "calibration gradients": calibration,
    }
    assert {name: memory[name] for name in wanted} == wanted
    several = estimate(plan(read(toy_table, {**changes, "machine.jobs": 8}))).memory
    # All three clients, but not eight.
    assert several["adapted layers of 3 clients at once"] == 3 * DENSE
    for name, size in memory.items():
        if name in several:
            one_for_all = ("weights", "pretrained copy of the adapted layers", "sum of all updates")
            shared = name.startswith(one_for_all)
            assert several[name] == size * (1 if shared else 3)
    parts = [size for size in memory.values() if size]
    text = said(toy_table, changes)
    assert f"memory: about {readable_bytes(sum(parts))}, " in text
    assert ("calibration gradients" in text) == bool(calibration)
    for size in parts:
        assert readable_bytes(size) in text


def test_clients_that_train_together_need_memory_for_all_of_them(toy_table: dict[str, Any]) -> None:
    one, several = (
        estimate(plan(read(toy_table, {"machine.batch_clients": clients}))).memory for clients in (1, 8)
    )
    assert several.pop("adapted layers of 1 clients at once") == 0  # the clients share them
    of_each = ("trained parameters", "activations")
    for name, size in several.items():
        assert size == one[name] * (3 if name.startswith(of_each) else 1)


def test_the_parts_of_the_memory_have_a_line_each(toy_table: dict[str, Any]) -> None:
    lines = said(toy_table, width=80).splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("memory: about "))
    memory = estimate(plan(read(toy_table))).memory
    parts = [f"  {name}: {readable_bytes(size)}" for name, size in memory.items() if size]
    assert lines[first + 1 : first + 1 + len(parts)] == parts
    assert max(map(len, lines[first:])) <= 80


def kept_by_autograd(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes saved for backward that belong to no parameter: every tensor, and every storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    every, storages = 0, {}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal every
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            every += tensor.nbytes
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that it lives on
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return every, sum(size for size, _ in storages.values())


@pytest.mark.parametrize(
    "batch",
    [8, 64],
)
def test_the_activations_are_within_a_tenth_of_what_autograd_really_keeps(
    toy_table: dict[str, Any], batch: int
) -> None:
    planned = plan(read(toy_table, {"training.batch_size": batch}))
    guess = estimate(planned).memory["activations of a training batch"]
    simulation = build(planned)
    model, task = simulation.learner.model.model.train(), simulation.learner.objective
    rows = {
        "pixel_values": torch.randn(batch, 3, 28, 28),
        "labels": torch.zeros(batch, dtype=torch.int64),
    }
    every, storages = kept_by_autograd(model, lambda: task.loss(model, rows))
    assert guess == pytest.approx(every, rel=0.1)
    assert guess == pytest.approx(storages, rel=0.1)


def test_nothing_is_trained_and_no_weights_are_loaded(
    toy_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise AssertionError("weights were loaded, or a client was trained")

    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", fail)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)
    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(Learner, "visit", fail)
    assert "in order" in said(toy_table)


def test_a_site_sees_only_its_own_row(toy_table: dict[str, Any]) -> None:
    counts = class_counts()
    site, *others = counts
    shown = [line for line in words(said(toy_table, site=site)) if line[:1] and line[0] in counts]
    assert others
    assert [line[0] for line in shown] == [site]
    assert shown[0][3:] == [str(count) for count in counts[site]]


def test_an_unknown_site_is_refused_with_those_there_are(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--site hospital-z: there is no such client") as error:
        said(toy_table, site="hospital-z")
    for client in class_counts():
        assert client in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quikstart"], "did you mean 'quickstart'"),
        (["gone.toml"], "there is no such file"),
        (["quickstart", "--set", "training.lr"], "KEY=VALUE"),
        (["quickstart", "--set", "training.lr=-1"], "training.lr = -1"),
        (["quickstart", "--set", "lora.r=193"], "lora.r"),
        (["quickstart", "--set", f'lora.target_modules=["{NOT_QUERY}"]'], QUERY),
        (["quickstart", "--site", "hospital-z"], "hospital-z"),
    ],
)
def test_an_error_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedsmoothlora", "check", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
