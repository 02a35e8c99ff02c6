"""Give every variant the bytes of a named one: the largest LoRA rank that sends no more.

Bytes are those of one client in one round, up and down, as `fedsmoothlora check` computes them. All variants
have the same number of clients in a round, so the ratio of two variants is that of their whole rounds too.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsmoothlora.config import Config
from fedsmoothlora.config.validation import validate
from fedsmoothlora.errors import ConfigError, MethodError
from fedsmoothlora.experiments.folder import remembered
from fedsmoothlora.experiments.variants import Variant
from fedsmoothlora.methods import Layer
from fedsmoothlora.modeling.adapters import AdaptedModel, find_layers
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.runs.check import traffic
from fedsmoothlora.runs.planning import Plan, plan

TOLERANCE = 0.03
"""Bytes above the budget by this share or less count as equal.

Rank 8 in 4 bits sends 1776 bytes of a layer for which rank 2 in bfloat16 sends 1744.
"""

NO_RANK = "has no rank to choose"
"""The note of a variant without LoRA."""

# The bytes of a client in a round, up and down, by ``lora.r``.
BytesByRank = Callable[[int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """The rank of a variant, and the bytes of one of its clients in one round.

    Attributes:
        r: ``lora.r``.
        alpha: ``lora.alpha``.
        up: bytes of an upload.
        down: bytes of a message.
        chosen: whether the rank was chosen; otherwise it is that of the variant's configuration.
        note: why it was not chosen, or a side effect of the choice; empty if there is nothing to say.
    """

    r: int
    alpha: float
    up: int
    down: int
    chosen: bool
    note: str = ""

    @property
    def bytes(self) -> int:
        """Bytes up and down."""
        return self.up + self.down

    @property
    def overrides(self) -> dict[str, Any]:
        """The chosen values by dotted key; empty if the rank was not chosen."""
        return {"lora.r": self.r, "lora.alpha": self.alpha} if self.chosen else {}


@dataclass(frozen=True)
class Budget:
    """The ranks of all variants at the bytes of one of them.

    Attributes:
        like: the label of the variant whose bytes are the budget.
        shares: rank and bytes by label, that of ``like`` among them.
    """

    like: str
    shares: Mapping[str, Share]

    def factor(self, label: str) -> float:
        """The bytes of a variant as a multiple of the budget."""
        return self.shares[label].bytes / self.shares[self.like].bytes

    def is_over(self, label: str) -> bool:
        """Whether a variant sends more than the budget and `TOLERANCE`."""
        return self.shares[label].bytes > allowed(self.shares[self.like].bytes)

    def applied(self, variants: Sequence[Variant]) -> list[Variant]:
        """The variants with their chosen ranks."""
        return [
            replace(one, overrides={**one.overrides, **self.shares[one.label].overrides}) for one in variants
        ]

    def table(self) -> dict[str, Any]:
        """The budget as a TOML table."""
        return {"like": self.like, "shares": {label: asdict(one) for label, one in self.shares.items()}}


def recorded_budget(known: Mapping[str, Any], file: Path) -> Budget | None:
    """The budget that a folder's ``file`` records among its further values; None if it has none.

    Raises ``ConfigError`` if it cannot be read.
    """
    table = known.get("bytes_like")
    if table is None:
        return None
    try:
        found = validate(Budget, table)
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"{file}: more.bytes_like cannot be read: {error}") from None
    if found.like not in found.shares:
        raise ConfigError(f"{file}: more.bytes_like has no rank of {found.like!r}")
    return found


def allowed(budget: int) -> float:
    """The most bytes that count as equal to ``budget``."""
    return (1 + TOLERANCE) * budget


def budget_of(
    like: str | None, variants: Sequence[Variant], configs: Mapping[str, Config], file: Path
) -> Budget | None:
    """Choose the rank of every variant; variants of a folder that has begun keep the ranks that it records.

    A variant has the largest ``lora.r`` whose bytes are within `TOLERANCE` of those of ``like``. Its
    ``lora.alpha`` changes with the rank, so that the scale ``s`` of its LoRA is that of its configuration.
    It has the rank of its configuration if it sets ``lora.r`` itself or lists ``lora.client_ranks``, if its
    bytes do not depend on the rank, or if its lowest rank is over the budget already.

    Args:
        like: the label of the variant whose bytes are the budget; None if ranks are not chosen.
        variants: all variants.
        configs: their configurations by label, before any rank is chosen.
        file: the file of settings in the folder of the runs (`folder.remember`), if there is one already.

    Returns:
        The budget of these variants; None without ``like``.

    Raises:
        ConfigError: no variant has this label, it sends nothing, or the folder began with another budget.
    """
    known = remembered(file)
    begun = None if known is None else recorded_budget(known, file)
    if known is not None and like != (begun.like if begun else None):
        how = f"with --bytes-like {begun.like}" if begun else "without --bytes-like"
        raise ConfigError(f"{file.parent}: these runs began {how}: keep it, or choose another --out")
    if like is None:
        return None
    if like not in configs:
        raise ConfigError(f"--bytes-like {like}: is none of the variants: {', '.join(configs)}")
    shares = dict(begun.shares) if begun else {like: budget_itself(plan(configs[like]))}
    budget = shares[like].bytes
    if not budget:
        raise ConfigError(f"--bytes-like {like}: its clients send and receive nothing, so it is no budget")
    for variant in variants:
        if variant.label not in shares:
            own = "lora.r" in variant.overrides
            shares[variant.label] = share_of(plan(configs[variant.label]), budget, sets_rank=own)
    return Budget(like, {variant.label: shares[variant.label] for variant in variants})


def budget_itself(planned: Plan) -> Share:
    """The rank and the bytes of the variant whose bytes are the budget."""
    return _kept(planned.config.lora, _bytes_by_rank(planned), "is the budget")


def share_of(planned: Plan, budget: int, *, sets_rank: bool = False) -> Share:
    """The rank of one variant at a budget of bytes (`budget_of`).

    Args:
        planned: its plan, with the rank of its configuration.
        budget: bytes of a client in a round, up and down.
        sets_rank: the variant sets its rank itself.
    """
    lora, bytes_at = planned.config.lora, _bytes_by_rank(planned)
    if sets_rank:
        return _kept(lora, bytes_at, "sets lora.r itself")
    if isinstance(lora.client_ranks, tuple):
        return _kept(lora, bytes_at, "lists lora.client_ranks")
    if not planned.layers or planned.config.method.sends(0) == "W":
        return _kept(lora, bytes_at, NO_RANK)
    highest = highest_rank(planned)
    if not _depends_on_rank(planned, highest):
        return _kept(lora, bytes_at, "sends as much at any rank")
    step = planned.config.method.rank_step  # ranks are searched in steps of it
    rank = step * largest_rank(
        lambda count: sum(bytes_at(step * count)),
        allowed(budget),
        first=max(1, lora.r // step),
        highest=highest // step,
    )
    if not rank:
        return _kept(lora, bytes_at, f"rank {step} sends too much already")
    alpha = alpha_at(lora, rank)
    changes_head = alpha != lora.alpha and lora.head_r is not None
    note = "lora.alpha also changes the scale of the head's LoRA" if changes_head else ""
    up, down = bytes_at(rank)
    return Share(r=rank, alpha=alpha, up=up, down=down, chosen=True, note=note)


def largest_rank(bytes_at: Callable[[int], int], most: float, *, first: int, highest: int) -> int:
    """The largest rank from 1 to ``highest`` whose bytes are at most ``most``; 0 if there is none.

    Args:
        bytes_at: bytes by rank, which do not fall with the rank. High ranks take long, so none above twice
            the larger of ``first`` and the result is evaluated.
        most: the budget.
        first: the rank to begin with.
        highest: the highest rank.
    """
    reached = min(first, highest)
    while reached < highest and bytes_at(reached) <= most:
        reached = min(2 * reached, highest)
    return bisect_right(range(1, reached + 1), most, key=bytes_at)


def highest_rank(planned: Plan) -> int:
    """The highest ``lora.r`` that the layers and the method accept."""
    sides = [min(layer.m, layer.n) for layer in planned.layers.values()]
    layers_at, config = _layers_by_rank(planned), planned.config
    clients = len(planned.partition.clients)
    partial = config.participation.partial(clients)

    def refused(rank: int) -> bool:
        try:
            config.method.check(layers_at(rank), partial=partial)
        except (ConfigError, MethodError):
            return True
        return False

    step = config.method.rank_step
    return step * bisect_left(range(step, max(sides, default=0) + 1, step), True, key=refused)


def alpha_at(lora: LoraSettings, rank: int) -> float:
    """The ``lora.alpha`` of another rank with which the scale ``s`` stays the same.

    ``s = alpha / r``, so ``alpha`` grows like ``r``; with rsLoRA ``s = alpha / sqrt(r)``, so it grows like
    ``sqrt(r)``.
    """
    ratio = rank / lora.r
    return lora.alpha * (math.sqrt(ratio) if lora.use_rslora else ratio)


def _kept(lora: LoraSettings, bytes_at: BytesByRank, note: str) -> Share:
    """The rank of the configuration, and its bytes."""
    up, down = bytes_at(lora.r)
    return Share(r=lora.r, alpha=lora.alpha, up=up, down=down, chosen=False, note=note)


def _depends_on_rank(planned: Plan, highest: int) -> bool:
    """Whether clients send factors of a layer whose rank is ``lora.r``; ``lora.head_r`` is another one."""
    layers_at = _layers_by_rank(planned)
    sends_factors = planned.config.method.sends(0) != "nothing"
    return sends_factors and (highest == 1 or layers_at(1) != layers_at(2))


def _bytes_by_rank(planned: Plan) -> BytesByRank:
    """A function from a rank to the bytes of a client, up and down."""
    empty, layers_at = planned.task_data.load(empty=True), _layers_by_rank(planned)
    adapted = AdaptedModel(
        empty.model,
        planned.config.lora,
        head=empty.head,
        head_is_trained_whole=planned.head_is_trained_whole,
    )
    head = adapted.head()

    @cache
    def bytes_at(rank: int) -> tuple[int, int]:
        return traffic(planned, layers_at(rank), head)[:2]

    return bytes_at


def _layers_by_rank(planned: Plan) -> Callable[[int], Mapping[str, Layer]]:
    """A function from ``lora.r`` to the adapted layers; ``ConfigError`` for a rank above a layer's."""
    empty = planned.task_data.load(empty=True)

    def layers_at(rank: int) -> Mapping[str, Layer]:
        return find_layers(
            empty.model,
            replace(planned.config.lora, r=rank),
            empty.head,
            head_is_trained_whole=planned.head_is_trained_whole,
        )

    return layers_at
