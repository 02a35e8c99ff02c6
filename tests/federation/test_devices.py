"""Whole rounds on an accelerator: no operation mixes devices, and the results are those of the CPU."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fake_device import FAKE, HOST_READS, FakeAccelerator, FakeDevice
from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.federation.assembly import RunContext
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.devices import placed
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import MemoryStates, Simulation
from fedsmoothlora.modeling.adapters import on_device
from fedsmoothlora.runs.planning import build, load, plan
from fedsmoothlora.storage.client_store import StoredStates
from layer_names import QUERY, VALUE

Table = dict[str, Any]
Make = Callable[..., Simulation]


@pytest.fixture
def small(toy_table: Table) -> Table:
    """`toy_table` with as few steps as there can be."""
    toy_table["evaluation"]["diagnostics"] = True
    toy_table["lora"]["target_modules"] = [QUERY, VALUE]
    toy_table["method"]["calibration_batches"] = 1
    toy_table["partition"]["clients"] = 2
    toy_table["training"] = {"rounds": 2, "steps": 1, "batch_size": 8, "lr": 0.02}
    return toy_table


@pytest.fixture
def accelerated(tmp_path: Path) -> Make:
    """A federation whose clients are on the fake device, and keep their states in files."""

    def make(table: Table, overrides: Table | None = None) -> Simulation:
        with FakeDevice(loading=True):
            planned = plan(read(table, overrides))
            loaded = load(planned, FakeAccelerator())
        with FakeDevice():
            context = RunContext(states=StoredStates(tmp_path / "clients", ""))
            return build(planned, context, loaded=loaded)

    return make


class Heard(Callback):
    """Fails if a client is left out."""

    def on_note(self, text: str) -> None:
        if "a single upload was accepted" not in text:
            pytest.fail(text)


def finish(simulation: Simulation) -> list[RoundRecord]:
    with FakeDevice():
        return list(run_rounds(simulation, Heard()))


def assert_finished(simulation: Simulation) -> None:
    records = finish(simulation)
    assert [record.round for record in records] == list(range(simulation.server.rounds + 1))
    assert all(math.isfinite(metric.value) for metric in records[-1].metrics)


def comparable(record: RoundRecord) -> dict[tuple[str | None, str], float]:
    """The metrics of a round but its seconds; of a cosine ``1 + cosine``.

    Errors of a cosine are relative to 1: updates that are almost orthogonal may have any small cosine.
    """
    return {
        (metric.client, metric.name): metric.value + metric.name.endswith("cosine")
        for metric in record.metrics
        if "seconds" not in metric.name
    }


@pytest.mark.parametrize("method", methods.names())
def test_rounds_of_every_method_give_the_results_of_the_cpu(
    accelerated: Make, small: Table, method: str
) -> None:
    overrides = {"method.name": method, "training.rounds": 3, "training.max_grad_norm": 1.0}
    found = finish(accelerated(small, overrides))
    wanted = list(run_rounds(build(plan(read(small, overrides))), Callback()))
    for one, other in zip(found, wanted, strict=True):
        assert comparable(one) == pytest.approx(comparable(other), rel=0.02, abs=1e-4)


OPTIONS: list[Table] = [
    {"start": "exact"},
    {"server_feedback": True},
    {"server_rank": 3},
    {"server_rank": "energy:0.8"},
    {"layer_ranks": "energy", "calibration_step": True, "zeta": 0.0},
    {"round_matching": False},
    *({"gradient_aligned": source} for source in ("shared", "shuffled", "weight", "random", "none")),
    {"gradient_aligned": "random", "start": "exact"},
    *({"gradient": "sketch", "sketch_width": 2, "sketch_passes": passes} for passes in (1, 2, 3)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
def test_options_of_fedsmoothlora(accelerated: Make, small: Table, options: Table) -> None:
    assert_finished(accelerated(small, {f"method.{name}": value for name, value in options.items()}))


SETTINGS: list[Table] = [
    {"method.name": "flexlora", "method.server_feedback": True},
    *(
        {"method.name": name, "training.scaffold": True, "training.momentum": 0.0, "training.lr": 0.002}
        for name in ("fedit", "ffa", "full")
    ),
    {"training.proximal_mu": 0.1, "training.optimizer": "adamw"},
    {"training.accumulation": 2, "training.gradient_checkpointing": True},
    *({"server.optimizer": kind} for kind in ("momentum", "adagrad", "adam", "yogi")),
    # These step on factors, on one of them, and on a product.
    *({"server.optimizer": "adam", "method.name": name} for name in ("fedit", "ffa", "fedsa", "flexlora")),
    *({"server.optimizer": "momentum", "method.name": name} for name in ("fedit", "rolora", "flexlora")),
    {"evaluation.clients": True, "data.validation": 0.2},
    {"evaluation.test": False, "data.validation": 0.2, "method.name": "local"},
    {"model.head": "lora", "lora.target_modules": [QUERY, "classifier"], "lora.head_r": 1},
    {"model.head": "lora", "method.name": "fedit", "server.optimizer": "adam"},
    {"model.dtype": "bfloat16"},
    {"model.dtype": "bfloat16", "method.name": "frlora"},
    {"transport.bits": 16},
    {"transport.bits": 16, "method.server_feedback": True},
    {"transport.bits": 16, "method.name": "flexlora", "lora.client_ranks": "halving"},
    *({"transport.bits": 4, "method.name": name} for name in ("fedit", "rolora", "fedsa", "flexlora")),
    {"method.preset": "low_bit", "method.client_feedback": True},
    {"uploads.clip_to_median": True, "partition.clients": 3},
    {"participation.fraction": 0.5, "training.rounds": 5},
    {"machine.keep_weights": "host"},
]


@pytest.mark.parametrize("overrides", SETTINGS, ids=json.dumps)
def test_settings(accelerated: Make, small: Table, overrides: Table) -> None:
    assert_finished(accelerated(small, overrides))


@pytest.mark.parametrize("method", ["fedsmoothlora", "fedsa", "rolora"])
def test_states_that_clients_keep_in_memory(accelerated: Make, small: Table, method: str) -> None:
    simulation = accelerated(small, {"method.name": method})
    simulation.states = MemoryStates()
    assert_finished(simulation)


def reads_of_a_visit(simulation: Simulation) -> list[str]:
    client = next(iter(simulation.clients))
    with FakeDevice():
        message = simulation.server.message(client)
        HOST_READS.clear()
        simulation.learner.visit(client, simulation.clients[client], message, ClientState(), Callback())
    return list(HOST_READS)


def reads_of_a_step(make: Make, table: Table) -> float:
    """How often each further step of training waits for the device, in code of this package.

    transformers reads the padding mask of a language model too, in each forward pass.
    """
    table["evaluation"]["diagnostics"] = False
    few, many = (
        reads_of_a_visit(make(table, {"training.steps": steps})).count("fedsmoothlora") for steps in (2, 5)
    )
    return (many - few) / 3


@pytest.mark.parametrize(
    "overrides",
    [{}, {"training.optimizer": "adamw", "training.max_grad_norm": 1.0, "training.accumulation": 4}],
    ids=json.dumps,
)
def test_a_step_waits_for_the_device_once(accelerated: Make, small: Table, overrides: Table) -> None:
    assert reads_of_a_step(lambda *given: accelerated(small, {**overrides, **given[1]}), small) == 1


def test_this_package_waits_once_in_a_step_of_a_language_model(
    accelerated: Make, tmp_path: Path, tiny_llama: Path
) -> None:
    assert reads_of_a_step(accelerated, questions(tmp_path, tiny_llama, "q_proj")) == 1


def questions(folder: Path, model: Path, layer: str) -> Table:
    """The configuration of a language model with answers of different lengths."""
    source = folder / "own.jsonl"
    rows = [{"question": f"say {word}", "reply": word} for word in ("red", "blue", "green", "grey") * 4]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "name": "own",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4, "target_modules": [layer]},
        "data": {"source": str(source), "validation": 0.2},
        "task": {"kind": "causal-lm", "prompt": "{question}?", "answer": " {reply}", "max_length": 32},
        "partition": {"kind": "iid", "clients": 2},
        "training": {"rounds": 2, "steps": 1, "lr": 0.02},
        "evaluation": {"diagnostics": True},
        "machine": {"threads": 1, "device": "cpu"},
    }


@pytest.mark.parametrize(("model", "layer"), [("tiny_llama", "q_proj"), ("tiny_gpt2", "c_attn")])
@pytest.mark.parametrize("method", ["fedsmoothlora", "fedex", "frlora", "full"])
def test_a_language_model(
    accelerated: Make, tmp_path: Path, model: str, layer: str, method: str, request: pytest.FixtureRequest
) -> None:
    table = questions(tmp_path, request.getfixturevalue(model), layer)
    table["method"] = {"name": method}
    assert_finished(accelerated(table))


class Recorded:
    """A method, and the devices of all that its clients were given."""

    def __init__(self, method: methods.Method) -> None:
        self.method = method
        self.devices: set[torch.device] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def start(self, client: methods.ClientView) -> methods.Start:
        updates = (client.server_lora, client.kept, client.received, client.exchanged)
        self.devices |= {value.device for update in updates for value in update.values()}
        for name in client.layers:
            self.devices |= {client.initial(name).device, client.pretrained(name).device}
        return self.method.start(client)


@pytest.mark.parametrize(
    "overrides", [{"method.gradient_aligned": "shared"}, {"method.name": "local"}, {"method.name": "frlora"}]
)
def test_all_that_a_client_starts_from_is_on_the_accelerator(
    accelerated: Make, small: Table, overrides: Table
) -> None:
    simulation = accelerated(small, overrides)
    method = Recorded(simulation.learner.method)
    simulation.learner = replace(simulation.learner, method=method)
    finish(simulation)
    assert method.devices == {FAKE}


def test_the_server_is_on_the_cpu_and_the_model_on_the_accelerator(accelerated: Make, small: Table) -> None:
    simulation = accelerated(small, {"method.name": "fedex"})
    finish(simulation)
    server, backbone = simulation.server, simulation.learner.model.backbone
    of_server = [*server.head.values(), *server.model.values(), *server.updates[0].values()]
    assert {value.device for value in of_server} == {torch.device("cpu")}
    assert {backbone.merged(name).device for name in server.layers} == {FAKE}


def test_nothing_is_copied_where_all_are_on_one_device() -> None:
    tensor, product = torch.ones(2), LowRank(torch.ones(2, 1), torch.ones(1, 3))
    found = placed({"tensor": tensor, "product": product}, torch.device("cpu"))
    assert found["tensor"] is tensor
    assert (found["product"].B, found["product"].A) == (product.B, product.A)


def test_the_fake_device_raises_where_an_operation_mixes_devices() -> None:
    with FakeDevice():
        there = torch.ones(2, 3).to(FAKE)
        assert (there + torch.tensor(1.0)).device == FAKE  # a number
        for mixing in (lambda: there + torch.ones(2, 3), lambda: torch.cat([torch.ones(2, 3), there])):
            with pytest.raises(RuntimeError, match="ReplySpec all tensors to be on the same device"):
                mixing()


def test_a_model_that_is_on_the_device_is_not_moved_again() -> None:
    class Quantised(nn.Linear):
        moves = 0

        def to(self, *arguments: Any, **more: Any) -> nn.Module:
            self.moves += 1
            return super().to(*arguments, **more)

    model = Quantised(2, 2)
    with FakeDevice():
        for device in ("mps", "mps", "mps:0"):  # accelerate says "mps", and tensors "mps:0"
            on_device(model, torch.device(device))
    assert model.moves == 1
