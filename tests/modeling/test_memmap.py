from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rows import anonymous_bytes
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.messages import Reply, memmapped_reply
from fedsmoothlora.modeling.memmap import memmapped

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=5))
def test_memory_mapped_tensors_equal_the_originals_bit_for_bit(
    given: list[tuple[tuple[int, ...], torch.dtype]],
) -> None:
    tensors = {str(index): (torch.randn(shape) * 3).to(dtype) for index, (shape, dtype) in enumerate(given)}
    mapped = memmapped(tensors)
    assert list(mapped) == list(tensors)
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert mapped[name].shape == tensor.shape
        assert torch.equal(mapped[name], tensor)
        assert mapped[name].data_ptr() % 64 == 0


def test_writing_to_a_tensor_changes_a_private_copy() -> None:
    original = torch.ones(100)
    mapped = memmapped({"a": original, "b": torch.ones(100)})
    mapped["a"].zero_()
    assert bool((original == 1).all())
    assert bool((mapped["b"] == 1).all())


def reply(**parts: Any) -> Reply:
    return Reply(client="north", round=3, samples=7, **parts)


def test_a_reply_is_the_same_from_disk() -> None:
    product = LowRank(torch.randn(6, 4).mT.contiguous().mT, torch.randn(4, 5))
    sent = {"layer": product, "other": torch.randn(3, 3)}
    came = reply(sent=sent, head={"bias": torch.randn(3)}, control={"layer.lora_B": torch.randn(2)})
    kept = memmapped_reply(came)
    assert (kept.client, kept.round, kept.samples, kept.nbytes) == ("north", 3, 7, came.nbytes)
    found = kept.sent["layer"]
    assert isinstance(found, LowRank)
    assert torch.equal(found.B, product.B)
    assert torch.equal(found.A, product.A)
    assert torch.equal(kept.sent["other"], sent["other"])  # type: ignore[arg-type]
    assert torch.equal(kept.head["bias"], came.head["bias"])
    assert torch.equal(kept.control["layer.lora_B"], came.control["layer.lora_B"])


@pytest.mark.parametrize("sent", [None, {"layer": "text"}, {"layer": torch.eye(2).to_sparse()}])
def test_invalid_replies_are_left_to_check_replies(sent: Any) -> None:
    came = reply(sent=sent)
    assert memmapped_reply(came) is came


def test_replies_that_wait_take_no_memory_and_leave_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = anonymous_bytes()
    waiting = [
        memmapped_reply(reply(sent={f"layer {k}": torch.ones(100, 100) for k in range(100)}))
        for _ in range(50)  # 200 MB in all
    ]
    assert anonymous_bytes() - before < 40e6
    assert sum(float(one.sent["layer 7"].sum()) for one in waiting) == 50e4  # type: ignore[union-attr]
    assert list(tmp_path.iterdir()) == []


def test_tensors_without_values_stay_as_they_are() -> None:
    """If only shapes are needed, as in `check`, models are on the meta device."""
    empty = torch.empty(3, 4, device="meta")
    assert memmapped({"w": empty})["w"] is empty
