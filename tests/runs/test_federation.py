"""A federation of a model and data sets of the user's own."""

import copy
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import bitsandbytes as bnb
import pytest
import torch
from annotated_types import Gt
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from families import by_family
from fedsmoothlora import LoraSettings, MachineSettings, TrainingSettings, methods
from fedsmoothlora.algebra.averaging import mean_factors
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.data.images import ImageExamples
from fedsmoothlora.errors import ConfigError, DataError, ExportError, InterruptedRunError
from fedsmoothlora.exports.loading import load_adapter
from fedsmoothlora.federation.assembly import RunContext
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.methods import ClientView, Layer, Method, Products, ServerUpdate, ServerView, Start, Update
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.loading import load_image_classifier
from fedsmoothlora.runs import session
from fedsmoothlora.runs.federation import Federation
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.result import Result
from fedsmoothlora.tasks.objectives import Evaluation
from fedsmoothlora.tasks.objectives.classification import Classification

CLASSES = 3
SIZES = {"north": 40, "south": 25}


class Attentive(nn.Module):
    """One attention layer with a fused qkv; its input is positional only and it returns plain logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.qkv = nn.Linear(12, 36)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, tokens: Tensor, /) -> Tensor:  # (rows, 4, 6)
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + (q @ k.mT / 12**0.5).softmax(dim=-1) @ v
        return self.classifier(self.dropout(x).mean(dim=1))


class Named(Attentive):
    """The same, with an input by name."""

    def forward(self, *, tokens: Tensor) -> Tensor:
        return super().forward(tokens)


class AsDictionaries(Dataset):
    def __init__(self, pairs: TensorDataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens, label = self.pairs[row]
        return {"tokens": tokens, "labels": label}


def separable(rows: int, seed: int) -> TensorDataset:
    """Rows around one centre a class."""
    centres = torch.randn(CLASSES, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(rows) % CLASSES
    noise = torch.randn(rows, 4, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(centres[labels] + 0.3 * noise, labels)


def model(kind: type[Attentive] = Attentive) -> Attentive:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind()


def clients() -> dict[str, TensorDataset]:
    return {name: separable(rows, seed) for seed, (name, rows) in enumerate(SIZES.items(), 1)}


def arguments(**changes: Any) -> dict[str, Any]:
    found = {
        "model": model(),
        "clients": clients(),
        "options": {"gamma": 64, "calibration_batches": 2},
        "head": ["classifier"],
        "test": separable(30, 9),
        "lora": {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["qkv"]},
        "training": {"rounds": 3, "batch_size": 8, "lr": 0.1},
        "machine": {"threads": 1, "device": "cpu"},
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def federation(**changes: Any) -> Federation:
    return Federation(**arguments(**changes))


@pytest.fixture
def carry_out(tmp_path: Path) -> Callable[..., Result]:
    """Run a federation, in a new folder unless one is named."""

    def call(own: Federation, folder: str = "run", **more: Any) -> Result:
        return own.run(tmp_path / folder, console=Console(file=io.StringIO()), **more)

    return call


CarryOut = Callable[..., Result]


def timeless(result: Result) -> list[dict[str, Any]]:
    return [line for line in result.metrics if not line["name"].startswith("seconds")]


def of_client(result: Result, client: str, name: str) -> list[float]:
    return [line["value"] for line in result.metrics if (line["client"], line["name"]) == (client, name)]


def measured(one: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Accuracy and loss, by hand."""
    tokens, labels = data.tensors
    with torch.no_grad():
        logits = one.eval()(tokens)
    hits = (logits.argmax(dim=-1) == labels).double().mean()
    return float(hits), float(functional.cross_entropy(logits, labels))


# -- what comes out ----------------------------------------------------------------------------------


GLOBAL = [name for name in methods.names() if methods.find(name).traits.global_model]


@pytest.mark.parametrize("method", sorted(set(methods.names()) - set(GLOBAL)))
def test_model_is_an_error_without_a_global_model(carry_out: CarryOut, method: str) -> None:
    own = federation(method=method, options=None)
    result = carry_out(own)
    assert len(result.values("mean_of_clients")) > 0
    assert not (result.folder / "model").exists()
    with pytest.raises(ValueError, match=f"{method!r} has no global model"):
        own.model()


