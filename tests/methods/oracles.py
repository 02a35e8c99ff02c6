"""Formulas of the methods in dense float64 by numpy, and the layers, uploads and views of their tests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.methods import ClientView, Layer, Method, ServerUpdate, ServerView, Update

F64 = torch.float64
RANK, SCALE, COUNTS = 2, 2.0, (3, 1, 4)
P = np.array(COUNTS) / sum(COUNTS)
LAYERS = {
    name: Layer(name, m, n, RANK, scale=SCALE, gradient_rank=min(m, n))
    for name, (m, n) in {"tall": (9, 7), "wide": (7, 12)}.items()
}


def method(name: str, **options: Any) -> Method:
    return methods.find(name)(**options)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def product(layer: Layer, seed: int, rank: int | None = None) -> LowRank:
    r = layer.rank if rank is None else rank
    return LowRank(normal(layer.m, r, seed=seed), normal(r, layer.n, seed=seed + 1000))


def products(seed: int, rank: int | None = None) -> dict[str, LowRank]:
    return {name: product(layer, seed + 10 * i, rank) for i, (name, layer) in enumerate(LAYERS.items())}


def dense(value: LowRank | Tensor | None) -> np.ndarray:
    """The dense matrix, without methods of `LowRank`; 0 for None."""
    if value is None:
        return np.zeros(())
    return value.numpy() if isinstance(value, Tensor) else value.B.numpy() @ value.A.numpy()


def svd(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, sigma, Vt = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


def mean(matrices: Sequence[np.ndarray]) -> np.ndarray:
    return np.einsum("c,cmn->mn", P[: len(matrices)] / P[: len(matrices)].sum(), np.stack(matrices))


def mean_of_products(uploads: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return mean([dense(upload[name]) for upload in uploads])


def close(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def initial(name: str) -> LowRank:
    layer = LAYERS[name]
    return LowRank(torch.zeros(layer.m, RANK, dtype=F64), normal(RANK, layer.n, seed=77 + len(name)))


def pretrained(name: str) -> Tensor:
    return normal(LAYERS[name].m, LAYERS[name].n, seed=5 + LAYERS[name].m)


@cache
def prepared() -> dict[str, LowRank]:
    """The result of FRLoRA's ``prepare``; the other methods prepare nothing."""
    return dict(method("frlora").prepare(LAYERS, pretrained))


def refuse(*_: Any) -> Any:
    raise AssertionError("a baseline has no use for a calibration gradient")


def client_view(round: int = 0, **known: Any) -> ClientView:
    found: dict[str, Any] = {
        "layers": LAYERS,
        "server_lora": {},
        "kept": {},
        "kept_round": round - 1,
        "received": {},
        "gradients": refuse,
        "initial": initial,
        "generator": lambda name: torch.Generator().manual_seed(round),
        "pretrained": pretrained,
        "prepared": prepared(),
        **known,
    }
    return ClientView(round=round, rounds=9, **found)


def server_view(round: int = 0, **known: Any) -> ServerView:
    return ServerView(
        **{
            "round": round,
            "rounds": 9,
            "layers": LAYERS,
            "initial": initial,
            "pretrained": pretrained,
            "prepared": prepared(),
            **known,
        }
    )


def aggregate(name: str, uploads: Sequence[Update], round: int = 0, **known: Any) -> ServerUpdate:
    return method(name).aggregate(uploads, COUNTS[: len(uploads)], server_view(round, **known))


def three(seed: int, rank: int | None = None) -> list[dict[str, LowRank]]:
    return [products(seed + 100 * c, rank) for c in range(3)]


def of_rank(rank: int) -> dict[str, Layer]:
    return {name: replace(layer, rank=rank) for name, layer in LAYERS.items()}
