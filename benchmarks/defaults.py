"""`python -m benchmarks.defaults`: the accuracy that each task's defaults reach, as a Markdown table.

A run sets the model, the data and the templates that its task needs. It has fewer rows and rounds than by
default, which keeps it short.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
from fedsmoothlora.data.registry import find_packaged
from fedsmoothlora.modeling.loading import model_files
from fedsmoothlora.runs.planning import Plan, plan
from fedsmoothlora.runs.session import run

SEEDS = (0, 1, 2)
_BATCH = 32
PACKAGED = "fedsmoothlora.data.packaged"

Table = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task on packaged data.

    Attributes:
        sections: the model, the data, and the templates of the task.
        limits: rows and rounds, by dotted key.
        metric: the metric that is compared.
        classifier: ``[task]`` of a text classifier that reads the same rows; empty if the task classifies.
    """

    sections: Mapping[str, Mapping[str, Any]]
    limits: Mapping[str, Any]
    metric: str = "accuracy"
    classifier: Mapping[str, Any] = field(default_factory=dict)

    def config(self, seed: int, folder: Path) -> Config:
        """The configuration of the run.

        Args:
            seed: of the run.
            folder: where a language model's rows are written, as a table whose columns its templates name.
        """
        return read(self._table(seed, folder), self.limits)

    def classifying(self, seed: int, folder: Path) -> Config:
        """The configuration by which a classifier reads the same rows."""
        table = self._table(seed, folder)
        if not self.classifier:
            return read(table, self.limits)
        of_run = ("task.max_new", "training.", "method.")
        limits = {key: value for key, value in self.limits.items() if not key.startswith(of_run)}
        return read({**table, "task": dict(self.classifier)}, limits)

    def _table(self, seed: int, folder: Path) -> dict[str, Any]:
        data = dict(self.sections["data"])
        if self.classifier:
            data = _tables(data["source"], folder)
        return {
            "name": "defaults",
            "seed": seed,
            **self.sections,
            "data": data,
            "machine": {"threads": 1},
        }


def _tables(source: str, folder: Path) -> dict[str, str]:
    """The rows of a packaged data set of texts as JSONL files: the paths of its training and test set."""
    files = {}
    folder.mkdir(parents=True, exist_ok=True)
    for key, texts in zip(("source", "test"), find_packaged(source, PACKAGED).load(), strict=True):
        file = folder / f"{key}.jsonl"
        rows = [
            {**texts.row(row), "label": texts.classes[label]}
            for row, label in enumerate(texts.labels.tolist())
        ]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        files[key] = str(file)
    return files


CASES: dict[str, Case] = {
    "image-classification": Case(
        sections={"model": {"source": "pkg:dinov2-small"}, "data": {"source": "pkg:mnist-5k"}},
        limits={"model.image_size": 28, "training.rounds": 2},
    ),
    "text-classification": Case(
        sections={
            "model": {"source": "pkg:minilm-l6-first-token"},
            "data": {"source": "pkg:bbc-news"},
            "task": {"kind": "text-classification"},
        },
        limits={"data.train_rows": 400, "data.test_rows": 200, "task.max_length": 32, "training.rounds": 3},
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
            "method.name": "fedsmoothlora",
            "method.calibration_batches": 2,
            "training.rounds": 2,
        },
        metric="exact_match",
        classifier={"kind": "text-classification"},
    ),
}


# Tasks for which a logistic regression on frozen features is no reference. docs/tasks.md says what their
# recipes reach.
WITHOUT_REFERENCE = (
    *("text-regression", "multi-label", "token-classification", "seq2seq", "preference"),
    *("multi-label-image", "audio-classification"),
)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The metrics of one seed on the test rows.

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
    config = case.config(seed, folder / "data")
    result = run(config, out=folder / "run", console=Console(file=io.StringIO()), outputs=False)
    planned = plan(case.classifying(seed, folder / "data"))
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
