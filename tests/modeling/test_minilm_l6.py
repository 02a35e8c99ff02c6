from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from fedsmoothlora.config.starting import _MODELS
from fedsmoothlora.modeling.packaged import minilm_l6, minilm_l6_first_token
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.modeling.text import pooler_notes


def test_a_classifier_on_the_untrained_pooler_is_told_of_the_better_model() -> None:
    plain, better = ModelSettings(source="pkg:minilm-l6"), ModelSettings(source="pkg:minilm-l6-first-token")
    [note] = pooler_notes(plain, None)
    assert "'pkg:minilm-l6-first-token'" in note
    assert pooler_notes(plain, "head") == [note]
    assert pooler_notes(plain, "mean") == []  # no pooler is used
    assert pooler_notes(better, None) == []
    assert pooler_notes(ModelSettings(source="minilm-l6"), None) == []  # a folder, or a hub id


def test_a_new_configuration_for_texts_names_a_model_whose_head_gets_trained_vectors() -> None:
    [source] = [line.value for line in _MODELS["text-classification"] if line.key == "source"]
    assert source == f"pkg:{minilm_l6.FOR_CLASSIFICATION}" == f"pkg:{minilm_l6_first_token.NAME}"


@pytest.mark.slow
def test_the_package_s_encoder_is_whole_and_tells_topics_apart(tmp_path: Path) -> None:
    minilm_l6.convert(tmp_path)
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert 22_000_000 < model.num_parameters() < 23_000_000
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["A man is eating pasta.", "Someone has noodles for lunch.", "Shares fell in London today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    alike, other, third = means[0] @ means[1], means[0] @ means[2], means[1] @ means[2]
    assert alike > 0.5 > 0.2 > max(other, third)


@pytest.mark.slow
def test_with_the_identity_as_its_pooler_a_head_gets_the_first_token(tmp_path: Path) -> None:
    folders = {module: tmp_path / module.NAME for module in (minilm_l6, minilm_l6_first_token)}
    for module, folder in folders.items():
        folder.mkdir()
        module.convert(folder)
    plain, changed = (AutoModel.from_pretrained(folder).eval() for folder in folders.values())
    batch = AutoTokenizer.from_pretrained(folders[minilm_l6_first_token])(
        "Grain exports rose.", return_tensors="pt"
    )
    with torch.inference_mode():
        before, after = plain(**batch), changed(**batch)
    first = after.last_hidden_state[:, 0]
    torch.testing.assert_close(after.pooler_output, first.tanh())
    # Nothing else differs, and the checkpoint's own pooler hands on much less.
    torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state)
    assert float(before.pooler_output.norm()) < float(first.norm()) / 3
    licence = (folders[minilm_l6_first_token] / "LICENCE.txt").read_text("utf-8")
    assert "pooler.dense is the identity" in licence
