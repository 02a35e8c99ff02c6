"""docs/methods.md agrees with the code and with a tiny federation."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedsmoothlora import methods
from fedsmoothlora.methods import Method
from tools.methods_table import computed, document, formula_up, measure, source

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"
C, R = 3, 2


@pytest.fixture(scope="module")
def printed() -> str:
    return document()


def test_the_document_is_the_output_of_the_command(printed: str) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == printed, "run `make docs`"


def test_every_method_is_in_both_tables(printed: str) -> None:
    for name in methods.names():
        assert sum(line.startswith(f"| `{name}` |") for line in printed.splitlines()) == 2


def method(name: str) -> Method:
    return methods.find(name)()


# Numbers up and down in an even round, by hand; the dense matrix where it is smaller.
BY_HAND: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "fedit": lambda m, n: (R * (m + n), R * (m + n)),
    "ffa": lambda m, n: (R * m, R * m),
    "rolora": lambda m, n: (R * m, R * n),
    "fedsa": lambda m, n: (R * n, R * n),
    "flora": lambda m, n: (R * (m + n), min(C * R * (m + n), m * n)),
    "fedex": lambda m, n: (R * (m + n), R * (m + n) + min((C + 1) * R * (m + n), m * n)),
    "flexlora": lambda m, n: (R * (m + n), R * (m + n)),
    "fedmomentum": lambda m, n: (R * (m + n), R * (m + n) + min((C - 1) * R * (m + n), m * n)),
    "frlora": lambda m, n: (R * (m + n), min(2 * R * (m + n), m * n)),
    "fed_svd": lambda m, n: (R * m, R * (m + n)),
    "lora_fair": lambda m, n: (R * (m + n), R * (m + n)),
    "fed_sb": lambda m, n: (R * R, R * R),
    "hetlora": lambda m, n: (R * (m + n), R * (m + n)),
    "ravan": lambda m, n: (R, R),
    "full": lambda m, n: (m * n, m * n),
    "local": lambda m, n: (0, 0),
    "fedsmoothlora": lambda m, n: (R * (m + n), R * (m + n)),
}


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40), (12, 10)])
@pytest.mark.parametrize("name", methods.names())
def test_sent_bytes_agree_with_the_formulas_at_every_shape(name: str, m: int, n: int) -> None:
    found = measure(method(name), m, n)
    if name == "florist":  # it depends on the uploads how many directions are merged
        assert 1 <= found.ranks[0] <= C * R
        assert (found.up[0], found.down[0]) == (4 * R * (m + n), 4 * min(found.ranks[0] * (m + n), m * n))
    else:
        up, down = BY_HAND[name](m, n)
        assert (found.up[0], found.down[0]) == (4 * up, 4 * down)
    assert computed(formula_up(method(name)), m, n, found.ranks) == list(found.up)
    assert computed(method(name).numbers_down, m, n, found.ranks) == list(found.down)


def test_a_wrong_formula_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.find("ffa"), "numbers_down", "r*n")
    with pytest.raises(ValueError, match=r"ffa sends \[320, 320\] bytes down; r\*n would be \[240, 240\]"):
        document()


def test_the_source_is_the_paper_of_the_first_line() -> None:
    assert source("FFA-LoRA (arXiv 2403.12313): (not this).\n\n(arXiv 1)") == "arXiv 2403.12313"
    assert source("No communication.") == "–"
