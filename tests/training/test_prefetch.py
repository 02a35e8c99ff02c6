"""Batches that a thread makes ahead."""

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_device import FAKE
from fedsmoothlora.data.examples import BatchOrder, Vectors
from fedsmoothlora.errors import DataError
from fedsmoothlora.training import prefetch
from fedsmoothlora.training.prefetch import made_ahead, prefetched

CPU = torch.device("cpu")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fedsmoothlora-batches"]


@given(count=st.integers(0, 20), ahead=st.integers(1, 5))
def test_all_items_arrive_in_their_order(count: int, ahead: int) -> None:
    with made_ahead(iter(range(count)), ahead) as ready:
        assert list(ready) == list(range(count))
    assert not threads()


def test_a_thread_makes_no_more_items_than_it_may() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with made_ahead(items(), 3) as ready:
        assert [next(ready) for _ in range(2)] == [0, 1]
    assert len(made) <= 2 + 3
    assert not threads()


def test_an_error_of_the_thread_is_raised_where_its_item_is_wanted() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("client a: row 7 cannot be read")

    with made_ahead(items()) as ready:
        assert next(ready) == 1
        with pytest.raises(DataError, match="client a: row 7"):
            next(ready)
    assert not threads()


def test_the_thread_ends_with_an_error_of_the_loop() -> None:
    def loop() -> None:
        with made_ahead(iter(range(100))) as ready:
            raise RuntimeError(f"step {next(ready)}")

    with pytest.raises(RuntimeError, match="step 0"):
        loop()
    assert not threads()


@pytest.mark.parametrize("device", [CPU, FAKE], ids=str)
def test_batches_of_random_rows_are_the_same_to_the_bit(device: torch.device) -> None:
    """The order of rows and the draws of a data set, such as augmentation, are those of a plain loop."""
    rows = Vectors(torch.arange(20.0).view(10, 2), torch.arange(10))

    def batches() -> Iterator[list[tuple[dict[str, torch.Tensor], float]]]:
        for chosen in BatchOrder(10, 4, torch.Generator().manual_seed(3)).take(7):
            batch = rows.batch(chosen)
            yield [({**batch, "inputs": batch["inputs"] + torch.rand(len(chosen), 1)}, 1.0)]

    torch.manual_seed(5)
    plain = list(batches())
    torch.manual_seed(5)
    with prefetched(batches(), device) as ready:
        found = list(ready)
    assert len(found) == 7
    for [(one, _)], [(other, _)] in zip(plain, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_for_cuda_are_pinned_in_the_thread_of_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, pinned = [], []
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = {
        "inputs": torch.ones(2),
        "labels": torch.zeros(2),
        "not on the CPU": torch.ones(2, device="meta"),
    }
    with prefetched([[(batch, 0.5), (batch, 0.5)]], torch.device("cuda:3")) as ready:
        [parts] = ready
    assert gpus == [3]
    assert [share for _, share in parts] == [0.5, 0.5]
    assert len(pinned) == 4
    assert prefetch._pin(torch.ones(1)).equal(torch.ones(1))  # only dictionaries are batches
