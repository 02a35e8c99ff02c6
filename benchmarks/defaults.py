"""`python -m benchmarks.defaults`: the accuracy that each task's defaults reach, as a Markdown table.

A run sets the model, the data and the templates that its task needs. Fewer rows and rounds than by default keep
it short.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel

from fedsmoothlora.config import Config, read
from fedsmoothlora.data.examples import Examples
from fedsmoothlora.modeling.loading import model_files
from fedsmoothlora.runs.planning import Plan, plan
from fedsmoothlora.runs.session import run

SEEDS = (0, 1, 2)
_BATCH = 32

Table = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task on packaged data.

    Attributes:
        sections: the model, the data, and the templates of the task.
        limits: rows and rounds, by dotted key.
        classifier: keys by which a text classifier reads the same rows; empty for a task that classifies.
        metric: the metric that is compared.
    """

    sections: Mapping[str, Mapping[str, Any]]
    limits: Mapping[str, Any]
    classifier: Mapping[str, Any]
    metric: str = "accuracy"

    def config(self, seed: int) -> Config:
        """The configuration of the run."""
        table = {"name": "defaults", "seed": seed, **self.sections, "machine": {"threads": 1}}
        return read(table, self.limits)

    def classifying(self, seed: int) -> Config:
        """The configuration by which a classifier reads the same rows."""
        if not self.classifier:
            return self.config(seed)
        limits = {key: value for key, value in self.limits.items() if not key.startswith("task.metric")}
        table = {"name": "features", "seed": seed, **self.sections, "task": dict(self.classifier)}
        return read(table, limits)


CASES: dict[str, Case] = {
    "image-classification": Case(
        sections={"model": {"source": "pkg:dinov2-small"}, "data": {"source": "pkg:mnist-5k"}},
        limits={"model.image_size": 28, "training.rounds": 2},
        classifier={},
    ),
    "text-classification": Case(
        sections={
            "model": {"source": "pkg:minilm-l6-first-token"},
            "data": {"source": "pkg:bbc-news"},
            "task": {"kind": "text-classification"},
        },
        limits={"data.train_rows": 400, "data.test_rows": 200, "task.max_length": 32, "training.rounds": 3},
        classifier={},
    ),
    "causal-lm": Case(
        sections={
            "model": {"source": "pkg:smollm2-135m"},
            "data": {"source": "pkg:bbc-news"},
            "task": {
                "kind": "causal-lm",
                "prompt": "{text}\nTopic:",
                "answer": " {label}",
                "metric": "exact-match",
            },
        },
        limits={
            "data.train_rows": 160,
            "data.test_rows": 50,
            "task.max_length": 64,
            "task.max_new_tokens": 4,
            "partition.clients": 2,
            "method.calibration_batches": 2,
            "training.rounds": 2,
        },
        classifier={"kind": "text-classification"},
        metric="exact_match",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What one seed reached on the test rows.

    Attributes:
        majority: the share of the most frequent class.
        reached: the run's metric after its last round.
        reference: the accuracy of a logistic regression on frozen features.
    """

    majority: float
    reached: float
    reference: float

    @property
    def share(self) -> float:
        """The share of the gap between majority and reference that the run closed."""
        return (self.reached - self.majority) / (self.reference - self.majority)


def learned(case: Case, seed: int, folder: Path) -> Learned:
    """Run a case with one seed in ``folder``, and fit its reference."""
    result = run(case.config(seed), out=folder, console=Console(file=io.StringIO()), outputs=False)
    planned = plan(case.classifying(seed))
    test = planned.task_data.test
    assert test is not None
    features = _frozen(planned)
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    train_rows, train_labels = features(planned.task_data.train)
    test_rows, test_labels = features(test)
    reference.fit(train_rows, train_labels)
    counts = np.bincount(test_labels)
    return Learned(
        majority=float(counts.max() / counts.sum()),
        reached=result.values(case.metric)[-1],
        reference=float(reference.score(test_rows, test_labels)),
    )


def _frozen(planned: Plan) -> Any:
    """A function that turns rows into the means of the pretrained model's last hidden states, and labels."""
    model = AutoModel.from_pretrained(**model_files(planned.config.model)).eval()

    @torch.inference_mode()
    def features(examples: Examples) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        vectors, labels = [], []
        for first in range(0, len(examples), _BATCH):
            batch = dict(examples.batch(np.arange(first, min(first + _BATCH, len(examples)))))
            labels.append(batch.pop("labels"))
            hidden = model(**batch).last_hidden_state  # (rows, tokens, width)
            weight = batch.get("attention_mask", torch.ones(hidden.shape[:2]))[..., None]
            vectors.append((hidden * weight).sum(dim=1) / weight.sum(dim=1))
        return torch.cat(vectors).numpy(), torch.cat(labels).numpy()

    return features


def lines(tasks: Mapping[str, Case], seeds: tuple[int, ...]) -> Iterator[str]:
    """The Markdown table, a line for each task as soon as it is measured."""
    named = ", ".join(map(str, seeds))
    yield f"| task | model, data | most frequent class | defaults (seeds {named}) | logistic regression |"
    yield "|---|---|---|---|---|"
    for task, case in tasks.items():
        with tempfile.TemporaryDirectory() as folder:
            found = [learned(case, seed, Path(folder) / str(seed)) for seed in seeds]
        sources = f"`{case.sections['model']['source']}`, `{case.sections['data']['source']}`"
        reached = ", ".join(f"{one.reached:.3f}" for one in found)
        majority, reference = (
            fmean(getattr(one, name) for one in found) for name in ("majority", "reference")
        )
        yield f"| `{task}` | {sources} | {majority:.3f} | {reached} | {reference:.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(CASES), help="one task; may be repeated")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the number of seeds")
    arguments = parser.parse_args()
    chosen = {task: case for task, case in CASES.items() if task in (arguments.only or CASES)}
    for line in lines(chosen, tuple(range(arguments.seeds))):
        print(line, flush=True)


if __name__ == "__main__":
    main()
