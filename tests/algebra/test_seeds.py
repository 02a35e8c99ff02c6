"""Seeds: a function of their purpose alone, and different for different purposes."""

import subprocess
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra.seeds import generator_for, seed_for

PURPOSES = st.lists(st.integers() | st.text(max_size=6), max_size=5).map(tuple)
MODERATE = settings(max_examples=200, deadline=None)


def typed(purpose: tuple) -> list[tuple[type, object]]:
    return [(type(part), part) for part in purpose]


@given(PURPOSES)
@MODERATE
def test_a_seed_has_63_bits_and_is_the_same_every_time(purpose):
    seed = seed_for(*purpose)
    assert isinstance(seed, int)
    assert 0 <= seed < 2**63
    assert seed == seed_for(*purpose)


@given(PURPOSES, PURPOSES)
@MODERATE
def test_different_purposes_have_different_seeds(one, other):
    assert (seed_for(*one) == seed_for(*other)) == (typed(one) == typed(other))


def test_seeds_depend_on_where_one_part_ends():
    purposes = [
        ("1", "2"), ("12",), (1, 2), (12,), ("1", 2), (1, "2"), (2, 1), (), ("",), ("", ""),
        ("int:1",), ("1;", "2"), ("1", ";2"), ("5:str:1",), ("1;5:str:2",),
    ]  # fmt: skip
    assert len({seed_for(*purpose) for purpose in purposes}) == len(purposes)


def test_neighbouring_rounds_and_clients_get_unrelated_seeds():
    seeds = [seed_for(0, "training", round, client) for round in range(40) for client in range(40)]
    assert len(set(seeds)) == len(seeds)
    for bit in range(63):  # every bit is a fair coin: 1600 throws, 5 standard deviations
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 800) < 100


def test_a_seed_is_the_same_in_another_process():
    code = "from fedsmoothlora.algebra.seeds import seed_for; print(seed_for(7, 'training', 3, 'client-ä'))"
    # -I ignores PYTHONHASHSEED, so the child hashes strings with a random salt.
    output = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert int(output.stdout) == seed_for(7, "training", 3, "client-ä")


@given(PURPOSES)
@settings(max_examples=20, deadline=None)
def test_a_generator_is_the_one_seeded_by_its_purpose(purpose):
    want = torch.randn(5, generator=torch.Generator().manual_seed(seed_for(*purpose)))
    before = torch.get_rng_state()
    generator = generator_for(*purpose)
    assert generator.device.type == "cpu"
    assert torch.equal(torch.randn(5, generator=generator), want)
    assert torch.equal(torch.get_rng_state(), before)
