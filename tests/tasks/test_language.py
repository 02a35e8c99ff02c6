"""Losses, perplexity, options and generation in padded batches equal those of single rows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer
from fedsmoothlora.data.tokens import IGNORED, Completions, Documents, cut
from fedsmoothlora.tasks.metrics.exact_match import ExactMatch, generate, matches
from fedsmoothlora.tasks.metrics.multiple_choice import MultipleChoice
from fedsmoothlora.tasks.objectives import CausalLanguageModel

MODELS = pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])


@pytest.fixture
def model(which: str, request: pytest.FixtureRequest) -> nn.Module:
    folder: Path = request.getfixturevalue(which)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def completions(rows: int = 9) -> Completions:
    generator = torch.Generator().manual_seed(0)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    return Completions([some(1, 20) for _ in range(rows)], [some(1, 8) for _ in range(rows)], 257)


def row_loss(model: nn.Module, prompt: Any, answer: Any) -> tuple[float, int]:
    """Transformers' own loss of one row, unpadded: the sum over the answer's tokens, and their number."""
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[IGNORED] * len(prompt) + list(answer)])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * len(answer), len(answer)


@MODELS
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_loss_and_perplexity_are_transformers_own_by_row_weighted_by_tokens(
    model: nn.Module, batch_size: int
) -> None:
    rows = completions()
    single = [row_loss(model, p, a) for p, a in zip(rows.prompts, rows.answers, strict=True)]
    wanted = sum(loss for loss, _ in single) / sum(count for _, count in single)
    got = CausalLanguageModel().evaluate(model, rows, batch_size, lambda batch: batch)
    assert got.metrics["loss"] == pytest.approx(wanted, rel=1e-6)
    assert got.metrics["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-6)
    assert got.weight == sum(count for _, count in single)
    batch = rows.batch(range(len(rows)))
    assert CausalLanguageModel().loss(model, batch).item() == pytest.approx(wanted, rel=1e-6)


@MODELS
def test_labels_of_the_last_columns_and_of_all_columns_give_the_same_loss(model: nn.Module) -> None:
    batch = completions().batch(range(9))
    missing = batch["input_ids"].shape[1] - batch["labels"].shape[1]
    full = torch.nn.functional.pad(batch["labels"], (missing, 0), value=IGNORED)
    one, other = (
        CausalLanguageModel().loss(model, {**batch, "labels": some}) for some in (batch["labels"], full)
    )
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


@MODELS
def test_a_head_is_asked_for_the_tokens_before_labels_alone_and_given_them_as_one_block(
    model: nn.Module,
) -> None:
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda m, inputs, o: seen.append(inputs[0]))
    batch = completions().batch(range(9))
    CausalLanguageModel().loss(model, batch)
    assert seen[0].shape[:2] == batch["labels"].shape
    assert seen[0].shape[1] < batch["input_ids"].shape[1] - 1
    assert seen[0].is_contiguous()


@MODELS
@pytest.mark.parametrize("parts", [2, 3, 9, 50])
def test_parts_and_their_shares_give_the_whole_batch_s_gradient(model: nn.Module, parts: int) -> None:
    task, batch = CausalLanguageModel(), completions().batch(range(9))
    parameters = list(model.parameters())
    whole = torch.autograd.grad(task.loss(model, batch), parameters)
    found = task.parts(batch, parts)
    assert len(found) == min(parts, 9)
    assert sum(share for _, share in found) == pytest.approx(1)
    total = [torch.zeros_like(p) for p in parameters]
    for part, share in found:
        for sum_, gradient in zip(
            total, torch.autograd.grad(task.loss(model, part) * share, parameters), strict=True
        ):
            sum_ += gradient
    for got, wanted in zip(total, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_rows_of_like_length_are_cut_together_without_their_padding() -> None:
    documents = Documents([[1], [2] * 9, [3] * 2, [4] * 8], torch.arange(4), pad=0)
    short, long = cut(documents.batch(range(4)), 2)
    assert short["input_ids"].tolist() == [[1, 0], [3, 3]]
    assert short["labels"].tolist() == [0, 2]
    assert long["input_ids"].shape == (2, 9)


@MODELS
def test_batched_options_have_the_likelihoods_of_options_one_by_one(model: nn.Module) -> None:
    options = completions(12)
    choice = MultipleChoice(options=options, counts=[4, 3, 5], right=[0, 2, 1], batch_size=5)
    single = torch.tensor(
        [
            -row_loss(model, prompt, answer)[0]
            for prompt, answer in zip(options.prompts, options.answers, strict=True)
        ]
    )
    scores = choice.scores(model, lambda batch: batch)
    torch.testing.assert_close(scores, single.double(), rtol=1e-6, atol=1e-6)
    best = [int(part.argmax()) for part in single.split([4, 3, 5])]
    hits = sum(mine == right for mine, right in zip(best, [0, 2, 1], strict=True))
    assert choice.take(model, lambda batch: batch) == {"accuracy": hits / 3}
    always = MultipleChoice(options=options, counts=[4, 3, 5], right=best, batch_size=5)
    assert always.take(model, lambda batch: batch) == {"accuracy": 1.0}


@MODELS
def test_batched_generation_is_greedy_decoding_one_by_one(model: nn.Module) -> None:
    tokenizer = byte_tokenizer()
    prompts = completions().prompts
    wanted = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        wanted.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert generate(model, prompts, tokenizer, 4, 6) == wanted
    measured = ExactMatch(prompts, wanted, tokenizer, batch_size=4, max_new_tokens=6)
    assert measured.take(model, lambda batch: batch) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("There are 7 + 2 = 9 apples.", "9 apples", True),
        ("9.0", "9", True),
        ("1,200 dollars", "1200", True),
        ("$3.50", "3.5 dollars", True),
        ("19", "9", False),
        ("9 apples, then 3", "9 apples", False),
        ("no idea", "9", False),
        ("at 3:30 p.m.", "3:30 p.m.", True),
        ("12 and 15 years", "12 years old; 15 years old", True),
        ("15 and 12 years", "12 years old; 15 years old", False),
        ("mrs hilt", "Mrs. Hilt", True),
        ("Mr. Hilt", "Mrs. Hilt", False),
        ("-4", "4", False),
        ("10-5", "5", True),
    ],
)
def test_an_answer_matches_by_its_last_numbers_or_by_its_words(
    answer: str, reference: str, right: bool
) -> None:
    assert matches(answer, reference) is right


def test_only_what_follows_the_marker_counts() -> None:
    reference = "2 + 2 = 4.\nThe answer is: 4"
    assert matches("It is 5. The answer is: 4", reference, "The answer is:")
    assert not matches("The answer is: 5, not 4. The answer is: 5", reference, "The answer is:")
    assert not matches("4", reference, "The answer is:")
