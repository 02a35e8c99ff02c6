"""Layers that are decomposed together, against one layer after another."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.algebra import stacks
from fedsmoothlora.algebra.alignment import gradient_aligned, gradients_aligned, starts_with_errors
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.algebra.sketches import Sketch, SketchSize
from fedsmoothlora.algebra.spectral import leading_directions, leading_directions_of
from fedsmoothlora.algebra.stacks import in_stacks
from fedsmoothlora.errors import NotFiniteError
from fedsmoothlora.methods import ClientView, Layer
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA


@pytest.fixture
def stacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU stacks too, as an accelerator does."""
    monkeypatch.setattr(stacks, "STACKING", frozenset({"cpu"}))
    return None


def product(m: int, n: int, rank: int, seed: int) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))


def gradient(m: int, n: int, seed: int, decay: float = 0.8, directions: int = 400) -> torch.Tensor:
    """A matrix with a decaying spectrum."""
    draw = torch.Generator().manual_seed(seed)
    k = min(m, n, directions)
    P, Q = (torch.linalg.qr(torch.randn(rows, k, generator=draw, dtype=torch.float64)).Q for rows in (m, n))
    return ((P * decay ** torch.arange(k)) @ Q.mT).float()


def close(one: LowRank, other: LowRank) -> bool:
    assert one.rank == other.rank
    assert one.dtype == other.dtype
    error = float(torch.linalg.matrix_norm(one.dense() - other.dense()))
    return error <= 1e-4 * float(torch.linalg.matrix_norm(other.dense())) + 1e-30


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 2**30))
def test_results_are_in_the_order_of_the_items(kinds: list[int], most: int) -> None:
    calls: list[Sequence[tuple[int, int]]] = []

    def together(items: Sequence[tuple[int, int]]) -> list[str]:
        assert len({kind for _, kind in items}) == 1
        assert len(items) == 1 or len(items) * most <= stacks._NUMBERS
        calls.append(items)
        return [f"{place}: {kind}" for place, kind in items]

    found = in_stacks(list(enumerate(kinds)), lambda item: item[1], lambda _: most, together)
    assert found == [f"{place}: {kind}" for place, kind in enumerate(kinds)]
    assert sum(map(len, calls)) == len(kinds)


