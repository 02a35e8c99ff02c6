"""The batches of several clients as one batch, padded to the widest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from fedsmoothlora.data.own import OwnExamples
from fedsmoothlora.data.tokens import Completions, Documents, Packed, joined
from fedsmoothlora.errors import DataError
from fedsmoothlora.tasks.objectives.language import CausalLanguageModel

ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=2, max_size=8)


@given(ROWS, st.data())
def test_joined_batches_are_the_batch_of_all_rows(ids: list[list[int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(ids) - 1))
    parts = [list(range(cut)), list(range(cut, len(ids)))]
    for rows, left in (
        (Documents(ids=ids, labels=torch.arange(len(ids)), pad=0), False),
        (Completions(prompts=ids, answers=ids[::-1], pad=0), True),
    ):
        whole, found = rows.batch(range(len(ids))), joined([rows.batch(part) for part in parts], left=left)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], value) for name, value in whole.items())


IDS = [[(5 * row + k) % 27 + 3 for k in range(length)] for row, length in enumerate([3, 9, 4, 2, 5, 6])]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(Packed(Completions(prompts=IDS, answers=IDS[::-1], pad=0)), id="packed"),
        pytest.param(OwnExamples([{"input_ids": ids, "labels": ids} for ids in IDS], "client a"), id="own"),
    ],
)
def test_texts_of_a_client_have_the_same_loss_beside_wider_ones(rows: Packed | OwnExamples) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    objective, batches = CausalLanguageModel(), [rows.batch(part) for part in ([0, 2, 3], [1, 4, 5])]
    assert len({batch["input_ids"].shape[1] for batch in batches}) == 2
    whole, first = joined(batches, left=objective.pads_left), 0
    for batch in batches:
        own = {name: value[first : first + len(batch["labels"])] for name, value in whole.items()}
        first += len(batch["labels"])
        with torch.no_grad():
            torch.testing.assert_close(objective.loss(model, own), objective.loss(model, batch))


def test_rows_of_different_shapes_need_an_attention_mask() -> None:
    batches = [{"inputs": torch.zeros(2, width), "labels": torch.zeros(2)} for width in (3, 5)]
    with pytest.raises(DataError, match=r"inputs: rows of clients have the shapes \(3,\) and \(5,\)"):
        joined(batches, left=False)


def test_clients_whose_rows_have_other_tensors_are_not_joined() -> None:
    one = {"inputs": torch.zeros(2, 3), "labels": torch.zeros(2)}
    for batches in ([one, one | {"segments": one["inputs"]}], [one | {"segments": one["inputs"]}, one]):
        with pytest.raises(DataError, match="only some clients have segments in their rows"):
            joined(batches, left=False)
