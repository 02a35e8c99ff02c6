"""Properties of every task of the registry: metrics, early stopping, class weights, padding and exports."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from rich.console import Console

from fedsmoothlora import export, tasks
from fedsmoothlora.config import read
from fedsmoothlora.data.examples import labels_of
from fedsmoothlora.data.tokens import IGNORED
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments import results
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.reports.metrics import METRICS, larger_is_better
from fedsmoothlora.reports.reading import read_metrics
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.tasks.base import NeedsPretrained
from fedsmoothlora.tasks.objectives.class_weights import WeighsClasses
from task_cases import ROWS, configuration

pytest.importorskip("soundfile")

EVERY = pytest.mark.parametrize("kind", tasks.names())
# The main metric of runs without a costly one, and the metrics that are better if they are smaller.
MAIN = {
    **dict.fromkeys(("audio-classification", "image-classification", "text-classification"), "accuracy"),
    **dict.fromkeys(("multi-label", "multi-label-image"), "micro_f1"),
    **{"text-regression": "pearson", "token-classification": "entity_f1"},
    **{"preference": "preference_accuracy", "causal-lm": "loss", "seq2seq": "loss"},
}
SMALLER = {"loss", "perplexity", "mse"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def table(kind: str, tmp_path: Path, tiny_folder: Path, tiny_llama: Path) -> dict[str, Any]:
    return configuration(kind, tmp_path / "case", image_model=tiny_folder, language_model=tiny_llama)


@EVERY
def test_the_main_metric_and_every_other_one_have_a_direction(kind: str) -> None:
    task = tasks.find(kind)
    for name in task.metrics:
        assert METRICS[name].larger_is_better is (name not in SMALLER), name
    # A task that has a costly main metric falls back to the loss, which is always measured.
    assert MAIN[kind] in (task.metrics[0], "loss")
    best = read({"task": {"kind": kind}, "model": {"source": "m"}, "data": {"source": "d"}, "name": "n",
                 "partition": {"kind": "iid", "clients": 2}, "method": {"name": "fedit"},
                 "training": {"rounds": 1}}).checkpoint.best  # fmt: skip
    assert best in task.metrics


@EVERY
def test_a_run_that_learns_nothing_is_stopped_early_and_compared_by_its_main_metric(
    kind: str, table: dict[str, Any], tmp_path: Path
) -> None:
    task = tasks.find(kind)
    table["training"] |= {"rounds": 3, "steps": 1, "patience": 1, "lr": 1e-30}
    if task.classifies or task.weighs_labels:
        table["training"]["class_weights"] = "balanced"
    out = io.StringIO()
    result = run(table, out=tmp_path / "run", console=Console(file=out, width=200))
    best = read(table).checkpoint.best
    assert len(result.values(best)) == 2  # before training and after the first round
    assert f"{best} has not improved for 1 round" in out.getvalue()
    one: Any = SimpleNamespace(metrics=read_metrics(result.folder), config=read(table))
    assert results._metric(None, [one]) == MAIN[kind]
    assert larger_is_better(MAIN[kind]) is (MAIN[kind] not in SMALLER)
    measured = {line["name"] for line in result.metrics if line["round"] == 0 and line["client"] is None}
    assert measured & set(task.metrics) >= {MAIN[kind], "loss"}


@EVERY
def test_class_weights_weigh_the_loss_or_are_refused_with_the_reason(
    kind: str, table: dict[str, Any]
) -> None:
    task = tasks.find(kind)
    if not (task.classifies or task.weighs_labels):
        with pytest.raises(ConfigError, match=rf"class_weights .*task\.kind = '{kind}' has no classes"):
            read(table, {"training.class_weights": "balanced"})
        return
    data = plan(read(table, {"training.class_weights": "balanced"})).task_data
    loaded = data.load()
    objective = data.objective(loaded)
    assert isinstance(objective, WeighsClasses)
    names = data.data.outputs
    labels, batch, model = labels_of(data.train), data.train.batch(range(ROWS // 2)), loaded.model.eval()
    with torch.no_grad():
        plain = objective.loss(model, batch)
        even = objective.weighted(labels, dict.fromkeys(names, 1.0)).loss(model, batch)
        uneven = objective.weighted(labels, {name: 1.0 + 9 * (at == 0) for at, name in enumerate(names)})
        torch.testing.assert_close(even, plain)
        assert abs(float(uneven.loss(model, batch)) - float(plain)) > 1e-5
    with pytest.raises(
        ConfigError, match=rf"names the class 'nosuch'; the classes are {re.escape(names[0])}"
    ):
        plan(read(table, {"training.class_weights": {**dict.fromkeys(names, 1.0), "nosuch": 1.0}}))


_PREPARED: dict[str, tuple[Any, Any, Any]] = {}


def prepared(kind: str, folder: Path, image_model: Path, language_model: Path) -> tuple[Any, Any, Any]:
    """Model, objective and rows of a task; made once."""
    if kind not in _PREPARED:
        table = configuration(kind, folder, image_model=image_model, language_model=language_model)
        data = plan(read(table)).task_data
        loaded = data.load()
        model = loaded.model.eval().double()
        if isinstance(data, NeedsPretrained):
            data.prepare(model, lambda batch: batch)
        _PREPARED[kind] = model, data.objective(loaded), data.train
    return _PREPARED[kind]


def doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: value.double() if value.is_floating_point() and name != "labels" else value
        for name, value in batch.items()
    }


def weight(kind: str, batch: dict[str, torch.Tensor]) -> int:
    """The number of labels of a row, where the loss of a batch is the mean over all labels; else 1."""
    by_token = kind in ("causal-lm", "seq2seq", "token-classification")
    return int((batch["labels"] != IGNORED).sum()) if by_token else 1


@EVERY
@given(drawn=st.data())
@settings(max_examples=8, deadline=None)
def test_the_loss_of_a_batch_is_that_of_its_rows_without_padding(
    kind: str,
    drawn: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    tiny_llama: Path,
) -> None:
    model, objective, rows = prepared(kind, tmp_path_factory.mktemp("case") / kind, tiny_folder, tiny_llama)
    chosen = drawn.draw(st.lists(st.integers(0, len(rows) - 1), min_size=2, max_size=6))
    unpadded = [doubled(rows.batch([row])) for row in chosen]
    weights = [weight(kind, batch) for batch in unpadded]
    with torch.no_grad():
        alone = [float(objective.loss(model, batch)) for batch in unpadded]
        whole = float(objective.loss(model, doubled(rows.batch(chosen))))
    assert whole == pytest.approx(np.average(alone, weights=weights), rel=1e-4, abs=1e-6)


@pytest.mark.release
@EVERY
def test_other_libraries_load_both_exports_and_compute_the_same(
    kind: str, table: dict[str, Any], tmp_path: Path
) -> None:
    """By the class of transformers that the task names, and by PEFT on the pretrained model."""
    task = tasks.find(kind)
    table["training"]["lr"] = 0.02
    result = run(table, out=tmp_path / "run", console=Console(file=io.StringIO()))
    for as_ in ("merged", "adapter"):
        export(result.folder, as_, out=tmp_path / as_, console=Console(file=io.StringIO()))
    data = plan(read(table)).task_data
    inputs = dict(data.train.batch(range(4)))
    labels = inputs.pop("labels")
    inputs.pop("reference", None)
    if kind == "seq2seq":
        inputs["labels"] = labels  # from which the model makes the inputs of its decoder
    auto = getattr(transformers, task.auto_class)
    head: dict[str, Any] = {}
    if kind not in ("causal-lm", "preference", "seq2seq"):
        head["num_labels"] = 1 if kind == "text-regression" else len(data.data.outputs)
    if task.problem_type is not None:
        head["problem_type"] = task.problem_type
    with quiet_libraries(), torch.no_grad():
        merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        base = auto.from_pretrained(table["model"]["source"], dtype=torch.float32, **head).eval()
        before = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        wanted = merged(**inputs).logits
        torch.testing.assert_close(adapted(**inputs).logits, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(wanted, before, atol=1e-3)
    if head:
        outputs = data.data.outputs if kind != "text-regression" else tuple(merged.config.id2label.values())
        assert tuple(merged.config.id2label.values()) == outputs
    if task.problem_type is not None:
        assert merged.config.problem_type == task.problem_type