@pytest.mark.parametrize("method", by_family(GLOBAL))
def test_it_learns_a_separable_task_and_returns_the_evaluated_model(carry_out: CarryOut, method: str) -> None:
    options = {} if method == "fedsmoothlora" else {"options": None}
    training = {"rounds": 8, "batch_size": 8, "lr": 0.2}
    own = federation(method=method, training=training, **options)
    result = carry_out(own)
    accuracies = result.values("accuracy")
    assert len(accuracies) == 9
    assert accuracies[0] < 0.7
    assert result.accuracy > 0.95

    merged = own.model()
    accuracy, loss = measured(merged, separable(30, 9))
    assert accuracy == pytest.approx(result.accuracy)
    assert loss == pytest.approx(result.values("loss")[-1], rel=1e-4)
    assert type(merged) is Attentive
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert [name for name, _ in merged.named_parameters()] == [n for n, _ in model().named_parameters()]
    before, after = model().state_dict(), merged.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"qkv.weight", "classifier.weight", "classifier.bias"}


def test_the_given_model_is_not_changed(carry_out: CarryOut) -> None:
    given = model()
    given.embed.requires_grad_(False)
    given.qkv.train()
    given.dropout.eval()
    before = copy.deepcopy(given)
    own = federation(model=given)
    carry_out(own)
    own.model()
    for name, value in given.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    flags = {name: parameter.requires_grad for name, parameter in given.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in before.named_parameters()}
    assert all(parameter.grad is None for parameter in given.parameters())
    modes = {name: module.training for name, module in given.named_modules()}
    assert modes == {name: module.training for name, module in before.named_modules()}
    assert not given.qkv._forward_hooks
    assert not any(isinstance(module, LoraLayer) for module in given.modules())


def test_before_any_run_the_model_is_the_given_one() -> None:
    merged = federation().model().state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in model().state_dict().items())


