"""Write docs/methods.svg: bytes of a round against bytes of state, for every method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from jinja2 import Environment

from fedsmoothlora import methods
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.methods import Family
from fedsmoothlora.reports.charts.palette import LIGHT
from tools.methods_table import Measured, measure

_WIDTH, _HEIGHT = 760, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 740, 46, 380
_COLOURS = dict(zip(get_args(Family), ("accent", "second", "third", "fourth"), strict=True))

_TEMPLATE = Path(__file__).parent / "methods.svg.jinja"
_LETTER = 7.2  # the mean width of a letter


@dataclass(frozen=True)
class Point:
    """A method in the picture: bytes that it sends in a round, and bytes that it keeps after some rounds."""

    method: str
    family: str
    sent: float
    kept: int


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis, from ``begin`` to ``end``, with a place for 0 at its beginning."""

    begin: float
    end: float
    values: Sequence[float]

    def place(self, value: float) -> float:
        """The coordinate of a value."""
        low, high = (math.log10(limit) for limit in self._limits())
        zero = 0.12 if min(self.values) <= 0 else 0.0  # the share of the axis that belongs to 0
        share = zero + (1 - zero) * (math.log10(value) - low) / (high - low) if value > 0 else zero / 4
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self) -> list[dict[str, object]]:
        """The places of 0 and of round numbers, with their labels."""
        low, high = self._limits()
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [digit * 10**power for power in powers for digit in (1, 3)]
        shown = [0, *values] if min(self.values) <= 0 else values
        return [
            {"place": self.place(value), "label": f"{value:,}"}
            for value in shown
            if not value or low <= value <= high
        ]

    def _limits(self) -> tuple[float, float]:
        positive = [value for value in self.values if value > 0]
        return min(positive) / 1.5, max(positive) * 1.5


def points() -> list[Point]:
    """All methods, measured in the tiny federation of docs/methods.md."""
    found = []
    for name in methods.by_family():
        kind = methods.find(name)
        measured = measure(kind())
        sent = (sum(measured.up) + sum(measured.down)) / len(measured.up)
        found.append(Point(name, kind.family, sent, _kept(measured)))
    return found


def _kept(measured: Measured) -> int:
    """Bytes that one client and the server keep between rounds."""
    state, server = measured.state, measured.server
    client = [*state.uploads.values(), *(segment.updates for segment in state.segments)]
    return sum(map(_nbytes, [*client, server.model, server.lora or {}, server.memory, *server.updates]))


def _nbytes(update: Coded) -> int:
    return sum(value.nbytes for value in update.values())


def picture(found: Sequence[Point]) -> str:
    """The picture as SVG; methods at one place share a label."""
    across = _Axis(_LEFT, _RIGHT, [point.sent for point in found])
    upwards = _Axis(_BOTTOM, _TOP, [point.kept for point in found])
    together: dict[tuple[float, float], list[Point]] = defaultdict(list)
    for point in found:
        together[across.place(point.sent), upwards.place(point.kept)].append(point)
    places = [(x + 11 * i, y, one) for (x, y), them in together.items() for i, one in enumerate(them)]
    dots = [{"x": x, "y": y, "colour": LIGHT[_COLOURS[one.family]]} for x, y, one in places]
    taken: list[_Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in places]
    labels = []
    for (x, y), members in together.items():
        text = ", ".join(one.method for one in members)
        label, box = _label(text, x, x + 11 * (len(members) - 1), y, taken)
        labels.append(label)
        taken.append(box)
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        colours=LIGHT,
        families=[(family, LIGHT[colour]) for family, colour in _COLOURS.items()],
        across=across.ticks(),
        upwards=upwards.ticks(),
        dots=dots,
        labels=labels,
    )


_Box = tuple[float, float, float, float]


def _label(
    text: str, first: float, last: float, y: float, taken: Sequence[_Box]
) -> tuple[dict[str, object], _Box]:
    """A label beside, above or below the dots from ``first`` to ``last`` where there is room, and its box."""
    width, middle = _LETTER * len(text), (first + last) / 2
    places = [(last + 9, y + 4), (first - 9 - width, y + 4)]
    places += [(last + 7, y - 8), (first - 7 - width, y - 8)]
    places += [(middle - width / 2, y + shift) for shift in (-11, 19, -26, 34)]
    for x, base in places:
        box = (x, base - 10, x + width, base + 3)
        free = all(
            box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
            for other in taken
        )
        if free and x >= _LEFT and box[2] <= _WIDTH:
            break
    return {"x": round(x, 1), "y": round(base, 1), "anchor": "start", "text": text}, box


if __name__ == "__main__":
    print(picture(points()), end="")
