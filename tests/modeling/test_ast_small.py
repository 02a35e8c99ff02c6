"""The packaged models that are made of others, or drawn: an AST from image weights, and a T5 of letters."""

from pathlib import Path

import pytest
import torch
from transformers import (
    ASTConfig,
    ASTModel,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from fedsmoothlora.modeling.packaged import ast_small, t5_letters


def test_an_ast_with_the_weights_of_a_dinov2_computes_the_same_of_a_grey_image() -> None:
    """On a grid of the same size, with the class token of the ViT there twice."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, image_size=16, layerscale_value=0.5)).eval()
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        ast = ASTModel(
            ASTConfig(
                **sizes,
                intermediate_size=32,
                num_mel_bins=16,
                max_length=16,
                frequency_stride=4,
                time_stride=4,
                layer_norm_eps=vit.config.layer_norm_eps,
            )
        ).eval()
        grey = torch.randn(2, 16, 16)
    ast_small.copy_weights(vit, ast)
    with torch.no_grad():
        embedded = vit.embeddings(grey[:, None].expand(-1, 3, -1, -1))
        twice = torch.cat([embedded[:, :1], embedded], dim=1)
        wanted = vit.layernorm(vit.encoder(twice).last_hidden_state)
        found = ast(grey.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
# transformers computes AST's mel filters, the lowest of which are empty, and warns of that.
@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_the_packaged_ast_is_whole_and_has_its_feature_extractor(tmp_path: Path) -> None:
    ast_small.convert(tmp_path)
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert 21_000_000 < model.num_parameters() < 22_500_000
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.sampling_rate == 16000
    values = extractor([0.0] * 8000, sampling_rate=16000, return_tensors="pt").input_values
    assert values.shape == (1, 128, 128)
    with torch.no_grad():
        assert model(values).pooler_output.isfinite().all()
    assert "Changed" in (tmp_path / "LICENCE.txt").read_text()


def test_the_packaged_t5_is_drawn_alike_and_reads_letters(tmp_path: Path) -> None:
    models = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        t5_letters.convert(tmp_path / name)
        models.append(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    ids = tokenizer("c a t")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["c", "a", "t", "</s>"]
    assert tokenizer.decode(tokenizer("K AE T")["input_ids"], skip_special_tokens=True) == "K AE T"
