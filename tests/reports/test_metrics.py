"""The catalogue has exactly the metrics that federations write."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsmoothlora import tasks
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.federation.engines.in_process import InProcess
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.federation.round_metrics import personal_at_end
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.reports.metrics import METRICS, QUALITY, is_known, larger_is_better, metric
from fedsmoothlora.runs.planning import build, plan
from layer_names import QUERY
from task_runs import KINDS, model_for, rows_of, table_of, write_rows

Make = Callable[..., Simulation]

# Written where clients are on other machines; tests/engines/test_flower_engine.py looks for them.
BY_FLOWER = {"seconds_loading", "bytes_down_validation", "numbers_cut"}


class WrongRows(InProcess):
    """The first client of a round claims to have no rows, so that its upload is refused."""

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        for answer in super().train(simulation, clients, message, callback):
            refused = answer.client == clients[0]
            yield replace(answer, reply=replace(answer.reply, samples=0)) if refused else answer


def names(records: Iterable[RoundRecord]) -> set[str]:
    return {figure.name for record in records for figure in record.metrics}


def language_model(model: Path, folder: Path) -> Simulation:
    rows = [{"question": f"say {word}", "reply": word} for word in ("red", "blue", "green", "grey") * 6]
    source = folder / "own.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table: dict[str, Any] = {
        "name": "own",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(source), "validation": 0.2},
        "task": {
            **{"kind": "causal-lm", "prompt": "{question}?", "answer": " {reply}", "max_length": 32},
            **{"metric": "exact-match", "metric_rows": 2, "max_new_tokens": 4},
        },
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedit"},
        "training": {"rounds": 1, "steps": 1, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }
    return build(plan(read(table)))


def short_run(kind: str, folder: Path) -> Simulation:
    """A run of one step of a task for texts."""
    folder.mkdir()
    table = table_of(kind, model_for(kind, folder / "model"), write_rows(folder, rows_of(kind, 16)))
    return build(plan(read(table, {"training.rounds": 1, "training.steps": 1})))


def preferences(model: Path, folder: Path) -> Simulation:
    rows = [{"prompt": f"say {word}: ", "chosen": word, "rejected": "no"} for word in ("red", "blue") * 8]
    source = folder / "preferences.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table: dict[str, Any] = {
        "name": "own",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(source), "validation": 0.2},
        "task": {"kind": "preference", "max_length": 32},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedit"},
        "training": {"rounds": 1, "steps": 1},
        "machine": {"threads": 1, "device": "cpu"},
    }
    return build(plan(read(table)))


def test_metrics_written_are_those_of_the_catalogue(
    toy_federation: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    short = {"training.rounds": 2, "data.validation": 0.3}
    federations = [
        toy_federation({**short, "evaluation.diagnostics": True, "evaluation.clients": True}),
        toy_federation({**short, "method.name": "local"}),
        toy_federation({**short, "method.name": "fedsa", "evaluation.test": False}),
        toy_federation({**short, "evaluation.test": False}),
        personal := toy_federation({**short, "method.name": "fedit", "personal.ditto": 0.1}),
        toy_federation({**short, "participation.buffer": 2}),
        toy_federation({"training.rounds": 1, "method.exchange": "subspace", "method.zeta": 0.0}),
        language_model(tiny_llama, tmp_path),
        preferences(tiny_llama, tmp_path),
        *(short_run(kind, tmp_path / kind) for kind in KINDS),
        toy_federation(
            {
                **{"training.rounds": 1, "method.preset": "low_bit", "method.client_feedback": True},
                **{"model.head": "lora", "lora.target_modules": [QUERY, "classifier"]},
            }
        ),
        toy_federation(
            {
                **{"training.rounds": 1, "privacy.unit": "client", "privacy.clip_norm": 1.0},
                **{"privacy.noise_multiplier": 1.0, "privacy.delta": 1e-5, "privacy.seed": 1},
                **{"privacy.clip_quantile": 0.5, "privacy.quantile_noise": 1.0},
            }
        ),
    ]
    federations[3].engine = WrongRows()
    written: set[str] = set()
    for federation in federations:
        written |= names(run_rounds(federation, Callback()))
    written |= names([personal_at_end(personal, Callback())])
    assert sorted(name for name in written if not is_known(name)) == []
    assert METRICS.keys() - written == BY_FLOWER
    assert {"own_accuracy", "on_test_accuracy", "personal_accuracy"} <= written


def test_every_metric_is_explained_in_one_sentence() -> None:
    for one in METRICS.values():
        assert one.label
        assert one.explanation.endswith(".")
        assert ". " not in one.explanation
    assert QUALITY[:4] == ("accuracy", "exact_match", "loss", "preference_accuracy")
    assert {name for kind in tasks.names() for name in tasks.find(kind).metrics} == set(QUALITY)


@pytest.mark.parametrize(
    ("name", "title", "group"),
    [
        ("own_macro_f1", "Own macro F1", "quality"),
        ("on_test_loss", "Own loss on the test set", "quality"),
        ("personal_accuracy", "Personal accuracy", "quality"),
        ("tuned_entity_f1", "Fine-tuned entity F1", "quality"),
        ("accuracy_worst_tenth", "Accuracy of the worst tenth", "quality"),
        ("personal_loss_mean_over_clients", "Mean personal loss over clients", "quality"),
        ("samples_worst_tenth", "Samples worst tenth", "diagnostics"),
        ("own_samples", "Own samples", "diagnostics"),
        ("my_own_number", "My own number", "diagnostics"),
    ],
)
def test_names_outside_the_catalogue_are_variants_or_diagnostics(name: str, title: str, group: str) -> None:
    assert (metric(name).title, metric(name).group) == (title, group)
    assert is_known(name) == (group == "quality")


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("accuracy", True),
        ("own_accuracy", True),
        ("on_test_perplexity", False),
        ("own_loss", False),
        ("train_loss_last", False),
        ("start_error", False),
        ("mse", False),
        ("own_entity_f1", True),
        ("on_test_pearson", True),
        ("glossary_recall", True),
        ("terror", True),
    ],
)
def test_the_better_direction_is_defined_and_not_guessed_from_the_name(name: str, better: bool) -> None:
    assert larger_is_better(name) is better


def test_every_metric_of_quality_has_a_better_direction() -> None:
    assert all(METRICS[name].larger_is_better is not None for name in QUALITY)
