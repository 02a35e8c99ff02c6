"""Client-level privacy: sensitivity, noise, the empty round, and what leaves a client."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Layer, Update
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.accounting import Budget
from fedsmoothlora.federation.aggregation import Combined
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.noise import Noise, secure_gaussians
from fedsmoothlora.federation.participation import sample_in_secret
from fedsmoothlora.federation.privacy import PrivateMean
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.settings import PrivacySettings
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.wire import pack
from fedsmoothlora.methods import ServerView

pytest.importorskip("opacus")

Make = Callable[..., Simulation]
LAYERS = {"w": Layer("w", 6, 5, 2, 0.5, 5), "v": Layer("v", 4, 3, 2, 2.0, 3)}
HEAD = {"bias": torch.tensor([1.0, -2.0, 3.0])}
PRIVATE = [name for name in methods.names() if methods.find(name).traits.uses_mean_only]
CLIP, POPULATION, RATE = 0.7, 5, 0.5

ON = {"privacy.unit": "client", "privacy.clip_norm": 0.5, "privacy.noise_multiplier": 1.0, "privacy.delta": 1e-5}
SEEDED = {**ON, "privacy.seed": 3}


class NoNoise(Noise):
    def draw(self, shape: Any, std: float, round: int, name: str) -> Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)


def private_mean(method: str, noise: Noise | None = None) -> PrivateMean:
    chosen = PrivacySettings(unit="client", clip_norm=CLIP, noise_multiplier=2.0, delta=1e-5)
    return PrivateMean(
        method=methods.find(method)(),
        clip_norm=CLIP,
        population=POPULATION,
        budget=Budget(settings=chosen, sample_rate=RATE, rounds=9),
        noise=noise or NoNoise(),
    )


def lora(layer: Layer, seed: int, size: float = 1.0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(layer.m, layer.rank, generator=draw)
    return LowRank(size * B, torch.randn(layer.rank, layer.n, generator=draw))


def view(round: int = 0, seed: int = 100) -> ServerView:
    """A server whose LoRA, where the method keeps one, is not 0."""
    held = {name: lora(layer, seed + place) for place, (name, layer) in enumerate(LAYERS.items())}
    return ServerView(
        round=round, rounds=9, layers=LAYERS, model=held, initial=lambda name: held[name], prepared=held
    )


def server_of(method: str, round: int = 0) -> ServerView:
    """`view`, without a LoRA for methods that merge everything."""
    keeps = method not in ("fedsmoothlora", "flora", "full", "frlora")
    return view(round) if keeps else replace(view(round), model={})


def upload(method: str, round: int, seed: int, size: float) -> dict[str, LowRank | Tensor]:
    part = methods.find(method)().sends(round)
    found: dict[str, LowRank | Tensor] = {}
    for place, (name, layer) in enumerate(LAYERS.items()):
        product = lora(layer, seed * 10 + place, size)
        dense = torch.randn(layer.m, layer.n, generator=torch.Generator().manual_seed(seed)) * size
        found[name] = {"product": product, "B": product.B, "A": product.A, "W": dense}[part]
    return found


def reply(method: str, client: int, size: float, round: int = 0) -> Reply:
    bias = HEAD["bias"] + size * torch.randn(3, generator=torch.Generator().manual_seed(client))
    return Reply(
        client=str(client), round=round, samples=1, sent=upload(method, round, client, size), head={"bias": bias}
    )


def coordinates(values: Mapping[str, LowRank | Tensor], apart: bool) -> Tensor:
    """Everything that is released, as one vector in float64."""
    parts: list[Tensor] = []
    for value in values.values():
        if isinstance(value, Tensor):
            parts.append(value)
        else:
            parts += [value.B, value.A] if apart else [value.B.double() @ value.A.double()]
    return torch.cat([part.double().flatten() for part in parts])


def released(method: str, combined: Combined) -> Tensor:
    apart = methods.find(method).traits.averages_factors
    return torch.cat([coordinates(combined.uploads[0], apart), coordinates(combined.head, apart)])


@pytest.mark.parametrize("method", PRIVATE)
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0.0, 1e-3, 0.05, 1.0, 30.0, 1e6]), min_size=1, max_size=4),
    left_out=st.integers(0, 3),
    round=st.integers(0, 1),
)
def test_one_client_changes_a_release_by_at_most_the_clip_norm_over_the_denominator(
    method: str, sizes: list[float], left_out: int, round: int
) -> None:
    server, rule = server_of(method, round), private_mean(method)
    everyone = [reply(method, client, size, round) for client, size in enumerate(sizes)]
    others = [one for place, one in enumerate(everyone) if place != left_out % len(everyone)]

    with_it = released(method, rule.combine(everyone, server, HEAD))
    without = released(method, rule.combine(others, server, HEAD))

    distance = float(torch.linalg.vector_norm(with_it - without))
    rounding = 1e-6 * (1 + float(without.norm()))  # of float32, in which noised numbers are released
    assert distance <= CLIP / (RATE * POPULATION) + rounding
    if max(sizes) >= 30 and sizes[left_out % len(sizes)] >= 30:
        assert distance >= 0.99 * CLIP / (RATE * POPULATION) - rounding  # the bound is reached
