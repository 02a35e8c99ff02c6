import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.data.client_rows import partition_notes, split_validation
from fedsmoothlora.data.partitions import Partition

SHARES = st.floats(0, 0.5)
LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60)


def split(labels: list[int], share: float, seed: int = 0, client: str = "a"):
    rows = np.arange(len(labels), dtype=np.int64)
    return split_validation(rows, np.array(labels), share, seed, client)


@given(LABELS, SHARES, st.integers(0, 99), st.text(max_size=5))
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_one_part_and_every_class_stays_in_training(labels, share, seed, client) -> None:
    train, validation = split(labels, share, seed, client)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert train.dtype == validation.dtype == np.int64
    assert len(train) >= 1
    found = np.array(labels)
    assert set(found[train]) == set(labels)


@given(LABELS, SHARES)
@settings(max_examples=200, deadline=None)
def test_validation_shares_are_right_to_a_row_by_class_and_to_the_nearest_row_in_total(labels, share) -> None:
    _, validation = split(labels, share)
    counts = np.bincount(labels, minlength=6)
    counts[counts < 2] = 0
    taken = np.bincount(np.array(labels)[validation], minlength=6)
    assert (np.abs(taken - share * counts) < 1).all()
    assert abs(len(validation) - share * counts.sum()) <= 0.5 + 1e-9


@given(LABELS, SHARES, st.permutations(range(60)))
@settings(max_examples=50, deadline=None)
def test_the_split_depends_on_the_clients_rows_not_on_their_order_or_others_labels(
    labels, share, order
) -> None:
    whole = np.array([*labels, *[9] * 60])
    rows = np.array([row for row in order if row < len(labels)], dtype=np.int64)
    for first, second in zip(split_validation(rows, whole, share, 0, "a"), split(labels, share), strict=True):
        assert first.tolist() == second.tolist()


def test_seed_and_client_change_the_draw() -> None:
    labels = [0] * 40
    draws = {tuple(split(labels, 0.5, seed, client)[1]) for seed in (0, 1) for client in "ab"}
    assert len(draws) == 4
    assert split(labels, 0.5)[1].tolist() == split(labels, 0.5)[1].tolist()


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"must be from 0 to 0\.5"):
        split([0, 1], share)


def rows(*found: int) -> np.ndarray:
    return np.array(found, dtype=np.int64)


def test_notes_count_empty_clients_and_classes_at_one_client_or_none() -> None:
    partition = Partition({"a": rows(0, 1, 2), "b": rows(3), "c": rows()}, rows(4))
    notes = partition_notes(partition, np.array([0, 1, 1, 0, 2]), ("cat", "dog", "eel"))
    assert notes == [
        "1 of 3 clients have no rows: 'c'",
        "1 of 3 classes have rows at no client: 'eel'",
        "1 of 3 classes have rows at one client only: 'dog' (2 rows, client 'a')",
        "1 of 5 rows belong to no client",
    ]


def test_an_even_partition_has_no_notes_and_a_long_list_is_cut() -> None:
    even = Partition({"a": rows(0, 1), "b": rows(2, 3)}, rows())
    assert partition_notes(even, np.array([0, 1, 0, 1]), ("x", "y")) == []
    many = Partition({"a": rows(*range(8)), "b": rows(8)}, rows())
    (note,) = partition_notes(many, np.array([*range(8), 7]), [str(label) for label in range(8)])
    assert note.startswith("7 of 8 classes have rows at one client only: '0' (1 rows, client 'a')")
    assert note.endswith("and 2 more")
