"""Models in bfloat16 and quantised models: loading, refusals, whole runs and their exports."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import fedsmoothlora
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.exports.export import export
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.modeling import precision
from fedsmoothlora.modeling.loading import model_config
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.modeling.text import load_causal_language_model, load_sequence_classifier
from fedsmoothlora.modeling.unmerged import UnmergedBackbone, dequantised
from fedsmoothlora.runs import session
from fedsmoothlora.runs.check import estimate
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import run
from layer_names import QKV

Table = dict[str, Any]
HELD: dict[str, Table] = {
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4 and bfloat16": {"quantization": "nf4", "dtype": "bfloat16"},
}
LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "transformer.h.0.attn.c_attn")
held = pytest.mark.parametrize("keys", HELD.values(), ids=HELD)


@pytest.fixture
def table(wide_llama: Path, tmp_path: Path) -> Table:
    """A language model learns to repeat a word."""
    words = ("left", "right", "up", "down")
    source = tmp_path / "own.jsonl"
    rows = [{"question": f"say {words[i % 4]}", "reply": words[i % 4]} for i in range(48)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "name": "own",
        "model": {"source": str(wide_llama)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(source), "validation": 0.2},
        "task": {"kind": "causal-lm", "prompt": "{question}?", "answer": " {reply}", "max_length": 32},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 1},
        "training": {"rounds": 2, "steps": 6, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }


def quiet(table: Table, out: Path, **more: Any) -> session.Result:
    return run(table, out=out, console=Console(file=io.StringIO()), **more)


def with_model(table: Table, keys: Table) -> Table:
    return {**table, "model": {**table["model"], **keys}}


def as_loaded(model: torch.nn.Module) -> int:
    """Bytes of all weights and of what belongs to their quantisation, as a checkpoint would hold them."""
    tables = ("quant_map", "quant_state", "weight_format")  # a few bytes a layer, however large it is
    parts = {n: v for n, v in model.state_dict().items() if not any(table in n for table in tables)}
    return sum({value.data_ptr(): value.nbytes for value in parts.values()}.values())


@held
@pytest.mark.parametrize("which", ["wide_llama", "wide_gpt2"])
def test_the_estimated_size_of_a_model_is_its_size(
    which: str, keys: Table, request: pytest.FixtureRequest
) -> None:
    settings = ModelSettings(source=str(request.getfixturevalue(which)), **keys)
    loaded = load_causal_language_model(settings)
    empty = load_causal_language_model(settings, empty=True)
    buffers = sum(value.nbytes for value in loaded.model.buffers() if value.dtype != torch.bool)
    wanted = as_loaded(loaded.model)
    assert wanted - buffers <= precision.stored_bytes(empty.model, settings, empty.head) <= wanted
    assert type(loaded.model.get_output_embeddings()) is torch.nn.Linear


@held
@pytest.mark.parametrize("which", ["wide_llama", "wide_gpt2"])
def test_quantised_weights_are_near_the_original_ones(
    which: str, keys: Table, request: pytest.FixtureRequest
) -> None:
    source = str(request.getfixturevalue(which))
    exact, found = (
        load_causal_language_model(ModelSettings(source=source, **more)).model for more in ({}, keys)
    )
    layers = [name for name in LAYERS if name in dict(exact.named_modules())]
    assert layers
    for name in layers:
        weight = dequantised(exact.get_submodule(name))
        error = float((dequantised(found.get_submodule(name)) - weight).norm() / weight.norm())
        assert 0 < error < {"nf4": 0.12, "int8": 0.02}.get(keys.get("quantization", ""), 0.004), name


@held
def test_a_head_that_is_drawn_is_that_of_the_seed_and_not_quantised(wide_bert: Path, keys: Table) -> None:
    classes = ("a", "b", "c")
    exact, found = (
        load_sequence_classifier(ModelSettings(source=str(wide_bert), **more), classes, 0, seed=5).model
        for more in ({}, keys)
    )
    weight = found.classifier.weight
    assert weight.is_floating_point()
    assert torch.equal(weight, exact.classifier.weight.to(weight.dtype))


def test_a_checkpoint_that_is_quantised_itself_is_refused(wide_llama: Path, tmp_path: Path) -> None:
    settings = ModelSettings(source=str(wide_llama), quantization="nf4")
    load_causal_language_model(settings).model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^model\.source = .* has weights that are already quantised.*: set model.source to that model",
    ):
        load_causal_language_model(ModelSettings(source=str(tmp_path)), empty=True)


def test_without_bitsandbytes_the_plan_says_how_to_install_it(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    plan(read(table))
    with pytest.raises(ConfigError, match=r"'nf4' needs bitsandbytes: pip install 'fedsmoothlora\[quant"):
        plan(read(with_model(table, {"quantization": "nf4"})))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quantization": "nf4"}, r"model\.quantization = 'nf4' never changes .* method 'full' trains them"),
        ({"dtype": "bfloat16"}, r"model\.dtype = 'bfloat16' never changes .* method 'full' trains them"),
    ],
)
def test_training_the_weights_themselves_is_refused(table: Table, keys: Table, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(with_model(table, keys), {"method.name": "full"})


@pytest.mark.parametrize(("key", "value"), [("quantization", "fp4"), ("dtype", "float16")])
def test_other_dtypes_and_quantisations_are_refused_with_the_valid_ones(
    table: Table, key: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=f"model.{key} = '{value}'"):
        read(with_model(table, {key: value}))


@held
def test_a_run_learns_and_its_model_and_adapter_belong_to_the_unquantised_base(
    table: Table, keys: Table, wide_llama: Path, tmp_path: Path
) -> None:
    result = quiet(with_model(table, keys), tmp_path / "run")
    losses = result.values("loss")
    assert losses[-1] < 0.6 * losses[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(wide_llama)
    assert merged.dtype == torch.float32
    assert {name: v.dtype for name, v in merged.state_dict().items()} == {
        name: v.dtype for name, v in base.state_dict().items()
    }
    out = export(tmp_path / "run", "adapter", out=tmp_path / "adapter", console=Console(file=io.StringIO()))
    adapted = fedsmoothlora.load_adapter(out)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted, before = merged(ids).logits, base(ids).logits
        torch.testing.assert_close(adapted(ids).logits, wanted, rtol=1e-3, atol=1e-3)
    assert float((wanted - before).norm() / before.norm()) > 0.05
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"was on {precision.described(ModelSettings(source='', **keys))} weights" in " ".join(card.split())


@held
def test_a_stopped_run_is_resumed_bit_for_bit(
    table: Table, keys: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsmoothlora.federation.client import Learner

    table = with_model(table, keys)
    table["lora"]["dropout"] = 0.1
    table["training"]["gradient_checkpointing"] = True
    whole = quiet(table, tmp_path / "whole")
    visit, calls = Learner.visit, []

    def stop_in_round_2(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return visit(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "visit", stop_in_round_2)
        with pytest.raises(KeyboardInterrupt):
            quiet(table, tmp_path / "cut")
    resumed = run(resume=tmp_path / "cut", console=Console(file=io.StringIO()))
    one, other = (
        [line for line in result.metrics if not line["name"].startswith("seconds_")]
        for result in (whole, resumed)
    )
    assert one == other


@pytest.mark.parametrize(
    "changes",
    [{"method.name": "frlora"}, {"method.gradient_aligned": "weight"}, {"training.precision": "bf16"}],
    ids=str,
)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_methods_that_read_the_pretrained_weight_and_autocast_work_on_quantised_ones(
    table: Table, changes: Table, quantization: str, tmp_path: Path
) -> None:
    simulation = build(plan(read(with_model(table, {"quantization": quantization}), changes)))
    model = simulation.learner.model
    assert isinstance(model.backbone, UnmergedBackbone)
    bits = {name: module.weight.clone() for name, module in model.modules.items()}
    losses = [record.value("loss") for record in run_rounds(simulation, Callback())]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(module.weight, bits[name]) for name, module in model.modules.items())
    assert all(value.dtype == torch.float32 for lora in model.lora().values() for value in (lora.A, lora.B))


def test_float32_weights_are_not_mentioned() -> None:
    assert precision.described(ModelSettings(source="any")) is None


def test_the_check_counts_quantised_weights_and_no_second_copy(table: Table) -> None:
    exact = estimate(plan(read(table))).memory
    found = estimate(plan(read(with_model(table, {"quantization": "nf4"})))).memory
    copy = "pretrained copy of the adapted layers"
    assert exact[copy] > found[copy] == 0
    assert found["weights"] < exact["weights"]
    merged = "sum of all updates, after the last round"
    # Two rounds of rank 2 each.
    simulation = build(plan(read(table)))
    layers = simulation.learner.model.layers.values()
    assert (
        found[merged]
        == exact[merged]
        == sum(4 * min(2 * 2 * (layer.m + layer.n), layer.m * layer.n) for layer in layers)
    )


def test_layers_unsuitable_for_4_bits_are_skipped_and_a_model_of_only_these_is_refused(
    tiny_llama: Path, wide_llama: Path, tmp_path: Path
) -> None:
    model = load_causal_language_model(ModelSettings(source=str(wide_llama), quantization="nf4")).model
    assert not model.get_submodule(LAYERS[0]).weight.is_floating_point()
    with pytest.raises(ValueError, match="no layer to quantise; 4 bits need a multiple of 64 inputs"):
        load_causal_language_model(ModelSettings(source=str(tiny_llama), quantization="nf4"), empty=True)
    config = model_config(ModelSettings(source=str(wide_llama)), intermediate_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_causal_language_model(ModelSettings(source=str(tmp_path), quantization="nf4")).model
    assert type(model.get_submodule(LAYERS[1])) is torch.nn.Linear
    assert not model.get_submodule(LAYERS[0]).weight.is_floating_point()


@pytest.mark.parametrize(("head", "accuracy"), [("full", 0.85), ("lora", 0.6)])
def test_everything_trained_in_a_bfloat16_model_is_float32(
    toy_table: Table, head: str, accuracy: float
) -> None:
    table = with_model(toy_table, {"dtype": "bfloat16", "head": head})
    table["training"] |= {"rounds": 4, "lr": 0.05}
    if head == "lora":
        table["lora"] |= {"target_modules": [*QKV, "classifier"], "head_r": 1}
    simulation = build(plan(read(table)))
    records = list(run_rounds(simulation, Callback()))
    assert records[-1].value("accuracy") > accuracy
    model = simulation.learner.model
    if head == "full":
        assert {value.dtype for value in model.head().values()} == {torch.float32}
    assert all(value.dtype == torch.float32 for value in model.trained_parameters().values())
    assert {module.weight.dtype for module in model.modules.values()} == {torch.bfloat16}


@held
def test_a_classifier_of_texts_learns_with_its_head_whole(wide_bert: Path, keys: Table, table: Table) -> None:
    table |= {
        "model": {"source": str(wide_bert), **keys},
        "data": {**table["data"], "label_column": "reply"},
        "task": {"kind": "text-classification", "prompt": "{question}", "max_length": 32},
        "training": {"rounds": 2, "steps": 6, "optimizer": "adamw", "lr": 0.02},
    }
    simulation = build(plan(read(table)))
    records = list(run_rounds(simulation, Callback()))
    assert records[-1].value("accuracy") > 0.9 > records[0].value("accuracy")
    assert {value.dtype for value in simulation.server.head.values()} == {torch.float32}
