"""Coding and decoding a round in few bits, beside starts, uploads and average of the same round uncoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.algebra import MODELS, Layer, Model, in_factors
from benchmarks.rows import Row, interleaved
from fedsmoothlora.algebra import alignment, sums
from fedsmoothlora.algebra.alignment import average, upload_product
from fedsmoothlora.algebra.averaging import exact_mean
from fedsmoothlora.algebra.coding import code_product, unpacked
from fedsmoothlora.algebra.lowrank import LowRank

_BITS = (8, 4, 3)


def rows() -> Iterator[Row]:
    """Seconds of a round at the shapes of Llama-3.2-1B, and the bytes of one upload."""
    model = MODELS["Llama-3.2-1B"]
    uncoded = dict.fromkeys(_BITS, 0.0)
    coding = dict.fromkeys(_BITS, 0.0)
    later = dict.fromkeys(_BITS, 0.0)  # with server feedback, whose memory is dense after some rounds
    sent, formula = dict.fromkeys(_BITS, 0), dict.fromkeys(_BITS, 0)
    for (m, n), count in model.shapes.items():
        layer = Layer.drawn(m, n, model)
        for bits in _BITS:
            calls = _calls(layer, model, bits)
            times = interleaved({**in_factors(layer, model), **calls}, model.repetitions)
            uncoded[bits] += count * (times["average"] + model.clients * (times["start"] + times["upload"]))
            # A client codes its upload and decodes one update; the server decodes all uploads and codes one.
            clients = model.clients * (times["code upload"] + times["decode"] + times["decode"])
            coding[bits] += count * (clients + times["code mean"] + times["decode"])
            later[bits] += count * (clients + times["feed back"])
            product = layer.uploads[0]
            sent[bits] += count * code_product(product, product.truncate(model.rank), bits).nbytes
            formula[bits] += count * (model.rank * (m + n) * bits // 8 + 4 * model.rank)
    for bits in _BITS:
        yield Row(
            name=f"Llama-3.2-1B, {bits} bits: coding and decoding against starts, uploads and average",
            value=coding[bits],
            unit="s",
            against=uncoded[bits],
            target="at most 1.5",
        )
    for bits in _BITS:
        yield Row(
            name=f"Llama-3.2-1B, {bits} bits: the same in a round with a dense server feedback",
            value=later[bits],
            unit="s",
            against=uncoded[bits],
            target="at most 1.5",
        )
    for bits in _BITS:
        yield Row(
            name=f"Llama-3.2-1B, {bits} bits: bytes of an upload against r (m + n) bits / 8 + 4 r",
            value=sent[bits] / 1e6,
            unit="MB",
            against=formula[bits] / 1e6,
            target="at most 1",
        )


def _calls(layer: Layer, model: Model, bits: int) -> dict[str, Callable[[], object]]:
    """The calls that packed transport adds. The singular vectors that are coded are computed anyway."""
    change = LowRank.weighted_sum([layer.uploads[1], layer.aligned], [1.0, -1.0])
    upload = upload_product(layer.uploads[1], -layer.aligned, model.rank)
    counts = [1.0] * len(layer.uploads)
    mean = average(layer.uploads, counts, model.rank)
    packed = code_product(change, upload, bits)
    # A memory that fills every direction, of the norm of the mean.
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    memory = noise * (mean.norm() / float(torch.linalg.matrix_norm(noise)))

    def feed_back() -> object:
        matrix = sums.unformed(exact_mean(layer.uploads, counts), memory)
        leading = alignment.truncated(matrix, model.rank, feeds_back=True)
        sent = code_product(matrix, leading, bits)
        return sums.remainder(matrix, LowRank.of(unpacked(sent)), overwrites=True)

    return {
        "code upload": lambda: code_product(change, upload, bits),
        "code mean": lambda: code_product(exact_mean(layer.uploads, counts), mean, bits),
        "decode": lambda: unpacked(packed),
        "feed back": feed_back,
    }
