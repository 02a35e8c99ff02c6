"""Clients that train in one forward pass get the results of clients that train one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from families import OF_A_FAMILY
from fedsmoothlora import Federation, methods, tasks
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import first_difference, read, to_toml
from fedsmoothlora.errors import ConfigError, DivergedError, InterruptedRunError
from fedsmoothlora.federation.engines.batched import Batched
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.flower.server_app import check_for_sites
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.training.local import LocalTraining, Trained
from fedsmoothlora.training.lockstep import Lockstep
from task_cases import configuration

Toy = Callable[..., Simulation]

# Without dropout, clients together differ from clients alone by rounding only.
EXACT = {"lora.dropout": 0.0, "training.rounds": 2}
SHORT = {"lora.dropout": 0.0, "training.rounds": 1, "training.steps": 2, "method.name": "fedit"}
TOGETHER = {"machine.batch_clients": 3}

# The methods that train LoRA factors.
TRAINS_FACTORS = [name for name in methods.names() if name not in ("full", "ravan", "fed_sb")]

CASES: dict[str, dict[str, Any]] = {
    "clients of different sizes": {},
    "groups of two and one": {"machine.batch_clients": 2},
    "head": {"model.head": "full", "training.optimizer": "adamw", "training.momentum": None},
    "head at its own learning rate": {"model.head": "full", "training.head_lr": 0.1},
    "ranks": {"method.name": "flexlora", "lora.client_ranks": "halving"},
    "one factor": {"method.name": "rolora", "training.weight_decay": 0.1},
    "parts": {"training.accumulation": 3},
    "proximal": {"method.name": "fedit", "training.proximal_mu": 0.5},
    "checkpointing": {"training.gradient_checkpointing": True},
    "first step": {"method.calibration_step": True, "method.zeta": 0.0},
    "class weights": {"training.class_weights": "balanced"},
    "head alone": {"method.name": "fedit", "lora.target_modules": [], "model.head": "full"},
    "personal models": {"data.validation": 0.3, "personal.ditto": 0.1, "evaluation.clients": True},
    "diagnostics": {"evaluation.diagnostics": True},
    "two exchanges": {"method.exchange": "subspace", "method.zeta": 0.0},
}
LATER = ("clients of different sizes", "personal models")  # their second round differs from the first
FAST = ("clients of different sizes", "head", "head at its own learning rate", "ranks", "two exchanges")


def without_dropout(simulation: Simulation) -> None:
    """Switch off the dropout of the model itself, which has no key."""
    for module in simulation.learner.model.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def outcome(simulation: Simulation) -> tuple[dict[str, torch.Tensor], dict[tuple[Any, ...], float]]:
    """All tensors of the server after the last round, and all metrics but times."""
    records = list(run_rounds(simulation, Callback()))
    server = simulation.server
    parts = [*server.updates, server.model, server.head]
    return (
        {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in flatten(part).items()},
        {
            (record.round, metric.client, metric.name): metric.value
            for record in records
            for metric in record.metrics
            if not metric.name.startswith("seconds")
        },
    )


def assert_alike(one: Simulation, other: Simulation) -> None:
    """Compare the tensors and the losses of two federations after their last round."""
    (tensors, metrics), (other_tensors, other_metrics) = outcome(one), outcome(other)
    assert tensors.keys() == other_tensors.keys()
    for name, value in tensors.items():
        error = (value - other_tensors[name]).norm() / (value.norm() + 1e-6)
        assert float(error) < 2e-3, name
    assert metrics.keys() == other_metrics.keys()
    for key, metric in metrics.items():
        if key[2].startswith("train_loss"):
            assert other_metrics[key] == pytest.approx(metric, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.release]) for name in CASES]
)
def test_image_clients_together_train_as_one_after_the_other(toy_federation: Toy, case: str) -> None:
    overrides = {**EXACT, "training.rounds": 1 + (case in LATER), **CASES[case]}
    alone = toy_federation({**overrides, "machine.batch_clients": 1})
    assert_alike(alone, toy_federation({**TOGETHER, **overrides}))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in OF_A_FAMILY else pytest.mark.release)
        for name in TRAINS_FACTORS
    ],
)
def test_clients_of_every_method_that_trains_factors_train_together(toy_federation: Toy, name: str) -> None:
    overrides = {**EXACT, "method.name": name, "training.steps": 2}
    assert_alike(toy_federation(overrides), toy_federation({**overrides, **TOGETHER}))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=[] if kind in ("text-classification", "causal-lm") else [pytest.mark.release]
        )
        for kind in tasks.names()
    ],
)
def test_clients_of_every_task_train_together(
    kind: str, tmp_path: Path, tiny_folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batches have different widths."""
    if kind == "audio-classification":
        pytest.importorskip("soundfile")
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(tmp_path / "cache"))
    table = configuration(kind, tmp_path / "case", image_model=tiny_folder, language_model=tiny_llama)
    simulations = [
        build(plan(read(table, {"lora.dropout": 0.0, "machine.batch_clients": clients})))
        for clients in (1, 2)
    ]
    for simulation in simulations:
        without_dropout(simulation)
    assert_alike(*simulations)


