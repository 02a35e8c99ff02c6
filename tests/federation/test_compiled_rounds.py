"""`machine.compile`: rounds whose training is compiled once, whatever the number of clients."""

import copy
import json
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, DivergedError
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.modeling import compiling
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.runs.planning import build, plan
from layer_names import QUERY, VALUE

Table = dict[str, Any]


@pytest.fixture
def compiler(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CompileCounterWithBackend]:
    """Counts compilations; they end in torch's own operations, so no C++ compiler is needed.

    ``eager`` traces the forward pass; ``aot_eager`` traces both passes, as ``inductor`` does.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(getattr(request, "param", "eager"))
    monkeypatch.setattr(compiling, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


class Compilations(Callback):
    """The number of compilations when each client ends."""

    def __init__(self, compiler: CompileCounterWithBackend) -> None:
        self._compiler = compiler
        self.counts: list[int] = []

    def on_client_end(self, client: str) -> None:
        self.counts.append(self._compiler.frame_count)


def metrics(records: list[RoundRecord]) -> dict[tuple[int, str | None, str], float]:
    return {
        (record.round, metric.client, metric.name): metric.value
        for record in records
        for metric in record.metrics
        if "seconds" not in metric.name
    }


@pytest.fixture
def small(toy_table: Table) -> Table:
    """`toy_table` with batches of one size, so that nothing but clients and rounds changes."""
    toy_table["lora"]["target_modules"] = [QUERY, VALUE]
    toy_table["method"]["calibration_batches"] = 1
    toy_table["training"] = {"rounds": 3, "steps": 2, "batch_size": 8, "lr": 0.02}
    toy_table["partition"] = {"kind": "iid", "clients": 3}
    return toy_table


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager"], indirect=True)
@pytest.mark.parametrize("method", ["fedsmoothlora", "full"])
def test_training_is_compiled_once_for_all_clients_and_rounds(
    small: Table, compiler: CompileCounterWithBackend, method: str
) -> None:
    overrides = {"method.name": method, "training.optimizer": "adamw", "training.lr": 1e-3}
    heard = Compilations(compiler)
    simulation = build(plan(read(small, {**overrides, "machine.compile": True})))
    found = list(run_rounds(simulation, heard))
    assert heard.counts == [heard.counts[0]] * 9
    assert heard.counts[0] > 0
    wanted = list(run_rounds(build(plan(read(small, overrides))), Callback()))
    assert metrics(found) == pytest.approx(metrics(wanted), rel=1e-3, abs=1e-5)
    assert names(simulation) == names(build(plan(read(small, overrides))))


def names(simulation: Simulation) -> list[str]:
    return list(simulation.learner.model.model.state_dict())


@pytest.mark.slow
def test_a_method_that_trains_other_factors_in_other_rounds(
    small: Table, compiler: CompileCounterWithBackend
) -> None:
    heard = Compilations(compiler)
    table = {**small, "method": {"name": "rolora"}}
    list(run_rounds(build(plan(read(table, {"machine.compile": True}))), heard))
    one, other = heard.counts[0], heard.counts[3]
    assert heard.counts == [one] * 3 + [other] * 6
    assert one < other


@pytest.mark.slow
def test_texts_of_all_lengths(compiler: CompileCounterWithBackend, tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"q": "say" + " more" * (number % 5), "a": "yes" * (1 + number % 3)} for number in range(48)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = {
        "name": "own",
        "model": {"source": str(tiny_llama)},
        "lora": {"r": 2, "alpha": 4, "target_modules": ["q_proj"]},
        "data": {"source": str(tmp_path / "own.jsonl"), "validation": 0.2},
        "task": {"kind": "causal-lm", "prompt": "{q}", "answer": " {a}", "max_length": 48},
        "method": {"name": "fedsmoothlora", "calibration_batches": 1},
        "partition": {"kind": "iid", "clients": 2},
        "training": {"rounds": 2, "steps": 4, "batch_size": 4, "lr": 0.001},
        "evaluation": {"test": False},
        "machine": {"threads": 1, "device": "cpu"},
    }
    heard = Compilations(compiler)
    found = list(run_rounds(build(plan(read(table, {"machine.compile": True}))), heard))
    wanted = list(run_rounds(build(plan(read(table))), Callback()))
    assert metrics(found) == pytest.approx(metrics(wanted), rel=1e-3, abs=1e-5)
    assert heard.counts[1:] == [heard.counts[0]] * 3  # after the second length, lengths are symbols


class Doubled(nn.Module):
    """A model whose objective looks at the names of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, input_ids: Tensor, *, use_cache: bool = True) -> Tensor:
        return input_ids * self.weight * 2


def test_a_model_is_compiled_in_the_context_only(compiler: CompileCounterWithBackend) -> None:
    model = Doubled()
    forward = compiling.CompiledForward(model)
    with forward.called():
        assert list(signature(model.forward).parameters) == ["input_ids", "use_cache"]
        assert torch.equal(model(torch.ones(2), use_cache=False), torch.full((2,), 2.0))
        model.weight.data.fill_(3.0)
        assert torch.equal(model(torch.ones(2), use_cache=False), torch.full((2,), 6.0))
    assert compiler.frame_count == 1
    model.weight.register_hook(lambda gradient: gradient)
    model(torch.ones(3, 2))
    assert compiler.frame_count == 1
    assert list(model.state_dict()) == ["weight"]
    assert "forward" not in vars(model)
    copy.deepcopy(model)


def test_an_error_of_the_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no C++ compiler")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    model = Doubled()
    with (
        pytest.raises(
            ConfigError, match=r"machine\.compile = true: torch\.compile failed .*OSError: no C\+\+"
        ),
        compiling.CompiledForward(model).called(),
    ):
        model(torch.ones(2))
    assert "forward" not in vars(model)


def test_an_error_of_the_model_stays_as_it_is(compiler: CompileCounterWithBackend) -> None:
    with pytest.raises(DivergedError), compiling.CompiledForward(Doubled()).called():
        raise DivergedError("the loss is nan at step 1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"machine.jobs": 2}, r"machine\.jobs = 2: every client has a process of its own"),
        ({"training.gradient_checkpointing": True}, r"training\.gradient_checkpointing = true"),
        ({"model.dtype": "bfloat16"}, r"with model\.dtype = 'bfloat16', the updates of all rounds"),
    ],
    ids=["jobs", "checkpointing", "bfloat16"],
)
def test_combinations_that_do_not_work_are_refused(toy_table: Table, overrides: Table, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"machine\.compile = true.*{words}"):
        read(toy_table, {**overrides, "machine.compile": True})


def test_weights_of_low_precision_are_refused_for_a_model_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).bfloat16()
    with pytest.raises(ConfigError, match=r"machine\.compile = true: the adapted layers are not float32"):
        AdaptedModel(model, LoraSettings(r=1, target_modules=["0"]), compile=True)
