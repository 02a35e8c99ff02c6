"""Schedules over the rounds: the round-matching coefficient zeta and the learning rate.

Rounds are counted ``t = 0 ... rounds - 1``; values are constant within a round.
"""

import math
from typing import Literal

ZetaSchedule = Literal["constant", "cosine", "linear"]


def zeta_at(
    round: int, rounds: int, *, schedule: ZetaSchedule = "constant", zeta: float = 1.0, floor: float = 0.0
) -> float:
    """The round-matching coefficient ``zeta_t`` (FedSmoothLoRA, arXiv 2605.29460).

    ``constant``: ``zeta``. ``cosine``: ``floor + (zeta - floor)/2 (1 + cos(pi t / T))``. ``linear``:
    ``zeta - (zeta - floor) t / T``. No round reaches the floor, since ``t < T``.

    ``round = rounds`` returns the end value of the schedule. Raises ``ValueError`` for an unknown schedule or
    a round outside ``0 ... rounds``.
    """
    if round != rounds or rounds < 1:
        _check_round(round, rounds)
    if schedule == "constant":
        return zeta
    if schedule == "cosine":
        return _cosine(round, rounds, zeta, floor)
    if schedule == "linear":
        return zeta - (zeta - floor) * round / rounds
    raise ValueError(f"unknown zeta schedule {schedule!r}; it is one of constant, cosine, linear")


def learning_rate_at(round: int, rounds: int, lr: float, lr_min: float = 0.0) -> float:
    """The learning rate of a round: ``lr_min + (lr - lr_min)/2 (1 + cos(pi t / T))``.

    Raises ``ValueError`` for a round outside ``0 ... rounds - 1``.
    """
    _check_round(round, rounds)
    return _cosine(round, rounds, lr, lr_min)


def _cosine(round: int, rounds: int, top: float, floor: float) -> float:
    return floor + (top - floor) / 2 * (1 + math.cos(math.pi * round / rounds))


def _check_round(round: int, rounds: int) -> None:
    if not 0 <= round < rounds:
        raise ValueError(f"round {round} is outside 0 ... {rounds - 1}")
