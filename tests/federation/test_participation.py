"""Clients are drawn by seed, in client order, without repeats, and equally often in the long run."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.federation.participation import sample_clients
from fedsmoothlora.federation.settings import ParticipationSettings

ids = st.lists(st.text(max_size=8), unique=True, max_size=30)
numbers = st.integers(0, 2**40)


def names(count: int) -> list[str]:
    return [f"client {i}" for i in range(count)]


@given(clients=ids, count=st.integers(0, 40), seed=numbers, round=numbers, attempt=numbers, data=st.data())
def test_the_wanted_number_is_drawn_in_client_order_without_clients_asked_before(
    clients: list[str], count: int, seed: int, round: int, attempt: int, data: st.DataObject
) -> None:
    asked = data.draw(st.sets(st.sampled_from(clients)) if clients else st.just(set()))
    left = [client for client in clients if client not in asked]
    chosen = sample_clients(clients, count, seed, round, attempt, asked)
    assert len(chosen) == min(count, len(left))
    assert chosen == [client for client in left if client in chosen]  # no repeats, and their order
    assert chosen == sample_clients(list(clients), count, seed, round, attempt, list(asked))


@given(clients=ids, count=st.integers(1, 10), seed=numbers, round=numbers)
def test_attempts_ask_every_client_once_until_none_is_left(
    clients: list[str], count: int, seed: int, round: int
) -> None:
    asked: list[str] = []
    for attempt in range(len(clients) + 2):
        chosen = sample_clients(clients, count, seed, round, attempt, asked)
        assert bool(chosen) == (len(asked) < len(clients))
        asked += chosen
    assert sorted(asked) == sorted(clients)


@pytest.mark.parametrize("what", ["seed", "round", "attempt"])
def test_another_seed_round_or_attempt_draws_other_clients(what: str) -> None:
    draws = [
        tuple(sample_clients(names(30), 10, **{"seed": 1, "round": 1, "attempt": 1, what: value}))
        for value in range(100)
    ]
    assert len(set(draws)) == 100  # of 30 million possible ones


def test_the_draw_uses_positions_so_renaming_clients_changes_nothing_else() -> None:
    renamed = {f"client {i}": f"site {99 - i}" for i in range(20)}
    chosen = sample_clients(list(renamed), 5, 0, 3, 0)
    assert sample_clients(list(renamed.values()), 5, 0, 3, 0) == [renamed[client] for client in chosen]


def test_over_many_rounds_every_client_and_every_pair_takes_part_equally_often() -> None:
    clients, count, rounds = names(12), 3, 6000
    alone: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    gaps: list[int] = []
    last: dict[str, int] = {}
    for round in range(rounds):
        chosen = sample_clients(clients, count, 7, round, 0)
        alone.update(chosen)
        together.update((one, other) for i, one in enumerate(chosen) for other in chosen[i + 1 :])
        gaps += [round - last[client] for client in chosen if client in last]
        last.update(dict.fromkeys(chosen, round))
    for counted, ways, chance in (
        (alone, 12, count / 12),
        (together, 66, count * (count - 1) / (12 * 11)),
    ):
        assert len(counted) == ways
        deviation = math.sqrt(rounds * chance * (1 - chance))
        assert all(abs(times - rounds * chance) < 5 * deviation for times in counted.values())
    # Rounds are independent: a client comes back after 1 round with chance p, after 2 with (1 - p) p ...
    chance = count / 12
    for gap in range(1, 6):
        wanted = chance * (1 - chance) ** (gap - 1)
        assert gaps.count(gap) / len(gaps) == pytest.approx(wanted, abs=0.02)


@given(clients=st.integers(1, 10_000), wanted=st.integers(1, 20_000))
def test_a_number_of_clients_is_limited_to_all_clients(clients: int, wanted: int) -> None:
    assert ParticipationSettings(clients=wanted).count(clients) == min(wanted, clients)


@given(clients=st.integers(1, 10_000), fraction=st.floats(0, 1, exclude_min=True))
def test_a_fraction_is_the_nearest_number_of_clients_and_at_least_one(clients: int, fraction: float) -> None:
    count = ParticipationSettings(fraction=fraction).count(clients)
    assert 1 <= count <= clients
    assert abs(count - fraction * clients) <= 0.5 or count == 1


def test_all_clients_take_part_unless_a_key_is_set() -> None:
    assert ParticipationSettings().count(17) == 17
    assert ParticipationSettings(fraction=1.0).count(17) == 17
    assert ParticipationSettings(fraction=0.29).count(100) == 29  # .29 * 100 = 28.999999999999996
    assert ParticipationSettings(fraction=1e-9).count(17) == 1


@pytest.mark.parametrize(("settings", "fits"), [({"clients": 3}, 3), ({"fraction": 0.5}, 5), ({}, 10)])
def test_min_clients_above_the_clients_of_a_round_are_refused(settings: dict[str, Any], fits: int) -> None:
    participation = ParticipationSettings(**settings)
    participation.check(10, fits)
    with pytest.raises(ValueError, match=rf"uploads\.min_clients = {fits + 1}.*at most {fits}"):
        participation.check(10, fits + 1)
