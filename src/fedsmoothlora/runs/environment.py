"""The environment of a run: versions, machine, device and the commit of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from fedsmoothlora.training.devices import described

_LIBRARIES = (
    "fedsmoothlora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)


def environment(device: str) -> dict[str, Any]:
    """Versions, device, machine and git commit, as plain JSON values.

    Args:
        device: ``machine.device``; the device that it names on this machine is recorded.

    Raises ``ConfigError`` if this machine has no such device.
    """
    return {
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "device": described(device),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "git_commit": git_commit(Path(__file__).parent),
    }


def git_commit(folder: Path) -> str | None:
    """The commit checked out in ``folder``, followed by ``-dirty`` if tracked files were changed.

    None if the folder is not tracked by git, or git is missing.
    """
    try:
        # `--error-unmatch` distinguishes a checkout of this code from a venv inside another checkout.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