def test_the_first_run_trains_the_model_that_was_checked(
    carry_out: CarryOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[AdaptedModel] = []
    build = AdaptedModel.__init__

    def counted(self: AdaptedModel, *arguments: Any, **more: Any) -> None:
        made.append(self)
        build(self, *arguments, **more)

    monkeypatch.setattr(AdaptedModel, "__init__", counted)
    own = federation(training={"rounds": 1, "steps": 1})
    first = carry_out(own, "first")
    assert len(made) == 1
    second = carry_out(own, "second")
    assert len(made) == 2
    assert timeless(second) == timeless(first)


def test_there_is_no_adapter_before_a_round_is_finished(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no round is finished"):
        federation().save_adapter(tmp_path / "adapter")


def test_rows_that_are_dictionaries_give_the_same_metrics(carry_out: CarryOut) -> None:
    pairs = carry_out(federation(), "pairs")
    named = federation(
        model=model(Named),
        clients={name: AsDictionaries(data) for name, data in clients().items()},
        test=AsDictionaries(separable(30, 9)),
    )
    assert timeless(carry_out(named, "named")) == timeless(pairs)


def test_sections_may_be_instances_of_their_settings_classes() -> None:
    tables = {
        "lora": {"r": 2, "alpha": 4.0, "target_modules": ["qkv"]},
        "training": {"rounds": 3, "lr": 0.1, "batch_size": 8},
        "machine": {"threads": 1, "device": "cpu"},
    }
    instances = {
        "lora": LoraSettings(r=2, alpha=4.0, target_modules=("qkv",)),
        "training": TrainingSettings(rounds=3, lr=0.1, batch_size=8),
        "machine": MachineSettings(threads=1, device="cpu"),
    }
    assert federation(**instances).settings == federation(**tables).settings


def test_values_and_classes_of_instances_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"training\.rounds = 0"):
        federation(training=TrainingSettings(rounds=0))
    with pytest.raises(ConfigError, match="training is given as LoraSettings; it must be TrainingSettings"):
        federation(training=LoraSettings())


def test_a_list_of_clients_is_numbered(carry_out: CarryOut) -> None:
    result = carry_out(federation(clients=list(clients().values()), training={"rounds": 1, "steps": 1}))
    assert {line["client"] for line in result.metrics} == {None, "0", "1"}
    assert [of_client(result, name, "samples") for name in ("0", "1")] == [[40], [25]]


def test_client_ids_that_are_numbers_work_or_are_refused_at_once(carry_out: CarryOut) -> None:
    short = {"training": {"rounds": 1, "steps": 1}}
    try:
        own = federation(clients={7: separable(12, 1)}, **short)
    except ValueError:
        return
    carry_out(own)


def test_labels_may_be_of_any_integer_type(carry_out: CarryOut) -> None:
    tokens, labels = separable(30, 9).tensors
    narrow = TensorDataset(tokens, labels.int())
    short = {"training": {"rounds": 1, "steps": 1}}
    wide = carry_out(federation(clients=[separable(30, 9)], **short), "wide")
    assert timeless(carry_out(federation(clients=[narrow], test=narrow, **short), "narrow")) == timeless(wide)


class Squares:
    """A regression."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return functional.mse_loss(model(batch["inputs"])[:, 0], batch["labels"])

    def parts(self, batch: dict[str, Tensor], count: int) -> list[tuple[dict[str, Tensor], float]]:
        return [(batch, 1.0)]

    def evaluate(self, model: nn.Module, examples: Any, batch_size: int, to_device: Any) -> Evaluation:
        loss = self.loss(model.eval(), examples.batch(range(len(examples))))
        return Evaluation({"loss": float(loss.detach())})


def test_a_regression_s_targets_reach_its_loss_unchanged(carry_out: CarryOut) -> None:
    rows = TensorDataset(torch.zeros(4, 4, 6), torch.tensor([-0.45, -0.45, 0.35, 0.35]))
    own = federation(clients=[rows], test=rows, objective=Squares(), training={"rounds": 1, "steps": 1})
    with torch.no_grad():
        output = model().eval()(torch.zeros(4, 4, 6))[:, 0]
    wanted = functional.mse_loss(output, rows.tensors[1])
    assert carry_out(own).values("loss")[0] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("where", ["clients", "test", "validation"])
def test_float_labels_are_refused_for_classification_by_the_data_s_name(where: str) -> None:
    wrong = TensorDataset(torch.zeros(4, 4, 6), torch.tensor([-0.45, 1.0, 0.0, 2.0]))
    given = wrong if where == "test" else {"north": wrong}
    name = {"clients": "client north", "validation": "validation of client north"}.get(where, where)
    with pytest.raises(DataError, match=rf"^{name}: the labels are torch.float32: .*number of a class"):
        federation(**{where: given})


def test_booleans_are_classes_0_and_1(carry_out: CarryOut) -> None:
    tokens, labels = separable(30, 9).tensors
    short = {"training": {"rounds": 1, "steps": 1}}
    results = [
        carry_out(federation(clients=[rows], test=rows, **short), folder)
        for folder, rows in (
            ("bool", TensorDataset(tokens, labels > 0)),
            ("int", TensorDataset(tokens, (labels > 0).long())),
        )
    ]
    assert timeless(results[0]) == timeless(results[1])


def test_one_hot_labels_are_refused_for_classification() -> None:
    tokens, labels = separable(8, 9).tensors
    with pytest.raises(DataError, match=r"client 0: labels of the shape \(1, 3\): .* one class for each row"):
        federation(clients=[TensorDataset(tokens, functional.one_hot(labels))])


def test_without_a_test_set_the_global_metrics_are_the_clients_means_weighted_by_size(
    carry_out: CarryOut,
) -> None:
    validation = {"north": separable(9, 5), "south": separable(21, 6)}
    own = federation(test=None, validation=validation)
    result = carry_out(own)
    for name in ("accuracy", "loss", "macro_f1", "auroc"):
        north, south = (of_client(result, client, name) for client in SIZES)
        wanted = [(9 * a + 21 * b) / 30 for a, b in zip(north, south, strict=True)]
        assert result.values(name) == pytest.approx(wanted, rel=1e-12)
        assert len(wanted) == 4
    for client, data in validation.items():
        accuracy, loss = measured(own.model(), data)
        assert of_client(result, client, "accuracy")[-1] == pytest.approx(accuracy)
        assert of_client(result, client, "loss")[-1] == pytest.approx(loss, rel=1e-4)


def test_clients_own_models_are_measured_before_averaging(carry_out: CarryOut) -> None:
    """The average of one client's model is that model."""
    one = {"clients": {"north": separable(40, 1)}, "validation": {"north": separable(21, 6)}, "test": None}
    result = carry_out(federation(method="fedit", options=None, evaluation={"clients": True}, **one))
    for name in ("accuracy", "loss"):
        own, overall = of_client(result, "north", f"own_{name}"), result.values(name)
        assert own == pytest.approx(overall[1:], rel=1e-4)
    assert len(set(of_client(result, "north", "own_loss"))) == 3


def test_only_clients_with_validation_rows_have_metrics_of_their_own_models(carry_out: CarryOut) -> None:
    result = carry_out(federation(validation={"south": separable(21, 6)}, evaluation={"clients": True}))
    assert len(of_client(result, "south", "own_accuracy")) == 3
    assert of_client(result, "north", "own_accuracy") == []


def test_a_first_metric_that_is_not_a_number_is_not_the_best_of_the_run(carry_out: CarryOut) -> None:
    class Late(Classification):
        evaluations = 0

        def evaluate(self, *given: Any) -> Evaluation:
            self.evaluations += 1
            found = super().evaluate(*given)
            return Evaluation({**found.metrics, "accuracy": math.nan if self.evaluations == 1 else 0.5})

    short = {"training": {"rounds": 3, "steps": 1}, "checkpoint": {"keep": 1}}
    result = carry_out(federation(objective=Late(), **short))
    assert math.isnan(result.values("accuracy")[0])
    kept = sorted(path.stem for path in (result.folder / "checkpoints").glob("*.json"))
    assert kept == ["0001", "0003"]  # the first of equal ones, and the newest


@pytest.mark.report
def test_the_folder_is_that_of_a_run_with_its_report(carry_out: CarryOut, tmp_path: Path) -> None:
    carry_out(federation(training={"rounds": 1, "steps": 1}))
    folder = tmp_path / "run"
    assert (folder / "report.html").stat().st_size > 1000
    assert not (folder / "model").exists()
    assert json.loads((folder / "confusion.json").read_text())["classes"] == ["0", "1", "2"]


def test_it_gives_the_metrics_of_the_same_run_from_a_configuration(
    toy_table: dict[str, Any], carry_out: CarryOut, tmp_path: Path
) -> None:
    toy_table["data"]["validation"] = 0.2
    config = read(toy_table)
    wanted = session.run(config, out=tmp_path / "configured", console=Console(file=io.StringIO()))
    planned = plan(config)
    loaded = load_image_classifier(config.model, planned.classes, config.seed)

    class Images(Dataset):
        def __init__(self, images: Any, rows: Any) -> None:
            self.examples, self.rows = ImageExamples(images, loaded.processor), rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {name: value[0] for name, value in self.examples.batch([int(self.rows[row])]).items()}

    sections = {name: toy_table[name] for name in ("lora", "training", "evaluation", "machine")}
    own = Federation(
        loaded.model,
        {
            client: Images(planned.train, planned.training_rows(client))
            for client in planned.partition.clients
        },
        options={"gamma": 64, "calibration_batches": 2},
        head=loaded.head,
        test=Images(planned.test, range(64)),
        validation={client: Images(planned.train, rows) for client, rows in planned.validation.items()},
        **sections,
    )
    assert timeless(carry_out(own, "own")) == timeless(wanted)


# -- stopping and going on ---------------------------------------------------------------------------


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``ctrl_c(3)``: someone presses it during the third visit."""

    def at(number: int) -> None:
        visits, visit = 0, Learner.visit

        def interrupted(self: Learner, *arguments: Any) -> Any:
            nonlocal visits
            visits += 1
            if visits == number:
                os.kill(os.getpid(), signal.SIGINT)
            return visit(self, *arguments)

        monkeypatch.setattr(Learner, "visit", interrupted)

    return at


def test_a_stopped_and_resumed_run_ends_like_an_uninterrupted_one(
    carry_out: CarryOut, ctrl_c: Callable[[int], None]
) -> None:
    whole = federation()
    wanted = carry_out(whole, "whole")
    ctrl_c(3)
    with pytest.raises(InterruptedRunError):
        carry_out(federation())
    again = federation()
    assert timeless(carry_out(again, resume=True)) == timeless(wanted)
    found = again.model().state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.model().state_dict().items())


def test_a_stopped_federation_object_can_resume_its_own_run(
    carry_out: CarryOut, ctrl_c: Callable[[int], None]
) -> None:
    wanted = carry_out(federation(), "whole")
    ctrl_c(5)
    own = federation()
    with pytest.raises(InterruptedRunError):
        carry_out(own)
    assert timeless(carry_out(own, resume=True)) == timeless(wanted)


def test_a_second_run_of_a_federation_begins_at_the_beginning_or_is_refused(carry_out: CarryOut) -> None:
    own = federation(training={"rounds": 2, "steps": 2})
    first = carry_out(own, "first")
    try:
        second = carry_out(own, "second")
    except (ConfigError, ValueError):
        return
    assert timeless(second) == timeless(first)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"training": {"rounds": 1, "batch_size": 8, "lr": 0.2}}, r"training\.lr"),
        ({"options": {"gamma": 32, "calibration_batches": 2}}, r"method\.gamma"),
        ({"method": "fedit", "options": None}, r"method\."),
        ({"seed": 5}, "seed"),
        ({"lora": {"r": 1, "alpha": 4, "dropout": 0.1, "target_modules": ["qkv"]}}, r"lora\.r"),
    ],
)
def test_other_settings_are_refused_by_their_key(
    carry_out: CarryOut, change: dict[str, Any], key: str
) -> None:
    short = {"training": {"rounds": 1, "batch_size": 8, "lr": 0.1}}
    first = carry_out(federation(**short))
    with pytest.raises(ConfigError, match=f"{key}.* differs"):
        carry_out(federation(**{**short, **change}), resume=True)
    assert carry_out(federation(**short), resume=True).metrics == first.metrics


@pytest.mark.parametrize(
    "change",
    [{"head": ()}, {"clients": {"east": separable(12, 1)}}],
    ids=["head", "clients"],
)
def test_another_head_or_other_clients_are_refused(
    carry_out: CarryOut, ctrl_c: Callable[[int], None], change: dict[str, Any]
) -> None:
    ctrl_c(3)
    with pytest.raises(InterruptedRunError):
        carry_out(federation())
    with pytest.raises(ConfigError, match=r"head|clients"):
        carry_out(federation(**change), resume=True)


def test_resuming_needs_a_folder_with_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out=DIR"):
        federation().run(resume=True)
    with pytest.raises(ConfigError, match="not a run's folder"):
        federation().run(tmp_path, resume=True)


def test_a_folder_in_use_is_refused(carry_out: CarryOut, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        carry_out(federation())


# -- what cannot be right ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clients": {}}, "at least one client"),
        ({"clients": []}, "at least one client"),
        ({"clients": {"north": separable(8, 1), "south": TensorDataset(torch.empty(0, 4, 6))}},
         "client south has no rows"),
        ({"clients": {"north": TensorDataset(torch.zeros(4, 4, 6))}}, "client north: its rows are tuple"),
        ({"clients": {"north": [{"tokens": 1, "label": 2}]}}, "client north: .*'labels'"),
        ({"clients": {1: separable(8, 1), "1": separable(8, 2)}}, "two clients have the id '1'"),
        ({"clients": {"1": separable(8, 1)}, "validation": {1: separable(3, 1), "1": separable(3, 2)}},
         "two clients have the id '1'"),
        ({"test": []}, "test has no rows"),
        ({"test": [3]}, "test: its rows are int"),
        ({"validation": {"north": []}}, "validation of client north has no rows"),
        ({"validation": {"nroth": separable(3, 1)}}, r"\['nroth'\].*\['north', 'south'\]"),
        ({"test": None}, "test= or validation="),
        ({"test": None, "validation": {}}, "test= or validation="),
        ({"lora": {"target_modules": ["qvk"]}}, "'qvk' matches no layer; did you mean 'qkv'"),
        ({"lora": {"target_modules": ["dropout"]}}, "'dropout' is not a linear layer"),
        ({"lora": {"target_modules": ["qkv", "classifier"], "r": 1}}, "classifier is the head"),
        ({"lora": {"target_modules": ["qkv"], "r": 13}}, r"lora\.r: layer qkv is 36 x 12"),
        ({"lora": {"target_modules": ["qkv"], "r": 7}}, "qkv"),
        ({"lora": {"target_modules": []}, "head": ()}, "nothing to train"),
        ({"training": {"head_lr": 0.1}, "head": ()}, r"training\.head_lr = 0\.1: the model has no head"),
        pytest.param(
            {"head": ["clasifier"]},
            "head.*clasifier.*classifier",
        ),
        ({"model": model().double()}, "layer qkv: .*float32"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused_before_any_work(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        federation(**change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"round": 3}}, "Federation: training.round: unknown key; did you mean 'rounds'"),
        ({"trainin": {"rounds": 3}}, "Federation: trainin: unknown key; did you mean 'training'"),
        ({"data": {"source": "x"}}, "Federation: data: unknown key"),
        ({"training": {"rounds": 0}}, "training.rounds = 0"),
        ({"training": {"epochs": 1, "steps": 1}}, "training.epochs = 1 and training.steps = 1"),
        ({"training": 3}, r"training = 3 must be a section"),
        pytest.param(
            {"seed": -1},
            "seed = -1",
        ),
        ({"options": {"gama": 3}}, "method.gama: unknown key; did you mean 'gamma'"),
        ({"method": "fedit"}, "method.gamma: unknown key"),
        ({"method": "fedsmooth"}, "method.name: .*'fedsmooth'"),
        ({"options": {"gamma": -1}}, "method.gamma = -1"),
    ],
)
def test_settings_are_checked_like_a_configuration(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        federation(**change)


def test_a_head_without_lora_is_trained_alone(carry_out: CarryOut) -> None:
    own = federation(lora={"target_modules": []}, training={"rounds": 1, "batch_size": 8, "lr": 0.1})
    carry_out(own)
    before, after = model().state_dict(), own.model().state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_lora_without_a_head_does_not_train_the_head(carry_out: CarryOut) -> None:
    own = federation(head=(), training={"rounds": 1, "batch_size": 8, "lr": 0.1})
    carry_out(own)
    before, after = model().state_dict(), own.model().state_dict()
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == {"qkv.weight"}


# -- the user's own text models -----------------------------------------------------------------------


def spelled(rows: int, start: int, labelled: bool) -> list[dict[str, Any]]:
    """Rows of different lengths: a letter, often enough, and after it the same letter, or its class."""
    found = []
    for number in range(start, start + rows):
        letter, length = 65 + number % 3, 2 + number % 5
        ids = [letter] * length
        if labelled:
            found.append({"input_ids": ids, "labels": number % 3})
        else:
            found.append({"input_ids": [*ids, letter, 256], "labels": [-100] * length + [letter, 256]})
    return found


@pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])
def test_one_s_own_language_model_learns_from_dictionaries_of_tokens(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(which), dtype=torch.float32)
    clients = {"a": spelled(12, 0, labelled=False), "b": spelled(12, 12, labelled=False)}
    federation = Federation(
        model,
        clients,
        test=spelled(9, 30, labelled=False),
        lora={"r": 2, "target_modules": ["all-linear"]},
        options={"gamma": 64, "calibration_batches": 1},
        training={
            "rounds": 2,
            "steps": 6,
            "batch_size": 6,
            "accumulation": 2,
            "optimizer": "adamw",
            "lr": 0.02,
        },
        machine={"threads": 1, "device": "cpu"},
    )
    result = federation.run(out=tmp_path / "run", console=Console(file=io.StringIO()))
    losses = result.values("loss")
    assert losses[-1] < 0.7 * losses[0]
    # Transformers' own loss, row by row, unpadded.
    trained, total, tokens = federation.model(), 0.0, 0
    for row in spelled(9, 30, labelled=False):
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            total += float(trained(**batch).loss) * 2
        tokens += 2
    assert losses[-1] == pytest.approx(total / tokens, rel=1e-4)


def test_one_s_own_classifier_learns_from_dictionaries_of_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    federation = Federation(
        model,
        [spelled(12, 0, labelled=True), spelled(12, 12, labelled=True)],
        test=spelled(9, 30, labelled=True),
        head=["classifier"],
        lora={"r": 2, "target_modules": ["query", "value"]},
        options={"gamma": 64, "calibration_batches": 1},
        training={"rounds": 2, "steps": 6, "batch_size": 6, "optimizer": "adamw", "lr": 0.02},
        machine={"threads": 1, "device": "cpu"},
    )
    result = federation.run(out=tmp_path / "run", console=Console(file=io.StringIO()))
    assert result.values("accuracy")[-1] == 1.0


def test_an_objective_that_cannot_cut_batches_is_refused_with_accumulation() -> None:
    class Plain:
        loss = staticmethod(lambda model, batch: torch.zeros(()))
        evaluate = None

    with pytest.raises(ValueError, match=r"training\.accumulation = 2: the given objective has no parts\(\)"):
        Federation(
            nn.Linear(4, 2),
            [[(torch.zeros(4), 0)]],
            test=[(torch.zeros(4), 0)],
            head=[],
            lora={"target_modules": []},
            objective=Plain(),  # type: ignore[arg-type]
            training={"accumulation": 2, "batch_size": 4},
        )


def test_the_given_model_is_shared_where_nothing_changes_it_and_never_written_to() -> None:
    class Tied(nn.Module):
        """A head tied to the first layer, so that the head's training changes that too."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16, bias=False)
            self.norm = nn.LayerNorm(16)
            self.hidden = nn.Linear(16, 16)
            self.classifier = nn.Linear(16, 16, bias=False)
            self.classifier.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(torch.relu(self.hidden(self.norm(self.first(x)))))

    torch.manual_seed(0)
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    federation = Federation(
        model,
        [TensorDataset(torch.randn(8, 16), torch.arange(8) % 4)],
        test=TensorDataset(torch.randn(8, 16), torch.arange(8) % 4),
        head=["classifier"],
        lora={"r": 2, "target_modules": ["hidden"]},
        options={"calibration_batches": 1},
        training={"rounds": 2, "batch_size": 4, "lr": 0.05},
    )
    working = federation._working_copy()
    assert working.norm.weight.data_ptr() == model.norm.weight.data_ptr()
    assert working.classifier.weight is working.first.weight
    for name in ("hidden", "classifier", "first"):
        assert working.get_submodule(name).weight.data_ptr() != model.get_submodule(name).weight.data_ptr(), (
            name
        )
    assert model.norm.weight.requires_grad
    for record in run_rounds(federation._begin(RunContext()), Callback()):
        assert record.value("loss") is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def own_llama(folder: Path, kind: str) -> nn.Module:
    """One's own model, loaded by transformers alone."""
    if kind == "bfloat16":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantised = BitsAndBytesConfig(**how)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantised)


