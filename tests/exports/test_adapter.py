"""An exported adapter gives the merged model, with PEFT and the pretrained model alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_models import Kind, delta, make_kinds, make_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import NotKeptError
from fedsmoothlora.exports.adapter import _for_older_releases
from fedsmoothlora.exports.base import Base, whole_modules
from fedsmoothlora.exports.loading import _peft_config
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.logs import quiet_libraries
from layer_names import QUERY, VALUE, attention


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return make_kinds(tmp_path_factory.mktemp)


# Loads an adapter on its pretrained model, and the merged model, as anyone would; writes their logits.
PLAIN_PEFT = """
import json, sys, warnings
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
for case in json.loads(sys.argv[1]):
    auto = getattr(transformers, case["auto"])
    with torch.no_grad():
        inputs = load_file(case["inputs"])
        base = auto.from_pretrained(case["base"], **case["arguments"])
        adapted = PeftModel.from_pretrained(base, case["adapter"]).eval()(**inputs).logits
        merged = auto.from_pretrained(case["merged"]).eval()(**inputs).logits
    save_file({"adapted": adapted.contiguous(), "merged": merged.contiguous()}, case["outputs"])
assert not any(name.partition(".")[0] == "fedsmoothlora" for name in sys.modules)
"""


def vit(base: Base) -> Trained:
    """A head that was trained whole, as recipes do by default."""
    layers = [attention(i, which) for i in (0, 1) for which in (QUERY, VALUE)]
    head = {name: p + 0.3 for name, p in base.model.classifier.state_dict(prefix="classifier.").items()}
    return Trained(deltas={n: delta(base.model, n, 2, i) for i, n in enumerate(layers)}, head=head)


def vit_lora_head(base: Base) -> Trained:
    """A head that was drawn at random and adapted by LoRA alone."""
    layers = [attention(0, QUERY), "classifier"]
    return Trained(deltas={n: delta(base.model, n, 1, i) for i, n in enumerate(layers)})


def bert(base: Base) -> Trained:
    layers = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")]
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    return Trained(deltas={n: delta(base.model, n, 3, i) for i, n in enumerate(layers)}, head=head)


def gpt2_classifier(base: Base) -> Trained:
    """Transposed weights, and a random head with a LoRA of its own."""
    layers = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "score"]
    return Trained(deltas={n: delta(base.model, n, 2, i) for i, n in enumerate(layers)})


def llama(base: Base) -> Trained:
    """Ranks that differ by layer, a dense change, one of zero, layers left out."""
    ranks: dict[str, int | None] = {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.mlp.down_proj": None,
        "model.layers.1.self_attn.q_proj": 1,
        "model.layers.1.self_attn.v_proj": 0,
    }
    return Trained(deltas={n: delta(base.model, n, rank, i) for i, (n, rank) in enumerate(ranks.items())})


def gpt2(base: Base) -> Trained:
    layers = [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    return Trained(deltas={n: delta(base.model, n, 2, i) for i, n in enumerate(layers)})


def nothing_but_a_head(base: Base) -> Trained:
    return Trained(
        deltas={}, head={"classifier.weight": torch.randn(3, 64), "classifier.bias": torch.randn(3)}
    )


CASES = {
    "vit": ("vit", vit),
    "vit, LoRA on a random head": ("vit", vit_lora_head),
    "vit, head only": ("vit", nothing_but_a_head),
    "bert": ("bert", bert),
    "gpt2, classifier": ("gpt2-classifier", gpt2_classifier),
    "llama": ("llama", llama),
    "gpt2": ("gpt2", gpt2),
}


@pytest.fixture(scope="module")
def elsewhere(
    kinds: dict[str, Kind], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """Every case's logits: ours, and those of a process without this package."""
    folder, orders, ours = tmp_path_factory.mktemp("exports"), [], {}
    for number, (name, (kind_name, train)) in enumerate(CASES.items()):
        kind = kinds[kind_name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trained = train(kind.base())
        here = folder / str(number)
        here.mkdir()
        with quiet_libraries():
            kind.write(trained, "adapter", here / "adapter")
            kind.write(trained, "merged", here / "merged")
        save_file(kind.inputs, here / "inputs.safetensors")
        orders.append(
            {
                "auto": kind_auto(kind),
                "base": kind.source,
                "arguments": {} if kind.task == "text-generation" else {"num_labels": 3},
                **{part: str(here / part) for part in ("adapter", "merged")},
                **{part: str(here / f"{part}.safetensors") for part in ("inputs", "outputs")},
            }
        )
        ours[name] = reference(kind, trained)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, json.dumps(orders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {
        name: {**load_file(order["outputs"]), "ours": ours[name]}
        for name, order in zip(CASES, orders, strict=True)
    }


def kind_auto(kind: Kind) -> str:
    return {
        "image-classification": "AutoModelForImageClassification",
        "text-classification": "AutoModelForSequenceClassification",
        "text-generation": "AutoModelForCausalLM",
    }[kind.task]


def reference(kind: Kind, trained: Trained) -> Tensor:
    """The trained model's logits, its weights written by hand."""
    model = kind.base().model
    with torch.no_grad():
        for name, value in trained.deltas.items():
            module = model.get_submodule(name)
            dense = (value.B @ value.A if isinstance(value, LowRank) else value).float()
            module.weight += dense if isinstance(module, nn.Linear) else dense.T
        for name, value in trained.head.items():
            model.get_parameter(name).copy_(value)
    return kind.logits(model)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peft_and_transformers_alone_load_what_was_trained(
    elsewhere: dict[str, dict[str, Tensor]], kinds: dict[str, Kind], case: str
) -> None:
    logits = elsewhere[case]
    untrained = kinds[CASES[case][0]]
    assert not torch.allclose(logits["ours"], untrained.logits(untrained.base().model), atol=0.05)
    torch.testing.assert_close(logits["adapted"], logits["ours"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits["merged"], logits["ours"], rtol=1e-4, atol=1e-4)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def exported(kind: Kind, trained: Trained, out: Path, as_: str = "adapter") -> Path:
    with quiet_libraries():
        return kind.write(trained, as_, out)


def test_layers_have_the_rank_they_need_and_a_scale_of_one(kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind = kinds["llama"]
    folder = exported(kind, llama(kind.base()), tmp_path / "out")
    shapes = {
        name: tuple(value.shape) for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    prefix = "base_model.model.model.layers"
    assert shapes == {
        f"{prefix}.0.self_attn.q_proj.lora_A.weight": (4, 32),
        f"{prefix}.0.self_attn.q_proj.lora_B.weight": (32, 4),
        f"{prefix}.0.mlp.down_proj.lora_A.weight": (32, 48),
        f"{prefix}.0.mlp.down_proj.lora_B.weight": (32, 32),
        f"{prefix}.1.self_attn.q_proj.lora_A.weight": (1, 32),
        f"{prefix}.1.self_attn.q_proj.lora_B.weight": (32, 1),
    }
    config = config_of(folder)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (32, 32, False)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["rank_pattern"].values()) == [1, 4]
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    with quiet_libraries():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(kind.folder), folder)
    scales = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert scales == {1.0}


def test_short_names_are_used_where_they_match_these_layers_and_no_others(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    everywhere, somewhere = (
        exported(kinds[name], train(kinds[name].base()), tmp_path / name)
        for name, train in (("gpt2", gpt2), ("llama", llama))
    )
    assert config_of(everywhere)["target_modules"] == ["c_attn"]
    assert config_of(everywhere)["fan_in_fan_out"] is True
    assert sorted(config_of(somewhere)["target_modules"]) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_an_approximation_is_loaded_and_its_errors_are_recorded(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    kind = kinds["llama"]
    trained = llama(kind.base())
    folder = exported(kind, trained, tmp_path / "out", "adapter:2")
    layers = json.loads((folder / "fedsmoothlora.json").read_text())["layers"]
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = {}
    for name, facts in layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        value = trained.deltas[name]
        wanted = value.B @ value.A if isinstance(value, LowRank) else value
        left_out = torch.linalg.norm(wanted - (B @ A).double()) / torch.linalg.norm(wanted)
        assert float(left_out) == pytest.approx(facts["relative_error"], abs=1e-5)
        ranks[name.removeprefix("model.layers.")] = (facts["exact_rank"], facts["rank"], len(A))
    assert ranks == {
        "0.self_attn.q_proj": (4, 2, 2),
        "0.mlp.down_proj": (32, 2, 2),
        "1.self_attn.q_proj": (1, 1, 1),
    }


def test_missing_and_fully_trained_modules_are_saved_whole(kinds: dict[str, Kind]) -> None:
    assert kinds["vit"].base().drawn == {"classifier.weight", "classifier.bias"}
    assert whole_modules(kinds["vit"].base(), []) == ("classifier",)
    assert kinds["gpt2"].base().drawn == set()
    assert whole_modules(kinds["gpt2"].base(), []) == ()
    assert whole_modules(kinds["gpt2"].base(), ["lm_head.weight"]) == ("lm_head",)


def test_an_untrained_head_of_the_checkpoint_is_not_exported(kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind = kinds["vit"]
    with_head = Kind(kind.task, tmp_path / "with-head", kind.inputs)
    kind.base().model.save_pretrained(with_head.folder)
    trained = vit_lora_head(with_head.base())
    folder = exported(with_head, trained, tmp_path / "out")
    assert config_of(folder)["modules_to_save"] is None
    assert any("classifier.lora_A" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_a_layer_that_shares_its_weight_is_refused_by_name(tmp_path: Path, kinds: dict[str, Kind]) -> None:
    kind = Kind("text-generation", tmp_path / "tied", kinds["llama"].inputs)
    make_llama(tie_word_embeddings=True).save_pretrained(kind.folder)
    trained = Trained(deltas={"lm_head": delta(kind.base().model, "lm_head", 2)})
    with pytest.raises(
        NotKeptError, match=r"lm_head shares its weight with model\.embed_tokens\.weight.*merged"
    ):
        exported(kind, trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*part"))


def test_merging_touches_no_other_weight(kinds: dict[str, Kind]) -> None:
    kind = kinds["gpt2"]
    before, after = kind.base().model, kind.base().model
    trained = gpt2(kind.base())
    merge(trained, after)
    changed = {
        name
        for (name, one), other in zip(before.state_dict().items(), after.state_dict().values(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {f"{name}.weight" for name in trained.deltas}


def test_an_adapter_has_no_keys_that_older_releases_of_peft_do_not_know(tmp_path: Path) -> None:
    """The oldest supported release warns of every key that it does not know."""
    written = {"peft_type": "LORA", "r": 2, "from_the_future": None, "use_dora": False}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    _for_older_releases(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"peft_type": "LORA", "r": 2, "use_dora": False}

    path.write_text(json.dumps({**written, "from_the_future": 3}), encoding="utf-8")
    with pytest.raises(RuntimeError, match="from_the_future"):
        _for_older_releases(path)


def test_keys_of_newer_releases_that_are_not_set_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "from_the_future": None}), encoding="utf-8")
    assert _peft_config(tmp_path).r == 2
