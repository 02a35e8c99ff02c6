"""Sentences on the privacy of a run, for the terminal and the log."""

from __future__ import annotations

from collections.abc import Mapping

from fedsmoothlora.federation import accounting
from fedsmoothlora.federation.accounting import MemoryLedger
from fedsmoothlora.federation.assembly import Sections, budget
from fedsmoothlora.federation.masked import masked_code
from fedsmoothlora.federation.privacy import multiplier_beside_a_quantile
from fedsmoothlora.federation.sample_privacy import budget_of_rows
from fedsmoothlora.printable import counted

NOT_PRIVATE = "NOT private: noise and sampling follow from privacy.seed"


def check_privacy(sections: Sections, rows: Mapping[str, int | None]) -> None:
    """Raise ``ConfigError`` if ``[privacy]`` does not fit the clients, or Opacus is not installed.

    Args:
        sections: the settings.
        rows: the number of training rows of every client; None where only a site knows it.
    """
    sections.privacy.check_session(sections.participation.count(len(rows)))
    if not sections.privacy.on:
        return
    accounting.require_opacus()
    if sections.privacy.hides_clients:
        planned = budget(sections)
        # First without the noise, which a large delta would make meaningless.
        sections.privacy.check(len(rows))
        sections.privacy.check(len(rows), planned.sample_rate, planned.noise_multiplier)
    for client, count in rows.items():
        if count is not None:
            sections.privacy.check_rows(client, count)


def warnings(sections: Sections) -> list[str]:
    """Warnings that hold for the whole run."""
    privacy = sections.privacy
    if not privacy.on:
        return []
    found = [] if privacy.seed is None else [f"privacy.seed = {privacy.seed}: this run is {NOT_PRIVATE}"]
    if sections.method.feeds_back and privacy.hides_clients:
        found.append(
            "method.server_feedback = true with privacy.unit = 'client': the part of the noise that "
            "truncation removes comes back in later rounds; without it, that part is dropped"
        )
    return found


def forecast(sections: Sections, rows: Mapping[str, int | None]) -> list[str]:
    """The epsilon of a private run after its last round, and the noise that it takes; or what is summed.

    Args:
        sections: the settings.
        rows: the number of training rows of every client; None where only a site knows it.
    """
    summed = _of_sums(sections, len(rows)) if sections.privacy.secure_aggregation else []
    if not sections.privacy.on:
        return summed
    found = _of_rows(sections, rows) if sections.privacy.hides_rows else _of_clients(sections, len(rows))
    return [*found, *summed]


def _of_sums(sections: Sections, clients: int) -> list[str]:
    """The number of clients that are summed under masks, and the rounding of their numbers."""
    privacy, in_a_round = sections.privacy, sections.participation.count(clients)
    largest = privacy.largest_number
    code = masked_code({}, largest, in_a_round)
    return [
        f"privacy: secure aggregation: of {in_a_round} clients in a round, the coordinator learns the sum of "
        f"at least {privacy.threshold_of(in_a_round)}; numbers up to {largest:g} are rounded to "
        f"multiples of {largest / code.limit:.2g}"
    ]


def _of_clients(sections: Sections, clients: int) -> list[str]:
    privacy, planned, rounds = sections.privacy, budget(sections), sections.training.rounds
    noise, rate = planned.noise_multiplier, planned.sample_rate
    who = "all clients take part" if rate == 1 else f"each client takes part with probability {rate:g}"
    size = privacy.first_clip_norm / (rate * clients)
    shown = [
        f"privacy: epsilon {planned.epsilon_after(rounds):.4g} at delta {privacy.delta:g} after {rounds} "
        f"rounds, for each of {clients} clients ({privacy.accountant.upper()} accountant of Opacus; "
        f"{who}){_seeded(sections)}"
    ]
    if privacy.clip_quantile is None:
        return [
            *shown,
            f"  noise multiplier {noise:.4g}: the noise of every released number has the standard deviation "
            f"{noise * size:.3g}; an upload changes all numbers together by at most {size:.3g} in norm",
        ]
    beside = multiplier_beside_a_quantile(noise, privacy.noise_of_quantile(clients, rate))
    return [
        *shown,
        f"  noise multiplier {noise:.4g}, of which the quantile takes a part: that of the mean is "
        f"{beside:.4g}. In the first round the noise of every released number has the standard deviation "
        f"{beside * size:.3g}; privacy.clip_norm follows quantile {privacy.clip_quantile:g} from "
        f"{privacy.first_clip_norm:g}",
    ]


def _of_rows(sections: Sections, rows: Mapping[str, int | None]) -> list[str]:
    """The largest epsilon of all clients if each takes part in every round, and their noise."""
    privacy, training = sections.privacy, sections.training
    known = {count for count in rows.values() if count is not None}
    if privacy.hides_counts:
        known = {training.batch_size}  # nothing depends on it
    if not known:
        return ["privacy: each client computes its epsilon from its number of rows, and reports it"]
    budgets = [
        budget_of_rows(privacy, training, count, training.steps_for(count), MemoryLedger())
        for count in sorted(known)
    ]
    epsilon = max(one.epsilon_after(training.rounds) for one in budgets)
    noise = [one.noise_multiplier for one in budgets]
    spread = f"{min(noise):.4g}" if min(noise) == max(noise) else f"{min(noise):.4g} to {max(noise):.4g}"
    whose = "for each row of a client" if len(budgets) == 1 else "for each row of the client that spends most"
    rounds = counted(training.rounds, "round")
    return [
        f"privacy: epsilon {epsilon:.4g} at delta {privacy.delta:g} after {rounds} with all "
        f"clients, {whose} ({privacy.accountant.upper()} accountant of Opacus){_seeded(sections)}",
        f"  DP-SGD at the clients: noise multiplier {spread}, gradients of rows clipped to "
        f"{privacy.first_clip_norm:g}",
    ]


def _seeded(sections: Sections) -> str:
    return "" if sections.privacy.seed is None else f"; {NOT_PRIVATE}"
