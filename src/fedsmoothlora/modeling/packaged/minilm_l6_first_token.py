"""MiniLM for classification: `minilm_l6` with the identity as its pooler.

A sentence encoder is trained on the mean of its tokens, so nothing trains the pooler that BERT has before a
head; all-MiniLM-L6-v2's has decayed, and makes vectors that are several times smaller than the tokens'. A
head, or a LoRA, on top of them hardly learns at the learning rates that the encoder stands.
"""

from __future__ import annotations

from pathlib import Path

from fedsmoothlora.modeling.packaged import minilm_l6

NAME = "minilm-l6-first-token"
PACKAGE = minilm_l6.PACKAGE
LICENCE = minilm_l6.LICENCE
DESCRIPTION = (
    "all-MiniLM-L6-v2 for classification: its pooler, which nothing trained, is the identity, "
    "so that a head gets the first token's vector, by tanh, and not a much smaller one."
)

_POOLER = "pooler.dense"
_CHANGE = (
    "\nChanged: pooler.dense is the identity (weight 1 on the diagonal, bias 0); tanh still follows it.\n"
)


def convert(folder: Path) -> None:
    """Copy the model's own files, and replace the pooler.

    Args:
        folder: An existing folder, to be filled.

    Raises:
        PackageError: The package cannot be had, or lacks a file.
    """
    import torch
    from safetensors.torch import load, save_file

    minilm_l6.convert(folder)
    file = folder / "model.safetensors"
    # Read into memory: the file is written anew.
    tensors = load(file.read_bytes())
    width = len(tensors[f"{_POOLER}.bias"])
    tensors[f"{_POOLER}.weight"] = torch.eye(width)
    tensors[f"{_POOLER}.bias"] = torch.zeros(width)
    save_file(tensors, file, metadata={"format": "pt"})
    with (folder / "LICENCE.txt").open("a", encoding="utf-8") as licence:
        licence.write(_CHANGE)
