"""CoNLL files: words with their tags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsmoothlora.data.formats.base import Columns, Format, Wanted, check_columns
from fedsmoothlora.data.formats.text import opened
from fedsmoothlora.errors import DataError

# The columns of a CoNLL file: the first and the last of its lines.
TOKENS, TAGS = "tokens", "tags"
_NEW_DOCUMENT = "-DOCSTART-"


class Conll(Format):
    """Sentences with a word and its tag in each line, and blank lines between them.

    Columns are separated by tabs or spaces. The first one is the word, the last one the tag (CoNLL-2003 has
    two others between them). Lines with ``-DOCSTART-`` are left out.
    """

    suffixes = (".conll", ".conll.gz")

    def read(self, path: Path, wanted: Wanted) -> Columns:
        check_columns(str(path), [TOKENS, TAGS], wanted)
        cells: dict[str, list[list[str]]] = {TOKENS: [], TAGS: []}
        width, inside = 0, False
        with opened(path) as text:
            for number, line in enumerate(text, 1):
                values = [value.strip() for value in line.split("\t")] if "\t" in line else line.split()
                if not any(values) or values[0] == _NEW_DOCUMENT:
                    inside = False
                    continue
                width = width or len(values)
                if len(values) != width or width < 2:
                    raise DataError(
                        f"{path}: line {number} has {len(values)} columns, should have "
                        + (f"{width} like the lines before" if width >= 2 else "a word and its tag")
                    )
                if not inside:
                    for sentences in cells.values():
                        sentences.append([])
                    inside = True
                cells[TOKENS][-1].append(values[0])
                cells[TAGS][-1].append(values[-1])
        if not cells[TOKENS]:
            raise DataError(f"{path}: there are no sentences")
        return Columns(cells={name: cells[name] for name in wanted}, length=len(cells[TOKENS]))

    def first_rows(self, path: Path, count: int) -> list[Mapping[str, Any]]:
        cells = self.read(path, {TOKENS: "task.tokens_column", TAGS: "task.tags_column"}).cells
        pairs = zip(cells[TOKENS][:count], cells[TAGS][:count], strict=True)
        return [{TOKENS: words, TAGS: tags} for words, tags in pairs]

    def place(self, path: Path) -> Callable[[int], str]:
        return lambda row: f"{path}: sentence {row + 1} (counted from 1)"
