from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from fedsmoothlora.models.packaged import minilm_l6


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
