import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedsmoothlora.algebra.alignment import gradient_aligned
from fedsmoothlora.algebra.sketches import Sketch, SketchSize

PASSES = st.integers(1, 3)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(m: int, n: int, rank: int, seed: int, decay: float = 0.7) -> list[tuple[Tensor, Tensor]]:
    """Three pairs ``dY, X`` whose sum ``dY^T X`` has that rank, with decaying singular values."""
    P = torch.linalg.qr(torch.randn(m, rank, generator=rng(seed))).Q
    Q = torch.linalg.qr(torch.randn(n, rank, generator=rng(seed + 1))).Q
    parts = []
    for part in range(3):
        mix = torch.randn(rank + 4, rank, generator=rng(seed + 2 + part)) / (rank + 4) ** 0.5
        parts.append((mix @ (P * decay ** torch.arange(rank)).mT, mix @ Q.mT))
    return parts


def gradient(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((dY.double().mT @ X.double() for dY, X in parts), torch.zeros(()))


def sketched(parts: list[tuple[Tensor, Tensor]], size: SketchSize, seed: int = 0) -> Sketch:
    sketch = Sketch(size, rng(seed))
    while sketch.passes_left:
        for dY, X in parts:
            sketch.add(dY, X)
        sketch.turn()
    return sketch


def overlap(found: Tensor, wanted: Tensor) -> float:
    """Mean squared cosine between two spaces."""
    return float((found.double().mT @ wanted.double()).square().sum() / wanted.shape[1])


@st.composite
def low_rank(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """``m, n``, the start's rank, a gradient's rank that its sketch can hold, and passes."""
    rank = draw(st.integers(1, 4))
    m, n = draw(st.integers(4 * rank, 60)), draw(st.integers(4 * rank, 60))
    passes = draw(PASSES)
    return m, n, rank, draw(st.integers(2 * rank, 4 * rank)), passes


@given(low_rank(), st.integers(0, 1000))
def test_a_gradient_of_rank_within_the_width_is_found_exactly(
    case: tuple[int, int, int, int, int], seed: int
) -> None:
    m, n, rank, held, passes = case
    parts = batches(m, n, held, seed)
    P, sigma, Qt = torch.linalg.svd(gradient(parts), full_matrices=False)
    size = SketchSize.of(m, n, rank, width=4, passes=passes)
    found = sketched(parts, size, seed).leading_singular_vectors(2 * rank)
    torch.testing.assert_close(found[1].double(), sigma[: 2 * rank], rtol=1e-3, atol=1e-4 * float(sigma[0]))
    # The same operator on its leading directions, whatever the signs: G Q Q^T is P diag(sigma) Q^T.
    G = (P * sigma) @ Qt
    for vectors, matrix in ((found[2], G), (found[0], G.mT)):
        length = torch.linalg.vector_norm(matrix @ vectors.double(), dim=0)
        torch.testing.assert_close(length, sigma[: 2 * rank], rtol=1e-3, atol=1e-4 * float(sigma[0]))
        identity = torch.eye(2 * rank)
        torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_overlap_grows_with_the_width_and_the_passes(passes: int) -> None:
    parts = batches(120, 90, 90, 7, decay=0.93)
    P, _, Qt = torch.linalg.svd(gradient(parts))
    r = 4
    found = []
    for width in (2, 4, 8, 16):
        size = SketchSize.of(120, 90, r, width=width, passes=passes)
        p, _, q = sketched(parts, size).leading_singular_vectors(2 * r)
        found.append((overlap(p[:, r:], P[:, r : 2 * r]), overlap(q[:, :r], Qt[:r].mT)))
    for (p, q), (wider_p, wider_q) in pairwise(found):
        assert wider_p > p - 0.01
        assert wider_q > q - 0.01
    assert min(found[-1]) > 0.97
    assert found[0][0] < 0.9
    if passes > 1:
        fewer = SketchSize.of(120, 90, r, width=4, passes=passes - 1)
        p, _, _ = sketched(parts, fewer).leading_singular_vectors(2 * r)
        assert found[1][0] > overlap(p[:, r:], P[:, r : 2 * r])


@given(PASSES, st.integers(0, 1000))
def test_a_gradient_along_a_few_axes_is_found_too(passes: int, seed: int) -> None:
    """Only two of its rows are not 0, as if only two outputs mattered."""
    X = torch.randn(2, 30, generator=rng(seed))
    dY = torch.zeros(2, 20)
    dY[0, 3], dY[1, 7] = 1.0, 0.5
    size = SketchSize.of(20, 30, 1, width=2, passes=passes)
    sigma = torch.linalg.svdvals(dY.mT @ X)[:2]
    torch.testing.assert_close(
        sketched([(dY, X)], size, seed).leading_singular_vectors(2)[1], sigma, rtol=1e-2, atol=0
    )


def test_an_exact_sketch_gives_the_same_start_as_the_gradient() -> None:
    parts = batches(40, 30, 8, 3)
    sketch = sketched(parts, SketchSize.of(40, 30, 2, width=4, passes=2))
    wanted = gradient_aligned(gradient(parts).float(), 2, 64.0)
    got = gradient_aligned(sketch, 2, 64.0)
    torch.testing.assert_close(got.B, wanted.B, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.A, wanted.A, rtol=1e-3, atol=1e-4)


@given(PASSES, st.integers(1, 3), st.integers(0, 100))
def test_a_gradient_with_too_few_directions_gives_no_start(passes: int, rank: int, seed: int) -> None:
    size = SketchSize.of(50, 40, rank, width=8, passes=passes)
    for held in (2 * rank - 1, 2 * rank):
        sketch = sketched(batches(50, 40, held, seed), size)
        assert gradient_aligned(sketch, rank, 64.0).rank == (rank if held == 2 * rank else 0)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_zero_gradient_and_an_unused_layer_give_no_start(passes: int) -> None:
    size = SketchSize.of(20, 30, 2, width=3, passes=passes)
    for parts in ([], [(torch.zeros(5, 20), torch.zeros(5, 30))]):
        assert gradient_aligned(sketched(parts, size), 2, 64.0).rank == 0


@given(PASSES, st.sampled_from([1e-25, 1e-12, 1e12]))
def test_the_size_of_the_gradient_does_not_matter(passes: int, scale: float) -> None:
    size = SketchSize.of(40, 50, 2, width=4, passes=passes)
    parts = batches(40, 50, 20, 1)
    plain = sketched(parts, size).leading_singular_vectors(4)
    scaled = sketched([(dY * scale, X) for dY, X in parts], size).leading_singular_vectors(4)
    torch.testing.assert_close(scaled[0], plain[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(scaled[2], plain[2], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(scaled[1] / scale, plain[1], rtol=1e-3, atol=0)


def test_a_sketch_is_a_function_of_gradient_and_seed() -> None:
    parts = batches(40, 50, 30, 1, decay=0.95)
    size = SketchSize.of(40, 50, 2, width=3, passes=2)
    first, again, other = (sketched(parts, size, seed).leading_singular_vectors(4)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_bfloat16_is_summed_in_float32() -> None:
    """Many batches, each too small to change a bfloat16 sum."""
    dY, X = torch.randn(4, 40, generator=rng(0)), torch.randn(4, 30, generator=rng(1))
    dY, X = dY.bfloat16(), X.bfloat16()
    size = SketchSize.of(40, 30, 1, width=4, passes=2)
    sketch = sketched([(dY, X)] * 600, size)
    sigma = torch.linalg.svdvals(600 * dY.double().mT @ X.double())
    torch.testing.assert_close(sketch.leading_singular_vectors(4)[1].double(), sigma[:4], rtol=1e-4, atol=0)


class Tensors(TorchFunctionMode):
    """Records every tensor that a torch function returns, except those of the batches."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for part in parts for tensor in part}
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(one) for one in _flat(result)]
        return result

    def alive(self) -> int:
        """Bytes of the recorded tensors that are still alive, each storage once."""
        storages = [tensor.untyped_storage() for ref in self.made if (tensor := ref()) is not None]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in held.items() if pointer not in self.given)


def _flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [one for one in result if isinstance(one, Tensor)] if isinstance(result, tuple) else []


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize(("m", "n"), [(200, 200), (300, 120), (120, 300)])
def test_no_more_than_1_2_w_m_plus_n_numbers_are_held(m: int, n: int, passes: int) -> None:
    size = SketchSize.of(m, n, 2, width=8, passes=passes)
    parts = batches(m, n, 40, 5)
    with Tensors(parts) as tensors:
        sketch = Sketch(size, rng(0))
        held = [tensors.alive()]
        while sketch.passes_left:
            for dY, X in parts:
                sketch.add(dY, X)
                held.append(tensors.alive())
            sketch.turn()
            held.append(tensors.alive())
    widest = max(size.width, size.second)
    assert max(held) <= 1.2 * widest * (m + n) * 4
    # Vectors of the numerical library's own, such as QR's other results, may be held a moment longer.
    assert max(held) == pytest.approx(4 * size.numbers, rel=0.02)


def test_a_sketch_pays_only_where_it_is_smaller_than_the_gradient() -> None:
    assert SketchSize.of(384, 384, 8, width=8, passes=2).numbers == 64 * 768
    assert SketchSize.of(384, 384, 16, width=8, passes=1).width == 130
    assert SketchSize.of(384, 384, 16, width=8, passes=1).second == 259
    assert SketchSize.of(384, 384, 16, width=8, passes=2).pays
    assert not SketchSize.of(384, 384, 16, width=8, passes=1).pays
    head = SketchSize.of(10, 768, 2, width=8, passes=2)
    assert head.width == 10  # no wider than the gradient
    assert not head.pays


def test_invalid_sizes_passes_and_counts_are_refused() -> None:
    for passes in (0, 4):
        with pytest.raises(ValueError, match="1, 2 or 3 passes"):
            SketchSize.of(20, 20, 2, width=4, passes=passes)
    with pytest.raises(ValueError, match="at least 2r columns"):
        SketchSize.of(20, 20, 2, width=1, passes=2)
    sketch = Sketch(SketchSize.of(20, 20, 2, width=2, passes=2), rng(0))
    with pytest.raises(RuntimeError, match="2 passes left"):
        sketch.leading_singular_vectors(4)
    sketch.turn()
    sketch.turn()
    with pytest.raises(RuntimeError, match="all 2 passes"):
        sketch.turn()
    with pytest.raises(ValueError, match="width 4 cannot give 5"):
        sketch.leading_singular_vectors(5)
