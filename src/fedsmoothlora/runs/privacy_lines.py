"""Sentences on the privacy of a run, for the terminal and the log."""

from __future__ import annotations

from fedsmoothlora.federation import accounting
from fedsmoothlora.federation.assembly import Sections, budget

NOT_PRIVATE = "NOT private: noise and sampling follow from privacy.seed"


def check_privacy(sections: Sections, clients: int) -> None:
    """Raise ``ConfigError`` if ``[privacy]`` does not fit so many clients, or Opacus is not installed."""
    if sections.privacy.on:
        sections.privacy.check(clients)
        accounting.require_opacus()


def warnings(sections: Sections) -> list[str]:
    """Warnings that hold for the whole run."""
    privacy = sections.privacy
    if not privacy.on:
        return []
    found = [] if privacy.seed is None else [f"privacy.seed = {privacy.seed}: this run is {NOT_PRIVATE}"]
    if sections.method.feeds_back:
        found.append(
            "method.server_feedback = true with privacy.unit = 'client': the part of the noise that "
            "truncation removes comes back in later rounds; without it, that part is dropped"
        )
    return found


def forecast(sections: Sections, clients: int) -> list[str]:
    """The epsilon of a private run after its last round, and the noise that it takes.

    Args:
        sections: the settings.
        clients: the number of clients, ``N``.
    """
    if not sections.privacy.on:
        return []
    privacy, planned, rounds = sections.privacy, budget(sections), sections.training.rounds
    assert privacy.clip_norm is not None
    noise, rate = planned.noise_multiplier, planned.sample_rate
    who = "all clients take part" if rate == 1 else f"each client takes part with probability {rate:g}"
    seeded = "" if privacy.seed is None else f"; {NOT_PRIVATE}"
    size = privacy.clip_norm / (rate * clients)
    return [
        f"privacy: epsilon {planned.epsilon_after(rounds):.4g} at delta {privacy.delta:g} after {rounds} "
        f"rounds, for each of {clients} clients ({privacy.accountant.upper()} accountant of Opacus; "
        f"{who}){seeded}",
        f"  noise multiplier {noise:.4g}: the noise of every released number has the standard deviation "
        f"{noise * size:.3g}; an upload changes all numbers together by at most {size:.3g} in norm",
    ]
