"""The rows of a trained head follow the names of its classes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from conftest import byte_tokenizer
from fedsmoothlora.modeling import labels
from fedsmoothlora.modeling.loading import load_image_classifier
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.modeling.text import load_sequence_classifier

NAMES = st.lists(st.text("abcxyz", min_size=1, max_size=4), min_size=2, max_size=6, unique=True)


@given(names=NAMES, data=st.data())
def test_every_row_goes_to_the_class_of_its_name(names: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.permutations(names))
    rows = labels.order(dict(enumerate(names)), wanted)
    assert rows is not None
    assert [names[row] for row in rows] == wanted


@pytest.mark.parametrize(
    ("own", "wanted", "rows"),
    [
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], [1, 0]),
        (["sci_fi", "non-fiction"], ["Non Fiction", " sci fi"], [1, 0]),
        (["POS", "pos"], ["pos", "POS"], [1, 0]),  # classes that differ in case alone
        (["POS", "neg"], ["pos", "Pos"], None),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], None),  # no names
        (["pos", "neg"], ["neg", "neutral"], None),
        (["pos", "neg"], ["neg", "pos", "neutral"], None),
        (["pos", "pos"], ["neg", "pos"], None),
    ],
)
def test_names_agree_up_to_case_spaces_hyphens_and_underscores(
    own: list[str], wanted: list[str], rows: list[int] | None
) -> None:
    assert labels.order(dict(enumerate(own)), wanted) == rows


@pytest.mark.parametrize(
    ("own", "wanted", "note"),
    [
        (["neg", "pos"], ["neg", "pos"], ""),
        (["pos", "neg"], ["neg", "pos"], "put into the order of the data's classes: neg, pos"),
        (
            ["joy", "fear"],
            ["neg", "pos"],
            "the classes joy, fear; its rows are used for neg, pos, in this order",
        ),
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], "2 classes without names; its rows are used for neg, pos"),
        (["a", "b", "c"], ["neg", "pos"], "the classes a, b, c, and the data have 2.*a new head is drawn"),
    ],
)
def test_mismatches_and_reordered_classes_are_noted(own: list[str], wanted: list[str], note: str) -> None:
    found = labels.notes(dict(enumerate(own)), wanted)
    assert len(found) == bool(note)
    assert all(re.search(note, one) for one in found)


def bert(folder: Path, **changes: Any) -> transformers.PreTrainedModel:
    config = transformers.RobertaConfig(
        vocab_size=258,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        pad_token_id=257,
        max_position_embeddings=300,
        **changes,
    )
    model = transformers.RobertaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def test_a_text_classifier_answers_with_the_names_of_its_checkpoint(tmp_path: Path) -> None:
    own = bert(tmp_path, id2label={0: "pos", 1: "neg", 2: "mixed"})
    loaded = load_sequence_classifier(ModelSettings(source=str(tmp_path)), ("mixed", "Neg", "Pos"), 257, 0)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, own(ids).logits[:, [2, 1, 0]])
    assert loaded.model.config.id2label == {0: "mixed", 1: "Neg", 2: "Pos"}
    assert {"classifier.out_proj.weight", "classifier.out_proj.bias"} <= loaded.drawn


def test_a_head_in_the_order_of_the_data_is_unchanged(tmp_path: Path) -> None:
    own = bert(tmp_path, id2label={0: "neg", 1: "pos"})
    loaded = load_sequence_classifier(ModelSettings(source=str(tmp_path)), ("neg", "pos"), 257, 0)
    assert torch.equal(loaded.model.classifier.out_proj.weight, own.classifier.out_proj.weight)
    assert not loaded.drawn


def test_an_image_classifier_and_its_notes(tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(
        hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, id2label={0: "dog", 1: "cat"}
    )
    own = transformers.ConvNextForImageClassification(config).eval()
    own.save_pretrained(tmp_path)
    settings = ModelSettings(source=str(tmp_path), image_size=16)
    loaded = load_image_classifier(settings, ("cat", "dog"), 0)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.model(pixels).logits, own(pixels).logits[:, [1, 0]])
    empty = load_image_classifier(settings, ("cat", "dog"), 0, empty=True)
    assert "order of the data's classes: cat, dog" in empty.notes[0]
    other = load_image_classifier(settings, ("cat", "dog", "cow"), 0, empty=True)
    assert "a new head is drawn" in other.notes[0]
