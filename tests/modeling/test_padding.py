"""Metrics do not depend on how rows are put into batches: neither on their number, nor on the padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_families import DECODERS, ENCODERS, PAD, SEQ2SEQ, VOCABULARY, tiny
from torch import Tensor, nn
from torch.nn import functional

from conftest import byte_tokenizer
from fedsmoothlora.data.tokens import IGNORED, Completions, Documents, TaggedWords, Translations, padded
from fedsmoothlora.modeling.padding import first_position, without_padding_effects
from fedsmoothlora.tasks.metrics.exact_match import generate
from fedsmoothlora.tasks.metrics.generated_text import generate_answers
from fedsmoothlora.tasks.metrics.multiple_choice import MultipleChoice
from fedsmoothlora.tasks.objectives import (
    CausalLanguageModel,
    Classification,
    MultiLabel,
    Regression,
    SequenceToSequence,
    TokenClassification,
)

FEW = settings(max_examples=2, deadline=None)
TOKENS = st.lists(st.integers(PAD + 1, VOCABULARY - 1), min_size=1, max_size=9)
ROWS = st.lists(TOKENS, min_size=8, max_size=8)
# The padding of batches may be another token than the model's, as if the tokenizer had its own.
PADDING = st.sampled_from([0, PAD, 5])
UNEQUAL = [[4 + (row * 7 + k) % 36 for k in range(row + 2)] for row in range(8)]


@dataclass(frozen=True, eq=False)
class OnSide:
    """Rows with a label each, or a label for each of their last tokens, padded on one side."""

    ids: Sequence[Sequence[int]]
    labels: Sequence[Any]
    pad: int
    left: bool

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        ids, labels = [self.ids[row] for row in rows], [self.labels[row] for row in rows]
        return {
            "input_ids": padded(ids, self.pad, left=self.left),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, left=self.left),
            "labels": padded(labels, IGNORED, left=self.left)
            if isinstance(labels[0], list)
            else torch.tensor(labels),
        }


def same(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def one_by_one(model: nn.Module, ids: Sequence[Sequence[int]]) -> Tensor:
    """The model's own logits of each row alone, without padding."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ids])


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
@given(ids=ROWS, pad=PADDING)
@example(ids=UNEQUAL, pad=0)
@FEW
def test_a_classifier_s_loss_is_that_of_its_rows_one_by_one(
    family: str, ids: list[list[int]], pad: int
) -> None:
    model = tiny(family, "ForSequenceClassification")
    labels = [row % 3 for row in range(len(ids))]
    wanted = float(functional.cross_entropy(one_by_one(model, ids), torch.tensor(labels)))
    left, right = OnSide(ids, labels, pad, left=True), Documents(ids, torch.tensor(labels), pad)
    for examples in (left, right):
        for batch_size in (1, 8):
            found = Classification().evaluate(model, examples, batch_size, same)
            assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", ["Bert", "XLNet"])
