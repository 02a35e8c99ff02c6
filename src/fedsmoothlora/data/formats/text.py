"""Open text files, compressed or not."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fedsmoothlora.errors import DataError


@contextmanager
def opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file's text, decompressed. Raises ``DataError`` if it is not UTF-8, or the archive is damaged."""
    try:
        with (
            gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb") as content,
            io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as text,
        ):
            yield text
    except UnicodeDecodeError:
        raise DataError(f"{file}: {_undecodable(file)}; save the file with the encoding UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: cannot be decompressed, perhaps it is cut off: {error}") from None


def _undecodable(file: Path) -> str:
    """The place of the first byte that is not UTF-8."""
    with gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                utf16 = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
                return (
                    f"line {number} is not UTF-8 text (byte {line[error.start]:#04x} at place "
                    f"{error.start + 1} of the line{'; the file is probably UTF-16' if utf16 else ''})"
                )
    return "the file is not UTF-8 text"
