"""Every metric that a run records: its label, its unit, its meaning and its better direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedsmoothlora.federation.records import MEAN_OVER_CLIENTS, STD_OVER_CLIENTS, WORST_TENTH

Group = Literal["quality", "training", "participation", "communication", "time", "privacy", "diagnostics"]
Unit = Literal["", "bytes", "seconds", "rows", "clients", "uploads"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that is recorded every round, of a client or of the global model and the server.

    Attributes:
        name: as in ``metrics.jsonl``.
        label: the metric's name within a sentence.
        explanation: one sentence on its meaning; empty for a metric that only a user's own code knows.
        group: the part of a report that shows it.
        formula: its definition, where the sentence is not one.
        unit: of its values; empty for a plain number.
        larger_is_better: the direction of improvement; None for a metric that has none.
    """

    name: str
    label: str
    explanation: str
    group: Group
    formula: str = ""
    unit: Unit = ""
    larger_is_better: bool | None = None

    @property
    def title(self) -> str:
        """The label with a capital letter."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def description(self) -> str:
        """The explanation, followed by the formula."""
        return " ".join(filter(None, (self.explanation, self.formula)))


_QUALITY = (
    Metric(
        name="accuracy",
        label="accuracy",
        explanation="The share of rows whose answer is the right one.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="exact_match",
        label="exact match",
        explanation="The share of generated answers that match the reference.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="loss",
        label="loss",
        explanation=(
            "The mean cross-entropy over rows, words or answer tokens; the mean squared error of numbers."
        ),
        group="quality",
        larger_is_better=False,
    ),
    Metric(
        name="preference_accuracy",
        label="preference accuracy",
        explanation="The share of pairs whose chosen answer has the larger reward; equal rewards count half.",
        group="quality",
        formula="The reward of an answer is beta (log p(answer) - log p(answer) of the reference model).",
        larger_is_better=True,
    ),
    Metric(
        name="reward_margin",
        label="reward margin",
        explanation="The mean reward of chosen answers minus that of rejected ones.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="perplexity",
        label="perplexity",
        explanation="The exponential of the loss per answer token.",
        group="quality",
        larger_is_better=False,
    ),
    Metric(
        name="macro_f1",
        label="macro F1",
        explanation="The mean F1 score of the classes that occur or are predicted.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="mcc",
        label="MCC",
        explanation="The Matthews correlation of classes and predictions; 0 for a constant guess.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="auroc",
        label="AUROC",
        explanation="The area under the ROC curve; of several classes, the mean of one against the rest.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="mse",
        label="mean squared error",
        explanation="The mean squared difference of numbers and predictions.",
        group="quality",
        larger_is_better=False,
    ),
    Metric(
        name="pearson",
        label="Pearson correlation",
        explanation="The linear correlation of numbers and predictions; 0 for a constant guess.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="spearman",
        label="Spearman correlation",
        explanation="The correlation of the ranks of numbers and predictions.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="micro_f1",
        label="micro F1",
        explanation="The F1 score over all pairs of a row and a label.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="mean_average_precision",
        label="mean average precision",
        explanation="The mean area under the precision-recall curve of the labels that occur.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="token_accuracy",
        label="token accuracy",
        explanation="The share of words with the right tag.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="entity_f1",
        label="entity F1",
        explanation="The harmonic mean of the precision and the recall of entities.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="entity_precision",
        label="entity precision",
        explanation="The share of predicted entities whose words and type are right.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="entity_recall",
        label="entity recall",
        explanation="The share of entities that are predicted with all their words and their type.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="rouge1",
        label="ROUGE-1",
        explanation="The mean F1 of the words that generated answers share with the references.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="rouge2",
        label="ROUGE-2",
        explanation="The mean F1 of the pairs of words that generated answers share with the references.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="rougeL",
        label="ROUGE-L",
        explanation="The mean F1 of the longest common subsequences of generated answers and references.",
        group="quality",
        larger_is_better=True,
    ),
    Metric(
        name="bleu",
        label="BLEU",
        explanation="The overlap of generated answers and references in up to four words, from 0 to 1.",
        group="quality",
        larger_is_better=True,
    ),
)

_TRAINING = (
    Metric(
        name="train_loss",
        label="training loss",
        explanation="The mean loss over the steps of local training.",
        group="training",
        larger_is_better=False,
    ),
    Metric(
        name="train_loss_first",
        label="training loss of the first step",
        explanation="The loss of the first step of local training.",
        group="training",
        larger_is_better=False,
    ),
    Metric(
        name="train_loss_last",
        label="training loss of the last step",
        explanation="The loss of the last step of local training.",
        group="training",
        larger_is_better=False,
    ),
    Metric(
        name="samples",
        label="rows",
        explanation="The client’s training rows.",
        group="training",
        unit="rows",
    ),
)

_PARTICIPATION = (
    Metric(
        name="clients",
        label="clients taking part",
        explanation="Clients whose uploads were accepted in the round.",
        group="participation",
        unit="clients",
    ),
    Metric(
        name="left_out",
        label="uploads left out",
        explanation="Clients that diverged, and uploads that were refused.",
        group="participation",
        unit="uploads",
        larger_is_better=False,
    ),
    Metric(
        name="refused",
        label="uploads refused",
        explanation="Uploads of the round that failed the server’s checks.",
        group="participation",
        unit="uploads",
        larger_is_better=False,
    ),
    Metric(
        name="numbers_cut",
        label="numbers cut",
        explanation="Numbers of masked uploads that were above `privacy.mask_range` and were cut to it.",
        group="communication",
        larger_is_better=False,
    ),
    Metric(
        name="staleness",
        label="staleness",
        explanation="Rounds since the clients whose uploads were merged began, on average.",
        group="participation",
        larger_is_better=False,
    ),
    Metric(
        name="staleness_max",
        label="largest staleness",
        explanation="Rounds since the client began whose upload was the oldest that was merged.",
        group="participation",
        larger_is_better=False,
    ),
    Metric(
        name="simulated_time",
        label="simulated time",
        explanation="Time since the run began, by simulated speeds: one optimiser step at speed 1 takes 1.",
        group="participation",
        larger_is_better=False,
    ),
    Metric(
        name="mean_of_clients",
        label="clients averaged",
        explanation="Clients whose own models the metrics are averaged over, where there is no global model.",
        group="participation",
        unit="clients",
    ),
)

_COMMUNICATION = (
    Metric(
        name="bytes_up",
        label="sent up",
        explanation="Bytes sent from clients to the server.",
        group="communication",
        unit="bytes",
        larger_is_better=False,
    ),
    Metric(
        name="bytes_down",
        label="sent down",
        explanation="Bytes sent from the server to clients.",
        group="communication",
        unit="bytes",
        larger_is_better=False,
    ),
    Metric(
        name="bytes_down_validation",
        label="sent down for validation",
        explanation="Bytes of the global model sent to clients that validate it.",
        group="communication",
        unit="bytes",
        larger_is_better=False,
    ),
    Metric(
        name="bytes_down_personal",
        label="sent down for personal models",
        explanation="Bytes of the final global model sent to clients for their personal models.",
        group="communication",
        unit="bytes",
        larger_is_better=False,
    ),
)

_TIME = tuple(
    Metric(
        name=name, label=label, explanation=explanation, group="time", unit="seconds", larger_is_better=False
    )
    for name, label, explanation in (
        (
            "seconds_round",
            "seconds of the round",
            "Time from the first message of a round to the updated global model.",
        ),
        ("seconds_loading", "seconds of loading", "Time to load the model at a site."),
        ("seconds_start", "seconds of the start", "Time to build the client’s start."),
        ("seconds_training", "seconds of training", "Time of local training."),
        ("seconds_upload", "seconds of the upload", "Time to build the client’s upload."),
        (
            "seconds_second_upload",
            "seconds of the second upload",
            "Time to build the client’s upload in the second exchange of a round.",
        ),
        ("seconds_personal", "seconds of personal models", "Time to train and evaluate personal models."),
        ("seconds_diagnosis", "seconds of the diagnosis", "Time to measure the client’s diagnostics."),
        ("seconds_evaluation", "seconds of the evaluation", "Time to evaluate the global model."),
        ("seconds_at_end", "seconds after the last round", "Time of personal models after the last round."),
    )
)

_PRIVACY = (
    Metric(
        name="epsilon",
        label="epsilon",
        explanation=(
            "The most that all releases so far tell of one client, or of one row of the client that has "
            "spent most: ε of (ε, δ)-differential privacy."
        ),
        group="privacy",
        larger_is_better=False,
    ),
    Metric(
        name="clip_norm",
        label="clip norm",
        explanation="The norm to which uploads were clipped, where it follows a quantile of their norms.",
        group="privacy",
    ),
    Metric(
        name="seeded_noise",
        label="seeded noise",
        explanation="1: the noise follows from a seed, so that nothing is private.",
        group="privacy",
    ),
)

_DIAGNOSTICS = (
    Metric(
        name="start_distance",
        label="distance between clients’ starts",
        explanation="The root mean square distance of the clients’ weights from their mean at the start.",
        group="diagnostics",
        formula="√(mean over c of Σ ‖s (D_c − D)‖²), D_c the start of client c, D their mean, Σ over layers.",
    ),
    Metric(
        name="update_norm",
        label="norm of the server’s update",
        explanation="How far a round moves the global model.",
        group="diagnostics",
        formula="√(Σ ‖s S_t‖²), S_t the change of the global model in round t, Σ over layers.",
    ),
    Metric(
        name="update_cosine",
        label="cosine of consecutive updates",
        explanation="1: a round continues in the direction of the last one; below 0: it turns back.",
        group="diagnostics",
        formula="cos(S_t, S_(t−1)), S_t the change of the global model in round t.",
    ),
    Metric(
        name="merged_effective_rank",
        label="effective rank of the merged updates",
        explanation="The number of directions that the sum of all updates uses, as a mean over layers.",
        group="diagnostics",
        formula="exp(H(σ / Σσ)), H the entropy, σ the singular values of the sum.",
    ),
    Metric(
        name="start_error",
        label="error of the start",
        explanation="The part of the start that truncation to rank r removes, relative to the round match.",
        group="diagnostics",
        formula="‖SVD_r(GA + RM) − GA − RM‖ / ‖RM‖, GA the gradient-aligned matrix, RM the round match.",
        larger_is_better=False,
    ),
    Metric(
        name="ga_kept",
        label="alignment kept at the start",
        explanation="The share of the gradient-aligned matrix that the truncated start keeps.",
        group="diagnostics",
        formula="⟨SVD_r(GA + RM), GA⟩ / ‖GA‖², GA the gradient-aligned matrix, RM the round match.",
        larger_is_better=True,
    ),
    Metric(
        name="partial_starts",
        label="layers with a partial start",
        explanation="Layers whose calibration gradient has fewer directions than twice the rank.",
        group="diagnostics",
        larger_is_better=False,
    ),
    Metric(
        name="feedback_cut",
        label="share of the client’s memory that is cut off",
        explanation="The part of what an upload lost that the client’s memory has no room for.",
        group="diagnostics",
        formula="‖E − SVD_k(E)‖ / ‖E‖ over all layers, k the rank of the memory.",
        larger_is_better=False,
    ),
    Metric(
        name="start_gradient_cosine",
        label="alignment of the start with the gradient",
        explanation="The cosine of the client’s gradient and the first step that its LoRA can take.",
        group="diagnostics",
        formula="cos(G, B Bᵀ G + G Aᵀ A) over all layers, G the gradient of the weights.",
        larger_is_better=True,
    ),
    Metric(
        name="loss_at_start",
        label="loss at the start",
        explanation="The loss on a fixed batch of the client before local training.",
        group="diagnostics",
        larger_is_better=False,
    ),
    Metric(
        name="loss_at_end",
        label="loss at the end",
        explanation="The loss on the same fixed batch after local training.",
        group="diagnostics",
        larger_is_better=False,
    ),
)

METRICS = {
    one.name: one
    for one in (
        *(*_QUALITY, *_TRAINING, *_PARTICIPATION, *_COMMUNICATION),
        *(*_TIME, *_PRIVACY, *_DIAGNOSTICS),
    )
}
"""Metrics by name. Of the quality metrics, clients' own models have variants: `PREFIXES`."""

