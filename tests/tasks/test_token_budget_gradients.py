"""`training.tokens_per_batch` changes no gradient, but for rounding: also padding has no effect."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedsmoothlora import Federation
from fedsmoothlora.config import read
from fedsmoothlora.data.own import OwnExamples
from fedsmoothlora.data.tokens import (
    Completions,
    Dialogues,
    Documents,
    Pairs,
    TaggedWords,
    TokenBudget,
    Translations,
)
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.probe import Probe
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.tasks.objectives.classification import Classification
from fedsmoothlora.tasks.objectives.language import CausalLanguageModel
from fedsmoothlora.tasks.objectives.multi_label import MultiLabel
from fedsmoothlora.tasks.objectives.preference import DirectPreference
from fedsmoothlora.tasks.objectives.sequence_to_sequence import SequenceToSequence
from fedsmoothlora.tasks.objectives.token_classification import TokenClassification
from fedsmoothlora.training.settings import TrainingSettings

Table = dict[str, Any]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LENGTHS = [3, 11, 1, 7, 2, 12, 5, 4]
IDS = [[(5 * row + k) % 27 + 3 for k in range(length)] for row, length in enumerate(LENGTHS)]
TAGS = [
    [-100, *(token % 3 for token in ids[1:])] if len(ids) > 1 else [token % 3 for token in ids] for ids in IDS
]
ANSWERS = [[(3 * row + k) % 27 + 3 for k in range(row % 4 + 1)] for row in range(len(IDS))]


def pairs() -> Pairs:
    found = Pairs(Completions(IDS, ANSWERS, pad=0))
    found.reference = torch.linspace(-9, -3, len(IDS))
    return found


def own_texts() -> OwnExamples:
    """Rows as data sets for language models have them: every token is its own label, the first one too."""
    return OwnExamples([{"input_ids": ids, "labels": ids} for ids in IDS], "client a")


def bert(kind: type, labels: int = 3) -> Any:
    return kind(
        BertConfig(vocab_size=32, num_labels=labels, max_position_embeddings=32, pad_token_id=0, **SMALL)
    )


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, pad_token_id=0, **SMALL))


def bart() -> Any:
    size = {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()
    }
    return BartForConditionalGeneration(
        BartConfig(vocab_size=32, d_model=16, max_position_embeddings=32, pad_token_id=0, **size)
    )


CASES = {
    "classification": (
        Classification(),
        lambda: bert(BertForSequenceClassification),
        Documents(IDS, torch.arange(len(IDS)) % 3, pad=0),
    ),
    "tags": (
        TokenClassification("abc"),
        lambda: bert(BertForTokenClassification),
        TaggedWords(IDS, TAGS, pad=0),
    ),
    "causal": (CausalLanguageModel(), llama, Completions(IDS, ANSWERS, pad=0)),
    "preference": (DirectPreference(0.5), llama, pairs()),
    "seq2seq": (SequenceToSequence(), bart, Translations(IDS, ANSWERS, pad=0)),
    "more labels than tokens": (
        MultiLabel(),
        lambda: bert(BertForSequenceClassification, 15),
        Documents(IDS, (torch.arange(15 * len(IDS)) % 4 == 0).float().view(-1, 15), pad=0),
    ),
    "as many labels as tokens": (
        MultiLabel(),
        lambda: bert(BertForSequenceClassification, max(LENGTHS)),
        Documents(IDS, torch.ones(len(IDS), max(LENGTHS)), pad=0),
    ),
    "own texts": (CausalLanguageModel(), llama, own_texts()),
    "causal, rows without labels": (
        CausalLanguageModel(),
        llama,
        Dialogues(IDS, [[row % 3 > 0] * len(ids) for row, ids in enumerate(IDS)], pad=0),
    ),
    "tags, rows without labels": (
        TokenClassification("abc"),
        lambda: bert(BertForTokenClassification),
        TaggedWords(IDS, [tags if row % 3 else [-100] * len(tags) for row, tags in enumerate(TAGS)], pad=0),
    ),
    "seq2seq, rows without labels": (
        SequenceToSequence(),
        bart,
        Translations(IDS, [ids if row % 3 else [-100] for row, ids in enumerate(ANSWERS)], pad=0),
    ),
}


@pytest.mark.parametrize("most", [60, 1], ids=["budget", "one row each"])
@pytest.mark.parametrize("name", CASES)
def test_parts_within_a_budget_give_the_gradient_of_the_whole_batch(name: str, most: int) -> None:
    objective, make, rows = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = make().eval().double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = rows.batch(range(len(rows)))
    of_all = objective.loss(model, batch)
    whole = torch.autograd.grad(of_all, parameters, allow_unused=True)
    parts = objective.parts(batch, TokenBudget(most))
    assert 1 < len(parts) < (len(rows) if most > 1 else len(rows) + 1)
    assert sum(share for _, share in parts) == pytest.approx(1)
    loss = sum(objective.loss(model, part) * share for part, share in parts)
    torch.testing.assert_close(loss, of_all, rtol=1e-5, atol=0)
    for found, wanted in zip(torch.autograd.grad(loss, parameters, allow_unused=True), whole, strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training.tokens_per_batch": 0}, "greater than or equal to 1"),
        ({"training.tokens_per_batch": 64, "training.accumulation": 2}, "both cut batches: give one of them"),
    ],
    ids=["none", "both"],
)
def test_settings_that_contradict_each_other_are_refused(
    toy_table: Table, overrides: Table, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read(toy_table, overrides)


def test_a_task_without_tokens_is_refused(toy_table: Table) -> None:
    words = (
        r"training\.tokens_per_batch = 64: the model gets no tokens from the rows of task\.kind = 'image-cla"
    )
    with pytest.raises(ConfigError, match=words):
        plan(read(toy_table, {"training.tokens_per_batch": 64}))


class Own(Classification):
    def parts(self, batch: Any, count: Any) -> Any:
        return [(batch, 1.0)]


@pytest.mark.parametrize(
    ("objective", "words"),
    [(None, r"the rows of client 0 have no input_ids"), (Own(), r"only the package's own objectives")],
    ids=["rows", "objective"],
)
def test_rows_and_objectives_of_the_user_that_cannot_be_cut_by_tokens_are_refused(
    objective: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Federation(
            nn.Linear(4, 2),
            [[(torch.zeros(4), 0)]],
            test=[(torch.zeros(4), 0)],
            head=[],
            lora={"r": 1, "target_modules": []},
            objective=objective,
            training={"tokens_per_batch": 64},
            machine={"device": "cpu"},
        )


@pytest.mark.parametrize(("most", "rows"), [(None, 8), (96, 8), (95, 4), (1, 1)])
def test_the_batch_of_the_diagnosis_fits_into_the_budget(most: int | None, rows: int) -> None:
    training = TrainingSettings(batch_size=8, tokens_per_batch=most)
    probe = Probe(model=None, loss=None, training=training, seed=0)  # type: ignore[arg-type]
    documents = Documents([[1] * 12] * 20, torch.zeros(20), pad=0)
    assert len(probe._batch("a", documents)["labels"]) == rows
