"""CoNLL files: words with their tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsmoothlora.data.formats.base import Columns, Format, Wanted, check_columns
from fedsmoothlora.data.formats.text import opened
from fedsmoothlora.errors import DataError
from fedsmoothlora.printable import printable

# The columns of a CoNLL file: the first and the last of its lines.
TOKENS, TAGS = "tokens", "tags"
_NEW_DOCUMENT = "-DOCSTART-"
_VALUE_OF_KEY = re.compile(r"# +[^\s=][^\t=]* =( |$)")  # the comments of CoNLL-U: # sent_id = 3


class Conll(Format):
    """Sentences with a word and its tag in each line, and blank lines between them.

    Columns are separated by tabs or spaces. The first one is the word, the last one the tag (CoNLL-2003 has
    two others between them). Lines with ``-DOCSTART-`` are left out, and so are comments: lines before the
    first word of a sentence that begin with ``#`` and do not have the columns of the other lines, or are of
    the form ``# key = value``.
    """

    suffixes = (".conll", ".conll.gz")

    def read(self, path: Path, wanted: Wanted) -> Columns:
        check_columns(str(path), [TOKENS, TAGS], wanted)
        cells: dict[str, list[list[str]]] = {TOKENS: [], TAGS: []}
        width, inside, comments = 0, False, []
        with opened(path) as text:
            lines = list(text)
        typical = next((line for line in lines if line.strip() and not _begins_apart(line)), "")
        for number, line in enumerate(lines, 1):
            values = _values(line)
            if not any(values) or values[0] == _NEW_DOCUMENT:
                inside = False
                continue
            if not inside and _is_comment(line, typical):
                comments.append((number, line.strip()))
                continue
            width = width or len(values)
            if len(values) != width or width < 2:
                raise DataError(
                    f"{path}: line {number} has {len(values)} columns, should have "
                    + (f"{width} like the lines before" if width >= 2 else "a word and its tag")
                )
            if not values[-1]:
                raise DataError(
                    f"{path}: line {number}: the tag of the word {printable(values[0])!r} is missing; write "
                    "it into the last column"
                )
            if not inside:
                for sentences in cells.values():
                    sentences.append([])
                inside = True
            cells[TOKENS][-1].append(values[0])
            cells[TAGS][-1].append(values[-1])
        if not cells[TOKENS]:
            raise DataError(f"{path}: there are no sentences")
        return Columns(
            cells={name: cells[name] for name in wanted},
            length=len(cells[TOKENS]),
            notes=_comment_notes(path, comments),
        )

    def first_rows(self, path: Path, count: int) -> list[Mapping[str, Any]]:
        cells = self.read(path, {TOKENS: "task.tokens_column", TAGS: "task.tags_column"}).cells
        pairs = zip(cells[TOKENS][:count], cells[TAGS][:count], strict=True)
        return [{TOKENS: words, TAGS: tags} for words, tags in pairs]

    def place(self, path: Path) -> Callable[[int], str]:
        return lambda row: f"{path}: sentence {row + 1} (counted from 1)"


def _values(line: str) -> list[str]:
    return [value.strip() for value in line.split("\t")] if "\t" in line else line.split()


def _begins_apart(line: str) -> bool:
    """Whether a line may be no word, so that other lines show the columns of the file."""
    return line.startswith(("#", _NEW_DOCUMENT))


def _is_comment(line: str, typical: str) -> bool:
    """Whether a line before the first word of a sentence is a comment; ``typical`` is a line with a word.

    The word ``#`` has the columns of other words.
    """
    if not line.startswith("#") or not typical:
        return False
    if _VALUE_OF_KEY.match(line):
        return True
    # A line without tabs in a file with tabs is one column.
    return "\t" not in line and ("\t" in typical or len(_values(line)) != len(_values(typical)))


def _comment_notes(path: Path, comments: Sequence[tuple[int, str]]) -> list[str]:
    if not comments:
        return []
    number, line = comments[0]
    are = "line is a comment" if len(comments) == 1 else "lines are comments"
    return [
        f"{path}: {len(comments)} {are} and not read; the first is line {number}, {printable(line)[:40]!r}"
    ]