QUALITY = tuple(one.name for one in _QUALITY)
"""Names of the metrics that tell how good a model is."""

HIGHLIGHTS = ("accuracy", "exact_match", "preference_accuracy", "pearson", "micro_f1", "entity_f1", "rougeL")
"""Names of the main metrics of tasks, which summaries show beside the loss."""

ROUND_PHASES = tuple(one.name for one in _TIME if one.name not in ("seconds_round", "seconds_at_end"))
"""Names of the times that a round consists of, in their order; most of them are measured at clients."""

PREFIXES = {
    "own_": ("own {}", "Each client’s own model on its validation rows."),
    "on_test_": ("own {} on the test set", "Each client’s own model on the test set."),
    "personal_": ("personal {}", "Each client’s personal model on its validation rows."),
    "tuned_": ("fine-tuned {}", "The final global model, fine-tuned by each client, on its validation rows."),
}
"""Label and explanation of a quality metric whose name begins so."""

OVER_CLIENTS: Mapping[str, tuple[str, str]] = {
    MEAN_OVER_CLIENTS: ("mean {} over clients", "The mean over clients, each counted once."),
    WORST_TENTH: ("{} of the worst tenth", "The mean over the worst ⌈C/10⌉ of C clients."),
    STD_OVER_CLIENTS: ("spread of {} over clients", "The standard deviation over clients."),
}
"""Label and explanation of a summary over clients of a quality metric, by the end of its name."""