@pytest.mark.parametrize("kind", ["nf4", "int8", "bfloat16"])
def test_one_s_own_quantised_or_bfloat16_model_learns_and_is_left_as_it_was(
    kind: str, wide_llama: Path, carry_out: CarryOut, tmp_path: Path
) -> None:
    model = own_llama(wide_llama, kind)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        model.train()(ids)  # it was used before
    before = {name: value.clone() for name, value in model.state_dict().items()}
    federation = Federation(
        model,
        [spelled(12, 0, labelled=False), spelled(12, 40, labelled=False)],
        options={"calibration_batches": 1, "gamma": 64},
        test=spelled(12, 0, labelled=False),
        lora={"r": 2, "alpha": 4, "target_modules": ["all-linear"]},
        training={"rounds": 2, "steps": 6, "batch_size": 4, "lr": 0.02, "optimizer": "adamw"},
        machine={"threads": 1, "device": "cpu"},
    )
    losses = carry_out(federation).values("loss")
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    merged = federation.model().train()  # 8 bits: as in training
    adapter = load_adapter(federation.save_adapter(tmp_path / "adapter"), own_llama(wide_llama, kind)).train()
    with torch.no_grad():
        wanted, found = merged(ids).logits.float(), adapter(ids).logits.float()
        untrained = model(ids).logits.float()
    close = 0.05 if kind == "bfloat16" else 1e-3
    assert float((found - wanted).norm()) < close * float(wanted.norm())
    assert float((wanted - untrained).norm()) > 3 * close * float(wanted.norm())