def test_directions_of_a_stack_are_those_of_each_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any scale; a matrix with a flat spectrum and a matrix of zeros are among them."""
    matrices = [scale * gradient(150, 120, seed) for seed, scale in enumerate((1.0, 1e-25, 1e20))]
    flat = gradient(150, 120, 9, decay=0.999)
    batches: list[tuple[int, ...]] = []
    real = torch.linalg.svd

    def counted(matrix: torch.Tensor, **options: bool) -> object:
        batches.append(tuple(matrix.shape))
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    found = leading_directions_of([*matrices, flat, torch.zeros(150, 120)], 6)
    assert batches[0] == (5, 20, 20)
    assert (150, 120) in batches  # the flat one
    for matrix, (P, sigma, Q) in zip([*matrices, flat], found, strict=False):
        alone = leading_directions(matrix, 6)
        assert torch.allclose(P, alone[0], atol=1e-4)
        assert torch.allclose(sigma, alone[1], rtol=1e-4)
        assert torch.allclose(Q, alone[2], atol=1e-4)
    assert float(found[-1][1].max()) == 0.0


def test_a_stack_with_a_matrix_that_is_not_finite_is_refused() -> None:
    matrices = [gradient(150, 120, seed) for seed in range(3)]
    matrices[1][5, 6] = float("inf")
    with pytest.raises(NotFiniteError, match="not finite"):
        leading_directions_of(matrices, 4)


@pytest.mark.usefixtures("stacking")
@pytest.mark.parametrize("partial", [False, True])
def test_aligned_products_of_all_layers_are_those_of_each_layer(partial: bool) -> None:
    """Layers of several shapes and ranks, with few directions, with none, and a sketch."""
    shapes = [(150, 120), (110, 130), (150, 120), (150, 120), (40, 30), (40, 30), (150, 120)]
    gradients: list[torch.Tensor | Sketch] = [
        gradient(m, n, seed, directions=3 if seed == 3 else 400) for seed, (m, n) in enumerate(shapes)
    ]
    gradients[2] = torch.zeros(150, 120)
    sketch = Sketch(SketchSize.of(150, 120, 2, width=8, passes=2), generator_for("sketch"))
    for _ in range(2):
        sketch.add(torch.eye(150), gradient(150, 120, 20))
        sketch.turn()
    gradients.append(sketch)
    ranks = [2, 3, 2, 2, 2, 2, 4, 2]
    found = gradients_aligned(gradients, ranks, 64.0, partial=partial)
    for one, rank, ga in zip(gradients, ranks, found, strict=True):
        assert close(ga, gradient_aligned(one, rank, 64.0, partial=partial))
    assert found[2].rank == 0
    assert found[3].rank == (1 if partial else 0)


@pytest.mark.usefixtures("stacking")
@pytest.mark.parametrize("balance", ["sqrt", "left"])
@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_truncated_sums_in_stacks_are_the_sums(balance: str, mode: str) -> None:
    shapes = [(30, 20), (12, 15), (30, 20), (30, 20), (5, 4)]
    gas = [product(m, n, 2, seed) for seed, (m, n) in enumerate(shapes)]
    rms = [product(m, n, 3, 10 + seed) for seed, (m, n) in enumerate(shapes)]
    rms[3] = LowRank(gas[3].B[:, [0, 0, 0]], gas[3].A[[0, 1, 0]])  # the sum has rank 2
    for ranks in ([2, 2, 1, 4, 2], [None] * 5):
        found = starts_with_errors(gas, rms, ranks, mode, balance)  # type: ignore[arg-type]
        for ga, rm, rank, (lora, shift, error) in zip(gas, rms, ranks, found, strict=True):
            total = (ga + rm).dense().double().numpy()
            U, sigma, Vt = np.linalg.svd(total, full_matrices=False)
            kept = len(sigma[:rank])
            best = (U[:, :kept] * sigma[:kept]) @ Vt[:kept]
            np.testing.assert_allclose(lora.dense().numpy(), best, atol=1e-4)
            assert error == pytest.approx(float((sigma[kept:] ** 2).sum()), rel=1e-3, abs=1e-6)
            want = -ga if mode == "truncated" else rm - lora
            np.testing.assert_allclose(shift.dense().numpy(), want.dense().numpy(), atol=1e-4)
            if balance == "left" and lora.rank:
                rows = lora.A.double()
                assert torch.allclose(rows @ rows.mT, torch.eye(lora.rank).double(), atol=1e-5)
        assert found[3][0].rank == (5 if ranks[3] is None else 2)  # without directions of rounding


@pytest.mark.usefixtures("stacking")
def test_a_stacked_sum_that_overflows_is_refused() -> None:
    good = product(30, 20, 2, 0)
    bad = LowRank(good.B * 1e30, good.A * 1e30)
    with pytest.raises(NotFiniteError, match="not finite"):
        LowRank.truncated_sums([(good, good), (bad, good)], [2, 2])


@pytest.mark.usefixtures("stacking")
def test_norms_where_layers_are_stacked_are_exact_for_sums_that_cancel() -> None:
    one = product(30, 20, 2, 0)
    assert one.norm() == pytest.approx(float(torch.linalg.matrix_norm(one.dense())), rel=1e-6)
    nearly = one - LowRank(one.B * (1 + 1e-6), one.A)
    assert nearly.norm() == pytest.approx(1e-6 * one.norm(), rel=0.2)


@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_starts_and_uploads_are_the_same_with_and_without_stacks(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's steps 1 to 6 over layers of several shapes."""
    shapes = {"q": (150, 120), "k": (110, 130), "v": (150, 120), "o": (150, 120), "head": (12, 40)}
    layers = {name: Layer(name, m, n, 2, 2.0, min(m, n)) for name, (m, n) in shapes.items()}

    def of_all(seed: int) -> dict[str, LowRank]:
        return {name: product(m, n, 2, seed + place) for place, (name, (m, n)) in enumerate(shapes.items())}

    def nothing(*_: object) -> LowRank:
        raise AssertionError("not asked for")

    view = ClientView(
        round=1,
        rounds=9,
        layers=layers,
        server_lora={},
        kept=of_all(0),
        kept_round=0,
        received=of_all(10),
        gradients=lambda at: {name: gradient(m, n, len(name) + m) for name, (m, n) in shapes.items()},
        initial=nothing,
        generator=lambda name: generator_for("rows", name),
    )
    method = FedSmoothLoRA(start_mode=mode)  # type: ignore[arg-type]
    found = []
    for devices in (frozenset[str](), frozenset({"cpu"})):
        monkeypatch.setattr(stacks, "STACKING", devices)
        start = method.start(view)
        found.append((start, method.upload(of_all(20), start, view)))
    (start, upload), (stacked_start, stacked_upload) = found
    for name in layers:
        assert close(stacked_start.lora[name], start.lora[name])
        assert close(stacked_start.shift[name], start.shift[name])
        sent, stacked = upload.sent[name], stacked_upload.sent[name]
        assert isinstance(sent, LowRank)
        assert isinstance(stacked, LowRank)
        assert close(stacked, sent)
    assert stacked_start.metrics == pytest.approx(start.metrics, rel=1e-4)
