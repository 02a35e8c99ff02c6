"""docs/configuration.md lists every key of a configuration as the code has it."""

from pathlib import Path

from tools.configuration_reference import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_document_is_what_the_command_prints() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `make docs`"
