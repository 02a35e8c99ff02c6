"""Average, starts and uploads of a round in factors, compared with SVDs of the dense products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import dense
from benchmarks.rows import Row, interleaved, peak_allocated, seconds
from fedsmoothlora.algebra.alignment import average, round_matching, start_factors, upload_product
from fedsmoothlora.algebra.lowrank import LowRank


@dataclass(frozen=True)
class Model:
    """Shapes ``(m, n)`` of the adapted layers and how many there are of each."""

    shapes: dict[tuple[int, int], int]
    rank: int
    clients: int
    repetitions: int


# gate and up of a Llama are (8192, 2048); down is their transpose, whose SVDs cost the same.
MODELS = {
    "ViT-S": Model({(1152, 384): 12, (100, 384): 1}, rank=2, clients=5, repetitions=7),
    "Llama-3.2-1B": Model(
        {(2048, 2048): 2 * 16, (512, 2048): 2 * 16, (8192, 2048): 3 * 16}, rank=32, clients=3, repetitions=3
    ),
}


@dataclass(frozen=True)
class Layer:
    """The inputs of one layer's part of a round: uploads, a client's GA, the last server update."""

    uploads: list[LowRank]
    aligned: LowRank
    update: LowRank

    @classmethod
    def drawn(cls, m: int, n: int, model: Model) -> Layer:
        """Random factors of these shapes."""
        generator = torch.Generator().manual_seed(m * n)
        drawn = [
            LowRank(
                torch.randn(m, model.rank, generator=generator),
                torch.randn(model.rank, n, generator=generator),
            )
            for _ in range(model.clients + 2)
        ]
        return cls(drawn[2:], drawn[0], drawn[1])


def in_factors(layer: Layer, model: Model) -> dict[str, Callable[[], object]]:
    """The server's average, one client's start and one client's upload, as the package computes them."""
    counts = [1.0] * len(layer.uploads)

    def start() -> tuple[LowRank, LowRank]:
        match = round_matching(layer.uploads[0], [layer.update], 1.0)
        return start_factors(layer.aligned, match, model.rank)

    return {
        "average": lambda: average(layer.uploads, counts, model.rank),
        "start": start,
        "upload": lambda: upload_product(layer.uploads[1], -layer.aligned, model.rank),
    }


def _dense_average(layer: Layer, model: Model) -> Tensor:
    factors = [(product.B, product.A) for product in layer.uploads]
    return dense.average(factors, [1] * len(factors), model.rank)


def _randomised_average(layer: Layer, model: Model) -> Tensor:
    mean = sum(product.B @ product.A for product in layer.uploads) / len(layer.uploads)
    torch.manual_seed(0)
    P, _, _ = torch.svd_lowrank(mean, q=4 * model.rank, niter=8)
    return P[:, : model.rank]


def rows(name: str) -> Iterator[Row]:
    """Seconds and memory of ``name``'s round; one decomposition of each dense shape is timed.

    A round needs one for the average, and two for each client: its start and its upload.
    """
    model = MODELS[name]
    steps = 1 + 2 * model.clients
    ours = full = randomised = 0.0
    held, held_dense = [], []
    for (m, n), count in model.shapes.items():
        layer = Layer.drawn(m, n, model)
        calls = in_factors(layer, model)
        large = m * n > 1_000_000
        full_once = seconds(lambda layer=layer: _dense_average(layer, model)) if large else 0.0
        times = interleaved(
            {
                **calls,
                "randomised": lambda layer=layer: _randomised_average(layer, model),
                **({} if large else {"dense": lambda layer=layer: _dense_average(layer, model)}),
            },
            model.repetitions,
        )
        ours += count * (times["average"] + model.clients * (times["start"] + times["upload"]))
        full += count * steps * times.get("dense", full_once)
        randomised += count * steps * times["randomised"]
        held.append(max(peak_allocated(call) for call in calls.values()) - _result(m, n, model))
        held_dense.append(peak_allocated(lambda layer=layer: _dense_average(layer, model)) - 4 * m * n)
    fast = ("at most 0.01", "at most 0.025") if name.startswith("Llama") else ("", "")
    yield Row(
        name=f"{name} average, starts, uploads: full SVD",
        value=ours,
        unit="s",
        against=full,
        target=fast[0],
    )
    yield Row(
        name=f"{name} average, starts, uploads: svd_lowrank",
        value=ours,
        unit="s",
        against=randomised,
        target=fast[1],
    )
    yield Row(
        name=f"{name} peak memory beyond inputs and outputs: full SVD",
        value=max(held) / 1e6,
        unit="MB",
        against=max(held_dense) / 1e6,
        target="under 0.05" if name.startswith("Llama") else "",
    )


def _result(m: int, n: int, model: Model) -> int:
    """Bytes of a result in factors."""
    return 4 * model.rank * (m + n)