def test_transposed_layers_of_clients_compute_together(
    tmp_path: Path, tiny_folder: Path, tiny_gpt2: Path
) -> None:
    table = configuration("causal-lm", tmp_path / "case", image_model=tiny_folder, language_model=tiny_gpt2)
    assert_alike(
        *(
            build(plan(read(table, {"lora.dropout": 0.0, "machine.batch_clients": clients})))
            for clients in (1, 2)
        )
    )


def test_dropout_of_clients_together_is_repeatable_and_other_than_alone(toy_federation: Toy) -> None:
    short = {"training.rounds": 1, "training.steps": 2, "lora.dropout": 0.5, "method.name": "fedit"}
    alone, one, other = (outcome(toy_federation({**short, **more}))[0] for more in ({}, TOGETHER, TOGETHER))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(not torch.allclose(value, alone[name], rtol=1e-2) for name, value in one.items())


class Diverging(Batched):
    """Trains the second client of every group with a learning rate at which it diverges."""

    def _begun(self, *arguments: Any) -> Any:
        visits = super()._begun(*arguments)
        client = sorted(visits)[1]
        visit, wanted = visits[client]
        visits[client] = (visit, replace(wanted, lr=1e30))
        return visits


def test_a_client_that_diverges_leaves_the_others_as_they_are(toy_federation: Toy) -> None:
    simulation, usual = (toy_federation({**SHORT, **TOGETHER}) for _ in range(2))
    listener = Listener()
    simulation.engine = Diverging(3)
    found = outcome_of_clients(simulation, listener)
    wanted = outcome_of_clients(usual, Callback())
    client = sorted(wanted)[1]
    assert found.keys() == wanted.keys() - {client}
    assert all(found[name] == pytest.approx(wanted[name], rel=1e-5) for name in found)
    assert any(f"client {client} diverged" in note for note in listener.notes)


def outcome_of_clients(simulation: Simulation, callback: Callback) -> dict[str, float]:
    """The last training loss of every client that replied in the first round."""
    metrics = list(run_rounds(simulation, callback))[1].metrics
    return {m.client: m.value for m in metrics if m.name == "train_loss_last" and m.client}


