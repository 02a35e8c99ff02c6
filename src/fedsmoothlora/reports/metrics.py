"""Every metric that a run records: its label, its unit and its meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["quality", "training", "participation", "communication", "time", "diagnostics"]
Unit = Literal["", "bytes", "seconds", "rows", "clients", "uploads"]


@dataclass(frozen=True)
class Metric:
    """A number that is recorded every round, of a client or of the global model and the server.

    Attributes:
        name: as in ``metrics.jsonl``.
        label: as people say it, within a sentence.
        explanation: one sentence on its meaning; empty for a metric that only a user's own code knows.
        group: the part of a report that shows it.
        unit: of its values; empty for a plain number.
    """

    name: str
    label: str
    explanation: str
    group: Group
    unit: Unit = ""

    @property
    def title(self) -> str:
        """The label with a capital letter."""
        return self.label[:1].upper() + self.label[1:]


_ALL = (
    Metric("accuracy", "accuracy", "The share of rows whose answer is the right one.", "quality"),
    Metric(
        "exact_match", "exact match", "The share of generated answers that match the reference.", "quality"
    ),
    Metric(
        "loss",
        "loss",
        "The mean cross-entropy over rows, or over answer tokens for a language model.",
        "quality",
    ),
    Metric("perplexity", "perplexity", "The exponential of the loss per answer token.", "quality"),
    Metric(
        "macro_f1", "macro F1", "The mean F1 score of the classes that occur or are predicted.", "quality"
    ),
    Metric(
        "auroc",
        "AUROC",
        "The area under the ROC curve; with more than two classes, the mean of one against the rest.",
        "quality",
    ),
    Metric("train_loss", "training loss", "The mean loss over the steps of local training.", "training"),
    Metric(
        "train_loss_first",
        "training loss of the first step",
        "The loss of the first step of local training.",
        "training",
    ),
    Metric(
        "train_loss_last",
        "training loss of the last step",
        "The loss of the last step of local training.",
        "training",
    ),
    Metric("samples", "rows", "The client’s training rows.", "training", "rows"),
    Metric(
        "clients",
        "clients taking part",
        "Clients whose uploads were accepted in the round.",
        "participation",
        "clients",
    ),
    Metric(
        "left_out",
        "uploads left out",
        "Clients that diverged, and uploads that were refused.",
        "participation",
        "uploads",
    ),
    Metric(
        "refused",
        "uploads refused",
        "Uploads of the round that failed the server’s checks.",
        "participation",
        "uploads",
    ),
    Metric(
        "mean_of_clients",
        "clients averaged",
        "Clients whose own models the metrics are averaged over, where there is no global model.",
        "participation",
        "clients",
    ),
    Metric("bytes_up", "sent up", "Bytes sent from clients to the server.", "communication", "bytes"),
    Metric("bytes_down", "sent down", "Bytes sent from the server to clients.", "communication", "bytes"),
    Metric(
        "bytes_down_validation",
        "sent down for validation",
        "Bytes of the global model sent to clients that validate it.",
        "communication",
        "bytes",
    ),
    Metric(
        "seconds_round",
        "seconds of the round",
        "Time from the first message of a round to the updated global model.",
        "time",
        "seconds",
    ),
    Metric("seconds_loading", "seconds of loading", "Time to load the model at a site.", "time", "seconds"),
    Metric("seconds_start", "seconds of the start", "Time to build the client’s start.", "time", "seconds"),
    Metric("seconds_training", "seconds of training", "Time of local training.", "time", "seconds"),
    Metric(
        "seconds_upload", "seconds of the upload", "Time to build the client’s upload.", "time", "seconds"
    ),
    Metric(
        "seconds_diagnosis",
        "seconds of the diagnosis",
        "Time to measure the client’s diagnostics.",
        "time",
        "seconds",
    ),
    Metric(
        "seconds_evaluation",
        "seconds of the evaluation",
        "Time to evaluate the global model.",
        "time",
        "seconds",
    ),
    Metric(
        "start_distance",
        "distance between clients’ starts",
        "How far apart the clients of a round begin.",
        "diagnostics",
    ),
    Metric(
        "update_norm",
        "norm of the server’s update",
        "How far a round moves the global model.",
        "diagnostics",
    ),
    Metric(
        "update_cosine",
        "cosine of consecutive updates",
        "1: a round goes on where the last one went; below 0: it goes back.",
        "diagnostics",
    ),
    Metric(
        "merged_effective_rank",
        "effective rank of all that was merged",
        "How many directions the sum of all updates uses.",
        "diagnostics",
    ),
    Metric(
        "start_error",
        "error of the start",
        "What truncating the start cuts away, over the round match.",
        "diagnostics",
    ),
    Metric(
        "ga_kept",
        "alignment kept at the start",
        "The share of the gradient-aligned matrix left in the LoRA.",
        "diagnostics",
    ),
    Metric(
        "start_gradient_cosine",
        "alignment of the start with the gradient",
        "Cosine of the start and the client’s own descent direction.",
        "diagnostics",
    ),
    Metric(
        "loss_at_start",
        "loss at the start",
        "The loss on a fixed batch of the client before local training.",
        "diagnostics",
    ),
    Metric(
        "loss_at_end",
        "loss at the end",
        "The loss on the same fixed batch after local training.",
        "diagnostics",
    ),
)

METRICS = {metric.name: metric for metric in _ALL}
"""Metrics by name. Of the quality metrics, clients' own models have variants: `PREFIXES`."""

QUALITY = tuple(metric.name for metric in _ALL if metric.group == "quality")
"""Names of the metrics that tell how good a model is."""

PREFIXES = {
    "own_": ("own {}", "Each client’s own model on its validation rows."),
    "on_test_": ("own {} on the test set", "Each client’s own model on the test set."),
}
"""Label and explanation of a quality metric whose name begins so."""


def is_known(name: str) -> bool:
    """Whether the package itself records a metric of this name."""
    return name in METRICS or _variant(name) is not None


def metric(name: str) -> Metric:
    """The metric of this name; an unknown one, such as of a user's own method, is a diagnostic."""
    return METRICS.get(name) or _variant(name) or Metric(name, name.replace("_", " "), "", "diagnostics")


def _variant(name: str) -> Metric | None:
    """A quality metric of clients' own models."""
    for prefix, (label, explanation) in PREFIXES.items():
        measured = name.removeprefix(prefix)
        if measured != name and measured in QUALITY:
            of = METRICS[measured]
            return Metric(name, label.format(of.label), explanation, of.group, of.unit)
    return None


ROUND_PHASES = tuple(one.name for one in _ALL if one.group == "time" and one.name != "seconds_round")
"""Names of the times that a round consists of, in their order; most of them are measured at clients."""
