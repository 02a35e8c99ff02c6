"""docs/configuration.md lists every key of a configuration as the code has it."""

from pathlib import Path

from tools.configuration_reference import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_document_is_the_output_of_the_command() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `make docs`"