def is_known(name: str) -> bool:
    """Whether the package itself records a metric of this name."""
    return name in METRICS or _variant(name) is not None


def metric(name: str) -> Metric:
    """The metric of this name; an unknown one, such as of a user's own method, is a diagnostic."""
    return (
        METRICS.get(name)
        or _variant(name)
        or Metric(name=name, label=name.replace("_", " "), explanation="", group="diagnostics")
    )


def main_metrics(best: str) -> tuple[str, ...]:
    """The metrics that decide how good a model is in any task: ``checkpoint.best`` and `HIGHLIGHTS`."""
    return tuple(dict.fromkeys((best, *HIGHLIGHTS)))


def larger_is_better(name: str) -> bool:
    """Whether the larger value of a metric is the better one, by the metric's definition.

    True for a metric without a defined direction, such as one of a user's own task.
    """
    return metric(name).larger_is_better is not False


def _variant(name: str) -> Metric | None:
    """A quality metric of clients' own models, or its summary over clients."""
    for end, (label, explanation) in OVER_CLIENTS.items():
        measured = name.removesuffix(end)
        of = METRICS.get(measured) or (_variant(measured) if measured != name else None)
        if measured != name and of is not None and of.group == "quality":
            return replace(
                of,
                name=name,
                label=label.format(of.label),
                explanation=explanation,
                formula="",
                larger_is_better=False if end == STD_OVER_CLIENTS else of.larger_is_better,
            )
    for prefix, (label, explanation) in PREFIXES.items():
        measured = name.removeprefix(prefix)
        if measured != name and measured in QUALITY:
            return replace(
                METRICS[measured],
                name=name,
                label=label.format(METRICS[measured].label),
                explanation=explanation,
            )
    return None