@given(ids=ROWS, pad=PADDING)
@example(ids=UNEQUAL, pad=0)
@FEW
def test_a_loss_of_pairs_is_that_of_its_rows_one_by_one(family: str, ids: list[list[int]], pad: int) -> None:
    model = tiny(family, "ForSequenceClassification")
    segments = [[int(place > len(row) // 2) for place in range(len(row))] for row in ids]
    labels = torch.tensor([row % 3 for row in range(len(ids))])
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([row]), token_type_ids=torch.tensor([own])).logits
            for row, own in zip(ids, segments, strict=True)
        ]
    wanted = float(functional.cross_entropy(torch.cat(alone), labels))
    for batch_size in (1, 8):
        found = Classification().evaluate(model, Documents(ids, labels, pad, segments), batch_size, same)
        assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", DECODERS)
@given(ids=st.lists(TOKENS.filter(lambda row: len(row) > 1), min_size=8, max_size=8), pad=PADDING)
@example(ids=UNEQUAL, pad=0)
@FEW
def test_a_language_model_s_loss_and_options_are_those_of_rows_one_by_one(
    family: str, ids: list[list[int]], pad: int
) -> None:
    model = tiny(family, "ForCausalLM")
    likelihoods = []
    for row in ids:
        logits = one_by_one(model, [row])[0, :-1]
        likelihoods.append(-float(functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")))
    wanted = -sum(likelihoods) / sum(len(row) - 1 for row in ids)
    labels = [[IGNORED, *row[1:]] for row in ids]
    completions = Completions([row[:1] for row in ids], [row[1:] for row in ids], pad)
    for batch_size in (1, 8):
        for examples in (*(OnSide(ids, labels, pad, left) for left in (False, True)), completions):
            found = CausalLanguageModel().evaluate(model, examples, batch_size, same)
            assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        choice = MultipleChoice(options=completions, counts=[4, 4], right=[0, 0], batch_size=batch_size)
        scores = choice.scores(model, same)
        torch.testing.assert_close(scores, torch.tensor(likelihoods).double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
@given(ids=ROWS)
@example(ids=UNEQUAL)
@FEW
def test_generated_answers_do_not_depend_on_the_batch_size(family: str, ids: list[list[int]]) -> None:
    model = tiny(family, "ForCausalLM")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token_id, tokenizer.eos_token_id = 0, 1
    alone, together = (generate(model, ids, tokenizer, size, 4) for size in (1, 8))
    assert alone == together


@pytest.mark.parametrize("family", ["Bert", "Roberta", "GPT2"])
@given(ids=ROWS, pad=PADDING)
@example(ids=UNEQUAL, pad=0)
@FEW
def test_a_loss_of_several_labels_is_that_of_its_rows_one_by_one(
    family: str, ids: list[list[int]], pad: int
) -> None:
    model = tiny(family, "ForSequenceClassification")
    labels = torch.tensor([[row % 2, row % 3 == 0, 1] for row in range(len(ids))]).float()
    wanted = float(functional.binary_cross_entropy_with_logits(one_by_one(model, ids), labels))
    for batch_size in (1, 8):
        found = MultiLabel().evaluate(model, Documents(ids, labels, pad), batch_size, same)
        assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@given(ids=ROWS, pad=PADDING)
@example(ids=UNEQUAL, pad=0)
@FEW
def test_a_loss_of_numbers_is_that_of_its_rows_one_by_one(
    family: str, ids: list[list[int]], pad: int
) -> None:
    model = tiny(family, "ForSequenceClassification", labels=1)
    labels = torch.arange(len(ids)).float() / 4
    wanted = float(functional.mse_loss(one_by_one(model, ids)[:, 0], labels))
    for batch_size in (1, 8):
        found = Regression().evaluate(model, Documents(ids, labels, pad), batch_size, same)
        assert found.metrics["mse"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", [*ENCODERS, "GPT2", "Llama"])
@given(ids=ROWS, pad=PADDING)
@example(ids=UNEQUAL, pad=0)
@FEW
def test_a_loss_of_tags_is_that_of_its_rows_one_by_one(family: str, ids: list[list[int]], pad: int) -> None:
    model = tiny(family, "ForTokenClassification")
    tags = [[place % 3 if place % 2 == 0 else IGNORED for place in range(len(row))] for row in ids]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in ids]
    wanted = float(functional.cross_entropy(torch.cat(alone), torch.tensor([t for row in tags for t in row])))
    objective = TokenClassification(("O", "B-A", "I-A"))
    for batch_size in (1, 8):
        found = objective.evaluate(model, TaggedWords(ids, tags, pad), batch_size, same)
        assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", SEQ2SEQ)
@given(ids=ROWS, pad=PADDING)
@example(ids=UNEQUAL, pad=0)
@FEW
def test_losses_and_answers_of_an_encoder_with_a_decoder_do_not_depend_on_the_batch_size(
    family: str, ids: list[list[int]], pad: int
) -> None:
    model = tiny(family, "ForConditionalGeneration")
    rows = Translations(ids, ids[::-1], pad)
    losses, tokens = 0.0, sum(map(len, ids))
    for source, target in zip(ids, ids[::-1], strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([source]), labels=torch.tensor([target]))
        losses += float(alone.loss) * len(target)
    for batch_size in (1, 3, 8):
        found = SequenceToSequence().evaluate(model, rows, batch_size, same)
        assert found.metrics["loss"] == pytest.approx(losses / tokens, rel=1e-5, abs=1e-5)
    tokenizer = byte_tokenizer()
    alone, together = (generate_answers(model, ids, tokenizer, pad, size, 4) for size in (1, 8))
    assert alone == together


def test_roberta_s_first_position_follows_that_of_padding() -> None:
    assert first_position(tiny("Roberta", "ForSequenceClassification")) == PAD + 1
    assert first_position(tiny("Bert", "ForSequenceClassification")) == 0


def test_inputs_of_a_users_own_model_are_unchanged() -> None:
    inputs = {"input_ids": torch.tensor([[7, 1]]), "attention_mask": torch.tensor([[0, 1]])}
    assert without_padding_effects(nn.Linear(2, 2), inputs) == inputs