def test_training_quantised_weights_themselves_is_refused(wide_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"'full' trains the weights .* take a method that trains LoRA"):
        Federation(
            own_llama(wide_llama, "nf4"),
            [spelled(12, 0, labelled=False)],
            method="full",
            test=spelled(12, 0, labelled=False),
            lora={"target_modules": ["all-linear"]},
        )


def test_a_quantised_head_cannot_be_trained_whole() -> None:
    model = nn.Sequential(nn.Linear(64, 64), bnb.nn.LinearNF4(64, 64))
    model[1].to("cpu")
    with pytest.raises(ValueError, match="head has quantised weights"):
        Federation(
            model,
            [TensorDataset(torch.randn(8, 64), torch.arange(8))],
            test=TensorDataset(torch.randn(8, 64), torch.arange(8)),
            head=["1"],
            lora={"r": 2, "target_modules": ["0"]},
        )


# -- a method of the user's own ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Anchored(Method):
    """Anchored: clients restart from a prepared part of the pretrained weights, and a share is merged."""

    share: Annotated[float, Gt(0)] = 1.0
    note: str | None = None

    name: ClassVar[str] = "anchored"
    prepared: ClassVar[list[str]] = []  # by whom `prepare` was called

    def prepare(self, layers: Mapping[str, Layer], pretrained: Callable[[str], Tensor]) -> Products:
        self.prepared.append(str(os.getpid()))
        return {name: LowRank.from_dense(pretrained(name), layer.rank) for name, layer in layers.items()}

    def start(self, client: ClientView) -> Start:
        lora = {name: client.prepared[name] for name in client.layers}
        return Start(lora=lora, shift={name: -product for name, product in lora.items()})

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        means = mean_factors(uploads, weights, server.layers)
        return ServerUpdate(merge={n: (mean - server.prepared[n]) * self.share for n, mean in means.items()})


