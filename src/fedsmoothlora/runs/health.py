"""Problems of a run that its metrics show: each check is a function, and `Health` tells what they find."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.methods import Method
from fedsmoothlora.training.settings import TrainingSettings

_ROUNDS_TO_LEARN = 2
# A loss is far above another one if it is that many times larger and that much larger: batches differ.
_TIMES, _NATS = 1.5, 1.0
_FEWEST_OTHERS = 2
LARGE_SHARE = 1 / 3  # of the clients' time, for calibration
_SECONDS_THAT_MATTER = 10.0


class Health(Callback):
    """Notes problems after each round.

    Args:
        training: ``[training]``.
        method: the method.
        note: shows a sentence to the user.
    """

    def __init__(self, training: TrainingSettings, method: Method, note: Callable[[str], None]) -> None:
        self._training, self._method, self._note = training, method, note
        self._said_chance = self._said_calibration = False

    def on_round_end(self, record: RoundRecord) -> None:
        """Check the round."""
        if record.round >= _ROUNDS_TO_LEARN and not self._said_chance and (problem := at_chance(record)):
            self._said_chance = True
            self._note(f"round {record.round}: {problem}. {what_to_try(self._training)}")
        for problem in (*rising_losses(record), *outlying_losses(record)):
            self._note(f"round {record.round}: {problem}")
        if not self._said_calibration and (problem := costly_calibration(record, self._method)):
            self._said_calibration = True
            self._note(f"round {record.round}: {problem}")


def at_chance(record: RoundRecord) -> str:
    """How the global model compares with guesses, if it is no better than they are; empty if it is.

    A guess has the loss ``ln K`` for ``K`` classes, and the share of the most frequent class as its accuracy.
    A record without a confusion matrix is not compared.
    """
    if record.confusion is None:
        return ""
    rows = record.confusion.sum(dim=1)  # of each class
    classes, total = len(rows), int(rows.sum())
    loss, accuracy = record.value("loss"), record.value("accuracy")
    if classes < 2 or not total:
        return ""
    majority = int(rows.max()) / total
    found = []
    if loss is not None and not loss < math.log(classes):
        found.append(f"the loss {loss:.4g} is not below ln {classes} = {math.log(classes):.4g}")
    if accuracy is not None and accuracy <= majority:
        found.append(
            f"the accuracy {accuracy:.4g} is not above the most frequent class's share {majority:.4g}"
        )
    return f"the global model is no better than guessing: {' and '.join(found)}" if found else ""


def what_to_try(training: TrainingSettings) -> str:
    """A sentence with the changes of ``[training]`` that help a model to learn."""
    tries = [f"another training.lr than {training.lr:g} (3 times more, or less if losses rise)"]
    if training.optimizer == "sgd":
        tries.append("training.optimizer = 'adamw' with training.lr = 0.001")
    if training.max_grad_norm is None:
        tries.append("training.max_grad_norm = 1.0")
    if training.steps is None:
        tries.append(f"more training.epochs than {training.epochs or 1}")
    else:
        tries.append(f"more training.steps than {training.steps}")
    return f"Try {', or '.join(tries)}; and check that the labels belong to the rows"


def rising_losses(record: RoundRecord) -> Iterator[str]:
    """A sentence for each client whose last batch had a loss far above that of its first.

    The mean over all batches must be too, by that factor: a single batch may be hard.
    """
    last, mean = by_client(record, "train_loss_last"), by_client(record, "train_loss")
    for client, first in by_client(record, "train_loss_first").items():
        if far_above(last.get(client, first), first) and mean.get(client, first) > _TIMES * first:
            yield (
                f"client {client}: its loss rose from {first:.4g} to {last[client]:.4g} in its training; "
                "a smaller training.lr, or training.max_grad_norm = 1.0, may prevent that"
            )


def outlying_losses(record: RoundRecord) -> Iterator[str]:
    """A sentence for each client whose mean training loss is far above the median of the others."""
    losses = by_client(record, "train_loss")
    for client, loss in losses.items():
        others = [other for name, other in losses.items() if name != client]
        if len(others) >= _FEWEST_OTHERS and far_above(loss, median(others), times=2 * _TIMES):
            yield (
                f"client {client}: its training loss {loss:.4g} is far above the other clients' "
                f"(median {median(others):.4g}); its rows or their labels may be of another kind"
            )


def costly_calibration(record: RoundRecord, method: Method) -> str:
    """The share of the clients' time that their starts took, if it is a large one; empty if not.

    A start is little else than its calibration batches. Rounds of a few seconds are not looked at.
    """
    batches = method.calibration.batches
    start = sum(by_client(record, "seconds_start").values())
    others = (sum(by_client(record, f"seconds_{part}").values()) for part in ("training", "upload"))
    total = start + sum(others)
    if not batches or total < _SECONDS_THAT_MATTER or start < LARGE_SHARE * total:
        return ""
    fewer = "; a smaller method.calibration_batches is faster" if sets_calibration(method) else ""
    return (
        f"calibration took {start / total:.0%} of the clients' time ({start:.0f} of {total:.0f} s): "
        f"{batches} {'batch' if batches == 1 else 'batches'} of each client{fewer}"
    )


def sets_calibration(method: Method) -> bool:
    """Whether a smaller ``method.calibration_batches`` would shorten a client's start."""
    return "calibration_batches" in method.option_names() and method.calibration.batches > 1


def loss_far_above_the_first(records: Sequence[RoundRecord]) -> str:
    """A sentence if the last loss of the global model is far above its first; empty if not."""
    losses = [(record.round, loss) for record in records if (loss := record.value("loss")) is not None]
    if len(losses) < 2 or not far_above(losses[-1][1], losses[0][1]):
        return ""
    best_round, best = min(losses, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf)
    return (
        f"the run ends with a loss of {losses[-1][1]:.4g}, far above the {losses[0][1]:.4g} it began with "
        f"(the best was {best:.4g} in round {best_round}): the training diverged; a smaller training.lr, or "
        "training.max_grad_norm = 1.0, may prevent that"
    )


def far_above(value: float, other: float, *, times: float = _TIMES) -> bool:
    """Whether a loss is above another one by more than batches differ; one that is not finite always is."""
    if not math.isfinite(value):
        return math.isfinite(other)
    return value - other > max(_NATS, (times - 1) * abs(other))


def by_client(record: RoundRecord, name: str) -> Mapping[str, float]:
    """A metric of every client that reports it."""
    return {f.client: f.value for f in record.metrics if f.client is not None and f.name == name}
