"""The text of a row: a filled template, or a pair of columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from fedsmoothlora.data.prompts import Template, filled
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import ConfigError, DataError


class TextInput(Protocol):
    """The columns that make the text of a row, and how."""

    @property
    def wanted(self) -> dict[str, str]:
        """The columns, each with the configuration key that names it."""
        ...

    def texts(self, rows: Texts) -> tuple[str, ...] | tuple[tuple[str, str], ...]:
        """The text of every row, or its pair of texts. Raises ``DataError`` for a row without text."""
        ...


@dataclass(frozen=True)
class Filled:
    """A text for each row: a template with the row's values.

    Attributes:
        prompt: the template.
    """

    prompt: str

    @cached_property
    def _template(self) -> Template:
        template = Template(self.prompt, "task.prompt")
        if not template.columns:
            raise ConfigError(f"task.prompt = {self.prompt!r} names no column: all texts would be the same")
        return template

    @property
    def wanted(self) -> dict[str, str]:
        """The columns of the template."""
        return dict.fromkeys(self._template.columns, self._template.key)

    def texts(self, rows: Texts) -> tuple[str, ...]:
        """The filled templates."""
        return tuple(filled(rows, self._template))


@dataclass(frozen=True)
class Pair:
    """A pair of texts for each row.

    Attributes:
        columns: the column of the first text and that of the second.
    """

    columns: tuple[str, str]

    @property
    def wanted(self) -> dict[str, str]:
        """The two columns."""
        return dict.fromkeys(self.columns, "task.text")

    def texts(self, rows: Texts) -> tuple[tuple[str, str], ...]:
        """The pairs."""
        pairs = tuple(zip(*(rows.columns[name] for name in self.columns), strict=True))
        for number, pair in enumerate(pairs):
            if not any(text.strip() for text in pair):
                named = " and ".join(map(repr, self.columns))
                raise DataError(f"{rows.place(number)}, columns {named}: both texts are empty")
        return pairs


def text_input(prompt: str, pair: tuple[str, str] | None) -> TextInput:
    """The text of a row: the pair of columns if there is one, or else the template."""
    return Filled(prompt) if pair is None else Pair(pair)
