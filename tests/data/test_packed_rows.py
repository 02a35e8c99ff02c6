"""Several rows in one sequence: every row has the loss that it has alone."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from fedsmoothlora.data.tokens import IGNORED, Completions, Dialogues, Packed, side_by_side
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.packing import check_packing
from fedsmoothlora.tasks.objectives import CausalLanguageModel

PAD = 257
row = st.lists(st.tuples(st.integers(0, 255), st.booleans()), min_size=2, max_size=20).map(
    lambda found: [*found[:-1], (found[-1][0], True)]
)


def dialogues(rows: list[list[tuple[int, bool]]]) -> Dialogues:
    return Dialogues(
        [[token for token, _ in own] for own in rows], [[t for _, t in own] for own in rows], PAD
    )


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tiny_gpt2: Path) -> dict[str, nn.Module]:
    return {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for name, folder in (("llama", tiny_llama), ("gpt2", tiny_gpt2))
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=6))
def test_a_packed_batch_has_the_loss_and_the_gradient_of_the_padded_one(
    models: dict[str, nn.Module], name: str, rows: list[list[tuple[int, bool]]]
) -> None:
    model, objective, examples = models[name], CausalLanguageModel(), dialogues(rows)
    every = list(range(len(rows)))
    weight = [parameter for parameter in model.parameters() if parameter.ndim == 2][1]
    found = []
    for batch in (examples.batch(every), Packed(examples).batch(every)):
        loss = objective.loss(model, batch)
        found.append((loss.item(), torch.autograd.grad(loss, weight)[0]))
    (padded, padded_gradient), (packed, packed_gradient) = found
    assert packed == pytest.approx(padded, rel=1e-5)
    torch.testing.assert_close(packed_gradient, padded_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_is_the_mean_over_the_tokens_of_the_rows_one_by_one(
    models: dict[str, nn.Module], name: str
) -> None:
    rows = Completions([[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]], [[11, 12], [13], [14, 15, 16], [17]], PAD)
    losses, counts = [], []
    for number in range(4):
        ids, labels = rows.row(number)
        with torch.no_grad():
            own = models[name](input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        counts.append(sum(label != IGNORED for label in labels))
        losses.append(float(own) * counts[-1])
    objective = CausalLanguageModel()
    with torch.no_grad():
        packed = float(objective.loss(models[name], Packed(rows).batch(range(4))))
    assert packed == pytest.approx(sum(losses) / sum(counts), rel=1e-6)
    whole = objective.evaluate(models[name], Packed(rows), 3, lambda batch: batch)
    assert whole.metrics["loss"] == pytest.approx(packed, rel=1e-6)
    assert whole.weight == sum(counts)


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_of_a_packed_batch_and_their_shares_give_its_loss(
    models: dict[str, nn.Module], parts: int
) -> None:
    rows = Completions([[n] * (n + 1) for n in range(9)], [[n] * (9 - n) for n in range(9)], PAD)
    batch, objective = Packed(rows).batch(range(9)), CausalLanguageModel()
    found = objective.parts(batch, parts)
    with torch.no_grad():
        total = sum(share * float(objective.loss(models["llama"], part)) for part, share in found)
        assert total == pytest.approx(float(objective.loss(models["llama"], batch)), rel=1e-6)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_every_row_is_in_one_sequence_and_no_sequence_is_too_long(lengths: list[int]) -> None:
    width = max(lengths)
    chosen = side_by_side(lengths, width)
    assert sorted(number for own in chosen for number in own) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in own) <= width for own in chosen)
    assert len(chosen) <= 2 * sum(lengths) / width + 1  # only the last may be less than half full


@given(st.lists(row, min_size=1, max_size=6))
def test_positions_begin_at_0_in_every_row_and_first_tokens_have_no_label(
    rows: list[list[tuple[int, bool]]],
) -> None:
    batch = Packed(dialogues(rows)).batch(range(len(rows)))
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    first = batch["position_ids"] == 0
    assert bool(first[:, 0].all())
    assert bool((batch["labels"][first] == IGNORED).all())
    steps = batch["position_ids"].diff(dim=1)
    assert bool(((steps == 1) | first[:, 1:]).all())
    wanted = sum(label != IGNORED for n in range(len(rows)) for label in dialogues(rows).row(n)[1][1:])
    assert int((batch["labels"] != IGNORED).sum()) == wanted


def test_models_that_keep_rows_apart_are_accepted_and_others_refused(models: dict[str, nn.Module]) -> None:
    for model in models.values():
        check_packing(model, "tiny")
        assert not model.training
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match=r"^task\.packing = true: tiny \(Bloom.*\) takes no position_ids"):
        check_packing(BloomForCausalLM(config), "tiny")


def test_a_model_that_attends_across_rows_is_refused(models: dict[str, nn.Module]) -> None:
    class Across(nn.Module):
        """Attends to all tokens before, as with an attention mask of ones."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def get_input_embeddings(self) -> nn.Module:
            return self.model.get_input_embeddings()  # type: ignore[operator,no-any-return]

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> object:
            return self.model(
                input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids)
            )

    with pytest.raises(ConfigError, match="lets rows of one sequence see each other"):
        check_packing(Across(models["llama"]), "tiny")
