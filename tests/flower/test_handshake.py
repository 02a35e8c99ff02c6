"""The message of a site before round 0: its counts and texts are bounded."""

from dataclasses import replace
from typing import Any

import pytest

from fedsmoothlora.errors import DisagreementError, WireError
from fedsmoothlora.flower.handshake import SiteInfo

INFO = SiteInfo(client="a", samples=4, validation=1, classes=("x", "y"), weights="0" * 64, tokenizer="none")


def test_a_site_info_is_read_as_it_was_sent() -> None:
    shown = replace(INFO, histogram=(1, 3))
    for info in (INFO, shown):
        assert SiteInfo.read(info.table()) == info
        info.check(INFO)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"samples": 0}, r"samples is 0; it must be an integer from 1 to 2\^53"),
        ({"samples": 2**53 + 1}, "samples is 9007199254740993"),
        ({"samples": 4.0}, "samples is of type float"),
        ({"samples": True}, "samples is of type bool"),
        ({"validation": -1}, "validation is -1"),
        ({"validation": 2**60}, "validation is 1152921504606846976"),
        ({"histogram": [5, -1]}, "does not add up"),
        ({"histogram": [1, 1]}, "does not add up"),
        ({"classes": ["x", 1]}, "classes is of type list"),
        ({"own\nline": 1}, r"own\\nline"),
    ],
)
def test_an_impossible_site_info_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        SiteInfo.read({**INFO.table(), **changed})


@pytest.mark.parametrize(
    "info",
    [
        replace(INFO, classes=("\x1b[31mx\n" + "y" * 8_000_000,)),
        replace(INFO, classes=tuple("x\n" * 200_000)),
        replace(INFO, weights="0\n" * 4_000_000),
        replace(INFO, client="a\n" * 4_000_000, tokenizer="other"),
        replace(INFO, histogram=(1, 1, 2)),
    ],
    ids=["a long class", "many classes", "a long hash", "a long client id", "a long histogram"],
)
def test_a_disagreement_is_one_short_printable_line(info: SiteInfo) -> None:
    with pytest.raises(DisagreementError) as error:
        info.check(INFO)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3000
