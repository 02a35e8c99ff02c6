"""``metrics.jsonl`` of a run in progress: only new lines are read, and memory does not grow with the run."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Iterator
from typing import BinaryIO

from fedsmoothlora.reports.metrics import metric
from fedsmoothlora.reports.reading import Metrics, parsed_lines

MOST_ROUNDS = 4_000
_BLOCK = 1 << 20
_COMPARED = 256
_TAIL = 1 << 16
_SUMMED = ("bytes", "seconds", "uploads")  # units


class FollowedMetrics:
    """The metrics of a file that is appended while it is read.

    A line counts when its end is written. If the bytes before the place that was read last have changed, the
    file was cut or replaced, as by a resumed run, and it is read again from its start.

    Of a client's metrics the last value is kept, and of a long run every second round, or fewer. Bytes,
    seconds and uploads of rounds that are not kept are added to the next one that is: sums stay right.

    Attributes:
        metrics: what was read.
    """

    def __init__(self) -> None:
        self._forget()

    def read(self, file: BinaryIO) -> None:
        """Read the lines that are new."""
        file.seek(self._offset - len(self._last))
        if file.read(len(self._last)) != self._last:
            self._forget()
        for lines in self._new_lines(file):
            for line in parsed_lines(lines):
                self.metrics.add(line)
            _bound(self.metrics)

    def _forget(self) -> None:
        self.metrics = Metrics()
        self._offset = 0
        self._last = b""  # the bytes before the offset

    def _new_lines(self, file: BinaryIO) -> Iterator[list[bytes]]:
        """Blocks of whole lines from the offset on. A line that fills a whole block is cut into several."""
        while True:
            file.seek(self._offset)
            block = file.read(_BLOCK)
            end = block.rfind(b"\n") + 1
            if not end and len(block) < _BLOCK:
                return
            block = block[: end or len(block)]
            self._offset += len(block)
            self._last = (self._last + block[-_COMPARED:])[-_COMPARED:]
            yield block.split(b"\n")


def newest_metrics(file: BinaryIO) -> Metrics:
    """The metrics at the end of the file, among them those of the server in the newest round."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    block = file.read(_TAIL)
    begin = block.find(b"\n") + 1 if size > _TAIL else 0
    metrics = Metrics()
    for line in parsed_lines(block[begin : block.rfind(b"\n") + 1].split(b"\n")):
        metrics.add(line)
    return metrics


def _bound(metrics: Metrics) -> None:
    """Leave out rounds until the metrics fit into the memory that they may take."""
    for name, by_client in metrics.clients.items():
        for client, series in by_client.items():
            if len(series) > 1:
                by_client[client] = _kept(name, series, [max(series)])
    while any(len(series) > MOST_ROUNDS for series in metrics.server.values()):
        rounds = sorted({round for series in metrics.server.values() for round in series})
        wanted = set(rounds[::2]) | {rounds[-1]}
        for name, series in metrics.server.items():
            kept = [round for round in sorted(series) if round in wanted] or [max(series)]
            metrics.server[name] = _kept(name, series, kept)


def _kept(name: str, series: dict[int, float], rounds: list[int]) -> dict[int, float]:
    """The values of these rounds, in order; sums over rounds of a metric that is summed."""
    if metric(name).unit not in _SUMMED:
        return {round: series[round] for round in rounds}
    found = dict.fromkeys(rounds, 0.0)
    for round, value in series.items():
        place = min(bisect_left(rounds, round), len(rounds) - 1)
        found[rounds[place]] += value if math.isfinite(value) else 0.0
    return found
