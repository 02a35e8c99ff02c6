"""Push an export to a repository of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, get_token

# The base class of the hub's errors and of its HTTP library's, whose package differs between versions.
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from fedsmoothlora.errors import ExportError, NoExportError
from fedsmoothlora.exports.loading import FACTS
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.printable import printable

# An export is the model, its tokenizer or image processor, and the card. Nothing else is pushed.
_ENDINGS = (".json", ".safetensors", ".md", ".txt", ".model", ".jinja")
_LONGEST = 300


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export: its name within the folder, and its size in bytes."""

    name: str
    size: int


def exported_files(folder: Path) -> list[ExportedFile]:
    """The files of an export, by name.

    Raises:
        NoExportError: ``folder`` was not written by an export.
        ExportError: it also holds something that is no part of an export.
    """
    if not (folder / FACTS).is_file():
        raise NoExportError(f"{folder} was not written by fedsmoothlora export: it has no {FACTS}")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink() or not path.is_file() or PurePosixPath(name).suffix not in _ENDINGS:
            raise ExportError(f"{folder}: {printable(name)} is no part of an export, so nothing is pushed")
        found.append(ExportedFile(name, path.stat().st_size))
    return found


def paths_named(folder: Path) -> list[str]:
    """Folders of this machine that the export's own description names as its base model or its data."""
    table = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    named = (table.get("base", {}).get("source"), table.get("data"))
    return [name for name in named if isinstance(name, str) and Path(name).is_absolute()]


class Repository:
    """A model repository on the hub.

    Args:
        name: ``NAME`` of the user's own, or ``OWNER/NAME``.
        api: the hub; that of ``HF_ENDPOINT`` with the login of this machine unless given.

    Raises:
        ExportError: the name is not valid, or nobody is logged in.
    """

    def __init__(self, name: str, api: HfApi | None = None) -> None:
        with _hub_errors(name):
            validate_repo_id(name)
        self.name = name
        self._api = api or HfApi()
        if self._api.token is None and get_token() is None:
            raise ExportError(
                f"--push {name}: nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN"
            )

    def check(self) -> str:
        """The name of the user who is logged in. Raises ``ExportError`` if the hub refuses the login."""
        with _hub_errors(self.name):
            return str(self._api.whoami()["name"])

    def push(
        self,
        folder: Path,
        *,
        private: bool = False,
        confirm: Callable[[Sequence[ExportedFile]], bool] = lambda files: True,
    ) -> str | None:
        """Upload an export as one commit. The repository is made if there is none.

        Args:
            folder: the export.
            private: make a private repository. A repository that exists must be private then.
            confirm: shown the files; nothing is sent unless it returns True.

        Returns:
            The address of the repository; None if ``confirm`` declined.

        Raises:
            NoExportError, ExportError: as `exported_files`; also if the hub refuses something.
        """
        files = exported_files(folder)
        if not confirm(files):
            return None
        with _hub_errors(self.name), quiet_libraries():
            made = self._api.create_repo(self.name, private=private or None, exist_ok=True)
            if private and not self._api.repo_info(made.repo_id).private:
                raise ExportError(
                    f"--push {self.name} --private: the repository exists already and is public, so nothing "
                    "is pushed: choose another name, or leave --private out"
                )
            self._api.create_commit(
                made.repo_id,
                [
                    CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=folder / file.name)
                    for file in files
                ],
                commit_message="Export of a federated run by fedsmoothlora",
            )
        return str(made)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Convert the errors of the hub, and of the way to it, to one line."""
    try:
        yield
    except ExportError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        text = printable(" ".join(str(error).split()) or type(error).__name__, _LONGEST)
        raise ExportError(
            f"--push {printable(name)}: the hub refused, or cannot be reached: {text}"
        ) from None