class Listener(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.notes: list[str] = []

    def on_client_begin(self, client: str, steps: int) -> None:
        self.events.append(f"begin {client}")

    def on_client_step(self, client: str, loss: float) -> None:
        self.events.append(f"step {client}")

    def on_client_end(self, client: str) -> None:
        self.events.append(f"end {client}")

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def test_progress_shows_all_clients_in_hand(toy_federation: Toy) -> None:
    simulation = toy_federation({**SHORT, **TOGETHER})
    listener = Listener()
    list(run_rounds(simulation, listener))
    clients = [event.split()[1] for event in listener.events[:3]]
    assert sorted(clients) == sorted(simulation.clients)
    assert listener.events == [
        f"{what} {client}" for what in ("begin", "step", "step", "end") for client in clients
    ]


def test_a_run_that_is_asked_to_stop_ends_the_visits_of_a_group(toy_federation: Toy) -> None:
    simulation = toy_federation({**SHORT, **TOGETHER})
    listener = Listener()
    simulation.should_stop = lambda: len(listener.events) > 1
    with pytest.raises(InterruptedRunError, match="stopped in round 1, before client"):
        list(run_rounds(simulation, listener))
    begun = [event.split()[1] for event in listener.events if event.startswith("begin")]
    assert len(begun) == 2
    assert sorted(f"end {client}" for client in begun) == sorted(listener.events[2:])


@pytest.mark.parametrize(
    ("mix", "told"),
    [
        pytest.param(lambda y: y - y.mean(dim=0, keepdim=True), "not independent", id="centred"),
        pytest.param(lambda y: y.flip(0), "not independent", id="other order"),
    ],
)
def test_a_model_whose_rows_are_not_independent_is_refused(
    toy_federation: Toy, mix: Callable[[torch.Tensor], torch.Tensor], told: str
) -> None:
    simulation = toy_federation({**SHORT, **TOGETHER})
    model = simulation.learner.model
    first = next(iter(model.layers))
    model.model.get_submodule(first).register_forward_hook(lambda module, inputs, output: mix(output))
    with pytest.raises(ConfigError, match=rf"machine\.batch_clients: .* {told}"):
        list(run_rounds(simulation, Callback()))


def test_an_objective_that_calls_the_model_twice_is_refused(toy_federation: Toy) -> None:
    class Twice:
        def __init__(self, objective: Any) -> None:
            self._objective = objective

        def __getattr__(self, name: str) -> Any:
            return getattr(self._objective, name)

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            total = self._objective.loss(model, batch) + self._objective.loss(model, batch)
            assert isinstance(total, torch.Tensor)
            return total

    simulation = toy_federation({**SHORT, **TOGETHER})
    learner = simulation.learner
    simulation.learner = replace(learner, objective=Twice(learner.objective))
    with pytest.raises(ConfigError, match="calls the model 2 times"):
        list(run_rounds(simulation, Callback()))


class Widening(Batched):
    """Gives clients a first batch of one width, and a second one of two."""

    def _begun(self, simulation: Simulation, *arguments: Any) -> Any:
        visits = super()._begun(simulation, *arguments)
        data = [simulation.clients[client] for client in visits]
        rows = sorted(range(len(data[0])), key=data[0].lengths.__getitem__)  # type: ignore[attr-defined]
        for client, row in zip(visits, (rows[0], rows[-1]), strict=True):
            visit, wanted = visits[client]
            batches = iter([data[1].batch([0]), data[0].batch([row])])
            visits[client] = (visit, replace(wanted, steps=2, batches=batches))
        return visits


def test_padding_that_changes_a_loss_is_found_where_it_occurs_first(
    tmp_path: Path, tiny_folder: Path, tiny_llama: Path
) -> None:
    table = configuration("causal-lm", tmp_path / "case", image_model=tiny_folder, language_model=tiny_llama)
    simulation = build(plan(read(table, {"lora.dropout": 0.0, "machine.batch_clients": 2})))
    learner = simulation.learner
    objective: Any = SimpleNamespace(loss=learner.objective.loss)  # which does not say that it pads left
    simulation.learner = replace(learner, objective=objective)
    simulation.engine = Widening(2)
    with pytest.raises(ConfigError, match="or depend on their padding"):
        list(
            simulation.engine.train(
                simulation, list(simulation.clients), simulation.server.message, Callback()
            )
        )


def penalised(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss, with the norms of the trained parameters."""
    loss: torch.Tensor = nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])
    return loss + sum(parameter.norm() for parameter in model.parameters() if parameter.requires_grad)


def of_tuple(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["pixel_values"])[0], batch["labels"])


@pytest.mark.parametrize(
    ("loss", "told"),
    [(penalised, r"the objective calls parameters\(\)"), (of_tuple, "the model returns tuple")],
    ids=["penalty", "tuple"],
)
def test_an_objective_that_needs_more_than_logits_is_refused(
    toy_federation: Toy, loss: Callable[..., torch.Tensor], told: str
) -> None:
    simulation = toy_federation({**SHORT, **TOGETHER})
    learner = simulation.learner
    if loss is of_tuple:
        learner.model.model.register_forward_hook(lambda module, inputs, output: (output.logits,))
    objective: Any = SimpleNamespace(loss=loss, pads_left=False)
    simulation.learner = replace(learner, objective=objective)
    with pytest.raises(ConfigError, match=rf"machine\.batch_clients: {told}"):
        list(
            simulation.engine.train(
                simulation, list(simulation.clients), simulation.server.message, Callback()
            )
        )


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        pytest.param({"machine.jobs": 2}, "machine.jobs = 2", id="jobs"),
        pytest.param({"method.name": "full"}, "method 'full' trains the weights", id="full"),
        pytest.param({"method.name": "ravan"}, "a matrix between the LoRA factors", id="core"),
        pytest.param({"method.name": "fed_sb"}, "a matrix between the LoRA factors", id="exchanged core"),
        pytest.param(
            {
                "method.name": "fedit",
                "training.scaffold": True,
                "training.momentum": 0.0,
                "training.max_grad_norm": None,
            },
            "training.scaffold",
            id="scaffold",
        ),
        pytest.param({"training.precision": "bf16"}, "training.precision = 'bf16'", id="bf16"),
        pytest.param({"participation.buffer": 2}, "participation.buffer = 2", id="buffer"),
    ],
)
def test_what_cannot_be_trained_together_is_refused_with_the_reason(
    toy_table: dict[str, Any], overrides: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=rf"machine\.batch_clients = 3: .*{re.escape(told)}"):
        read(toy_table, {**overrides, **TOGETHER})


def test_an_own_model_is_trained_together() -> None:
    """The batches hold single vectors, and the last layer of the model is its head."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        client: TensorDataset(torch.randn(count, 8, generator=generator), torch.arange(count) % 3)
        for client, count in (("a", 10), ("b", 7), ("c", 12))
    }
    found = []
    for clients in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        own = Federation(
            model=model,
            clients=rows,
            test=rows["a"],
            head=["2"],
            method="fedit",
            lora={"r": 2, "alpha": 4, "target_modules": ["0"]},
            training={"rounds": 1, "batch_size": 4, "lr": 0.1},
            machine={"threads": 1, "device": "cpu", "batch_clients": clients},
        )
        found.append({m["client"]: m["value"] for m in own.run().metrics if m["name"] == "train_loss_last"})
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_weights_in_bfloat16_are_refused_with_the_reason(toy_federation: Toy) -> None:
    with pytest.raises(ConfigError, match=r"machine\.batch_clients = 3: .* float32"):
        toy_federation({**TOGETHER, "model.dtype": "bfloat16"})


def test_sites_are_refused_with_the_reason(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"machine\.batch_clients = 3: with Flower"):
        check_for_sites(read(toy_table, TOGETHER))


def test_a_resumed_run_keeps_the_number_of_clients_that_train_together(toy_table: dict[str, Any]) -> None:
    one, other = (to_toml(read(toy_table, {"machine.batch_clients": clients})) for clients in (1, 3))
    assert first_difference(one, other) == "machine.batch_clients"


class Interrupts(Callback):
    """Interrupts the second round after a client's reply, which is the middle of a group's uploads."""

    def __init__(self) -> None:
        self.ends = 0

    def on_client_end(self, client: str) -> None:
        self.ends += 1
        if self.ends == 5:  # the reply of the first one is there
            raise InterruptedRunError("stopped for the test")


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_a_group_and_resumed_is_the_same_to_the_bit(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    config = read(toy_table, {**TOGETHER, "training.rounds": 2, "training.steps": 2, "lora.dropout": 0.5})
    quiet: dict[str, Any] = {"console": Console(quiet=True), "outputs": False}
    run(config, out=tmp_path / "whole", **quiet)
    with pytest.raises(InterruptedRunError):
        run(config, out=tmp_path / "cut", callbacks=[Interrupts()], **quiet)
    run(resume=tmp_path / "cut", **quiet)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def lines(folder: Path) -> list[Mapping[str, Any]]:
    """The metrics of a run but times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if not line["name"].startswith("seconds")]


def test_clients_share_the_time_of_their_group(toy_federation: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Trained | DivergedError] = []
    train = Lockstep.train

    def kept(self: Lockstep, wanted: Sequence[LocalTraining]) -> list[Trained | DivergedError]:
        found.extend(train(self, wanted))
        return found

    monkeypatch.setattr(Lockstep, "train", kept)
    list(run_rounds(toy_federation({**SHORT, **TOGETHER}), Callback()))
    assert len(found) == 3
    assert len({one.seconds for one in found if isinstance(one, Trained)}) == 1