def test_a_method_of_ones_own_is_an_instance(carry_out: CarryOut) -> None:
    own = federation(method=Anchored(share=0.5), options=None)
    result = carry_out(own)
    assert of_client(result, "north", "train_loss")
    assert '[method]\nname = "anchored"\nshare = 0.5\n' in (result.folder / "config.toml").read_text()
    other = carry_out(federation(method=Anchored(), options=None), "other")
    assert timeless(other) != timeless(result)
    assert "anchored" not in methods.names()


@pytest.mark.skipif(sys.platform != "linux", reason="clients at once are forked processes")
def test_an_own_method_prepares_once_before_round_zero_with_several_processes_too(
    carry_out: CarryOut,
) -> None:
    one = carry_out(federation(method=Anchored(), options=None), "one")
    machine = {"threads": 1, "device": "cpu", "jobs": 2}
    own = federation(method=Anchored(), options=None, machine=machine)
    Anchored.prepared.clear()
    several = carry_out(own, "several")
    assert Anchored.prepared == [str(os.getpid())]
    assert timeless(several) == timeless(one)


def test_a_run_of_an_own_method_is_resumed_with_the_same_options_only(
    carry_out: CarryOut, ctrl_c: Callable[[int], None]
) -> None:
    whole = carry_out(federation(method=Anchored(), options=None), "whole")
    ctrl_c(3)
    with pytest.raises(InterruptedRunError):
        carry_out(federation(method=Anchored(), options=None))
    with pytest.raises(ConfigError, match=r"method\.share"):
        carry_out(federation(method=Anchored(share=0.5), options=None), resume=True)
    again = carry_out(federation(method=Anchored(), options=None), resume=True)
    assert timeless(again) == timeless(whole)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        (Anchored(share=-1.0), None, r"method\.share = -1\.0.*greater than 0"),
        (Anchored(), {"share": 0.5}, "options= belong to the name of a method"),
    ],
)
def test_wrong_options_of_an_own_method_are_refused(method: Method, options: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        federation(method=method, options=options)


def test_an_own_method_needs_a_name_of_its_own() -> None:
    class Nameless(Anchored):
        name = ""

    class Posing(Anchored):
        name = "fedit"

    with pytest.raises(ConfigError, match="Nameless has no name"):
        federation(method=Nameless(), options=None)
    with pytest.raises(ConfigError, match="Posing has the name of another method, 'fedit'"):
        federation(method=Posing(), options=None)
