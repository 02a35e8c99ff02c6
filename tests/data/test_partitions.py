"""Partitions assign every row exactly once, by rules that the tests check by counting."""

from collections import Counter
from dataclasses import fields
from pathlib import PurePath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.data import partitioning
from fedsmoothlora.data.partitioning import Rows
from fedsmoothlora.data.partitioning.by_column import by_column
from fedsmoothlora.data.partitioning.by_file import by_file
from fedsmoothlora.data.partitioning.dirichlet import dirichlet
from fedsmoothlora.data.partitioning.iid import iid
from fedsmoothlora.data.partitioning.pathological import pathological
from fedsmoothlora.data.partitioning.shards import shards
from fedsmoothlora.data.partitioning.sizes import sizes
from fedsmoothlora.data.partitions import Partition, check, label_counts

SEEDS = st.integers(0, 2**32)
LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(np.array)
BALANCED = np.repeat(np.arange(10), 400)  # 4000 rows, 10 classes

DEALS = {deal.__name__: deal for deal in (iid, dirichlet, shards, pathological, sizes)}

# One call of each random kind that any 40 rows or more of BALANCED can serve.
RANDOM = {
    "iid": {},
    "dirichlet": {"alpha": 0.5},
    "shards": {"shards_per_client": 2},
    "pathological": {"classes_per_client": 3},
    "sizes": {"power": 1.5},
}


def rows_of(partition: Partition) -> list[list[int]]:
    return [rows.tolist() for rows in partition.clients.values()]


def sizes_of(partition: Partition) -> list[int]:
    return [len(rows) for rows in partition.clients.values()]


def assert_every_row_in_one_place(partition: Partition, rows: int) -> None:
    """Counted with Counter, so that `check` has an oracle."""
    held = Counter(row for part in [*rows_of(partition), partition.left_out.tolist()] for row in part)
    assert held == Counter(range(rows))
    for part in [*partition.clients.values(), partition.left_out]:
        assert part.dtype == np.int64
        assert part.tolist() == sorted(part.tolist())
    check(partition, rows)


# Every kind of the registry, with all the keys that it has


@st.composite
def dealt(draw):
    """A partition as in a configuration, rows, and a seed; some combinations are impossible."""
    labels = draw(LABELS)
    few = st.integers(1, 12)
    chosen = {"clients": few, "min_size": few, "shards_per_client": few, "classes_per_client": few}
    kind = partitioning.find(draw(st.sampled_from(partitioning.names())))
    keys = {part.name: chosen.get(part.name, ...) for part in fields(kind) if part.name != "kind"}
    names = st.lists(st.sampled_from("abc"), min_size=len(labels), max_size=len(labels))
    rows = Rows(labels=labels, client_of_row=draw(names), file_of_row=draw(names))
    return draw(st.builds(kind, **keys)), rows, draw(SEEDS)


@settings(max_examples=200)
@given(dealt())
def test_every_partition_assigns_each_row_once_or_says_why_not(given_):
    partitioner, rows, seed = given_
    try:
        partition = partitioner.deal(rows, seed)
    except ValueError:
        return
    assert_every_row_in_one_place(partition, len(rows.labels))
    assert all(part.size for part in partition.clients.values())
    assert rows_of(partition) == rows_of(partitioner.deal(rows, seed))


@pytest.mark.parametrize("name", partitioning.names())
def test_a_partition_is_found_by_its_name(name):
    kind = partitioning.find(name)
    assert kind.kind == name
    assert kind.__module__.endswith(f".{name}")


@pytest.mark.parametrize("name", ["dirichlet", "shards", "pathological"])
def test_rows_without_labels_cannot_be_dealt_by_label(name):
    rows = Rows(labels=BALANCED, labelled=False)
    with pytest.raises(ValueError, match=rf"partition.kind = '{name}' deals rows by their label"):
        partitioning.find(name)(clients=2, **RANDOM[name]).deal(rows, 0)


def test_a_source_without_a_file_per_client_cannot_be_dealt_by_file():
    rows = Rows(labels=BALANCED, source="pkg:mnist-5k")
    with pytest.raises(
        ValueError, match=r"'by_file': data\.source = 'pkg:mnist-5k' does not come in one file"
    ):
        partitioning.find("by_file")().deal(rows, 0)


def test_an_unknown_partition_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"did you mean 'dirichlet'\? There are: by_column, by_file"):
        partitioning.find("dirichlt")


# Every kind: disjoint and complete


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_iid_parts_differ_by_at_most_one_row(labels, seed, data):
    clients = data.draw(st.integers(1, len(labels)))
    partition = iid(labels, clients, seed)
    assert_every_row_in_one_place(partition, len(labels))
    assert list(partition.clients) == [str(i) for i in range(clients)]
    assert max(sizes_of(partition)) - min(sizes_of(partition)) <= 1
    assert partition.left_out.size == 0


@given(labels=LABELS, seed=SEEDS, alpha=st.floats(0.3, 1e6), min_size=st.integers(1, 3), data=st.data())
def test_dirichlet_keeps_min_size(labels, seed, alpha, min_size, data):
    clients = data.draw(st.integers(1, min(3, max(1, len(labels) // (5 * min_size)))))
    if clients * min_size > len(labels):
        return
    partition = dirichlet(labels, clients, seed, alpha=alpha, min_size=min_size)
    assert_every_row_in_one_place(partition, len(labels))
    assert len(partition.clients) == clients
    assert min(sizes_of(partition)) >= min_size
    assert partition.left_out.size == 0


@given(labels=LABELS, seed=SEEDS, per_client=st.integers(1, 4), data=st.data())
def test_shards_are_contiguous_in_label_order(labels, seed, per_client, data):
    if len(labels) < per_client:
        return
    clients = data.draw(st.integers(1, len(labels) // per_client))
    partition = shards(labels, clients, seed, shards_per_client=per_client)
    assert_every_row_in_one_place(partition, len(labels))
    assert len(partition.clients) == clients
    assert partition.left_out.size == 0
    assert max(sizes_of(partition)) - min(sizes_of(partition)) <= per_client
    # A shard of s rows touches one class, and one more for each class boundary inside it.
    shard = -(-len(labels) // (clients * per_client))
    smallest_class = min(Counter(labels.tolist()).values())
    if shard <= smallest_class:
        seen = (label_counts(partition, labels, 7) > 0).sum(axis=1)
        assert seen.max() <= 2 * per_client


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_pathological_clients_see_exactly_their_classes(labels, seed, data):
    rows = Counter(labels.tolist())
    per_client = data.draw(st.integers(1, len(rows)))
    clients = data.draw(st.integers(1, 12))
    places = sum(min(n, clients) for n in rows.values())
    if clients > len(labels) or clients * per_client > places:
        with pytest.raises(ValueError, match=rf"{clients} clients"):
            pathological(labels, clients, seed, classes_per_client=per_client)
        return
    partition = pathological(labels, clients, seed, classes_per_client=per_client)
    assert_every_row_in_one_place(partition, len(labels))
    counts = label_counts(partition, labels, 7)
    assert counts.shape == (clients, 7)
    assert ((counts > 0).sum(axis=1) == per_client).all()
    held_by = (counts > 0).sum(axis=0)  # (classes,)
    unfilled = [held_by[c] for c in rows if held_by[c] < min(rows[c], clients)]
    if unfilled:  # no class is ahead by two of one that could have had another holder
        assert max(held_by) - min(unfilled) <= 1
    for c in rows:  # near equal among the holders, and all or nothing
        parts = counts[:, c][counts[:, c] > 0]
        assert parts.sum() in ((rows[c],) if held_by[c] else (0,))
        assert parts.size == 0 or parts.max() - parts.min() <= 1
    assert set(labels[partition.left_out].tolist()) == {c for c in rows if not held_by[c]}


@given(labels=LABELS, seed=SEEDS, power=st.floats(0.01, 50), min_size=st.integers(1, 5), data=st.data())
def test_sizes_fall_with_rank_and_keep_min_size(labels, seed, power, min_size, data):
    if len(labels) < min_size:
        return
    clients = data.draw(st.integers(1, len(labels) // min_size))
    partition = sizes(labels, clients, seed, power=power, min_size=min_size)
    assert_every_row_in_one_place(partition, len(labels))
    found = sizes_of(partition)
    assert len(found) == clients
    assert min(found) >= min_size
    assert found == sorted(found, reverse=True)


@given(values=st.lists(st.sampled_from(["ann", "bob", "0", "Ann", "zoë"]), min_size=1, max_size=40))
def test_by_column_makes_one_client_per_value(values):
    partition = by_column(values)
    assert_every_row_in_one_place(partition, len(values))
    assert list(partition.clients) == list(dict.fromkeys(values))
    for client, rows in partition.clients.items():
        assert [values[row] for row in rows] == values.count(client) * [client]


@given(
    files=st.lists(
        st.sampled_from(["a.txt", "b/a.txt", "a.csv", "a-2.txt", "c/a-2.txt", "b.txt"]),
        min_size=1,
        max_size=30,
    )
)
def test_by_file_makes_one_client_per_file(files):
    partition = by_file(files)
    assert_every_row_in_one_place(partition, len(files))
    assert len(partition.clients) == len(set(files))
    for client, rows in partition.clients.items():
        (file,) = {files[row] for row in rows}
        assert client.startswith(PurePath(file).stem)


# Seeds


@pytest.mark.parametrize("kind", RANDOM)
@settings(max_examples=15)
@given(seed=SEEDS)
def test_a_seed_fixes_the_partition_whatever_the_global_state(kind, seed):
    labels = BALANCED[::10]
    first = DEALS[kind](labels, 5, seed, **RANDOM[kind])
    np.random.seed(seed % 1000)  # noqa: NPY002 - the global state is what must not matter
    again = DEALS[kind](labels, 5, seed, **RANDOM[kind])
    assert rows_of(first) == rows_of(again)
    assert first.left_out.tolist() == again.left_out.tolist()
    other = DEALS[kind](labels, 5, seed + 1, **RANDOM[kind])
    assert rows_of(first) != rows_of(other)


def test_any_integer_type_of_label_gives_the_same_partition():
    wanted = rows_of(dirichlet(BALANCED, 4, 3, alpha=0.3))
    for dtype in (np.uint8, np.int32, np.uint64):
        assert rows_of(dirichlet(BALANCED.astype(dtype), 4, 3, alpha=0.3)) == wanted


# Dirichlet's concentration


def test_large_alpha_gives_the_global_label_proportions():
    labels = np.repeat(np.arange(4), [1000, 2000, 500, 500])
    for alpha in (1e6, 1e12, 1e308):  # numpy alone returns zeros for the last
        counts = label_counts(dirichlet(labels, 5, 0, alpha=alpha), labels, 4)
        np.testing.assert_allclose(counts, [[200, 400, 100, 100]] * 5, atol=4)


@pytest.mark.parametrize("seed", range(20))
def test_small_alpha_is_skewed(seed):
    counts = label_counts(dirichlet(BALANCED, 5, seed, alpha=0.1), BALANCED, 10)
    # The largest of five proportions from Dir(0.1) has a mean of about 0.85; equal parts have 0.2.
    assert (counts.max(axis=0) / 400).mean() > 0.6


@pytest.mark.parametrize("alpha", [1e-3, 1e-12, 1e-300])
def test_tiny_alpha_gives_each_class_to_one_client(alpha):
    for seed in range(5):
        partition = dirichlet(BALANCED, 5, seed, alpha=alpha)
        assert_every_row_in_one_place(partition, 4000)
        counts = label_counts(partition, BALANCED, 10)
        assert (counts.max(axis=0) > 390).sum() >= 8


def test_dirichlet_proportions_have_the_distributions_mean_and_variance():
    # For p ~ Dir(a, ..., a) over n: E p = 1/n, Var p = (n - 1) / (n² (n a + 1)).
    labels = np.repeat(np.arange(4000), 50)
    p = label_counts(dirichlet(labels, 4, 0, alpha=0.7), labels, 4000) / 50  # (clients, classes)
    np.testing.assert_allclose(p.mean(axis=1), 0.25, atol=0.02)
    np.testing.assert_allclose(p.var(axis=1), 3 / (16 * 3.8), rtol=0.1)


def test_rounding_favours_no_client():
    # One row a class: cutting the cumulative proportions off would give nearly every row to the last client.
    found = sizes_of(dirichlet(np.arange(4000), 4, 0, alpha=1.0))
    assert max(found) < 1.25 * min(found)


def test_dirichlet_says_what_to_change_when_no_draw_suffices():
    with pytest.raises(ValueError, match="larger alpha, a smaller min_size or fewer clients"):
        dirichlet(np.zeros(100, dtype=int), 5, 0, alpha=1e-3, min_size=10)


# Shards and pathological


def test_shards_that_divide_the_classes_hold_one_class_each():
    partition = shards(BALANCED, 100, 0)  # McMahan et al.: 100 clients, two shards, 10 classes
    counts = label_counts(partition, BALANCED, 10)
    assert sizes_of(partition) == [40] * 100
    assert (counts > 0).sum(axis=1).max() == 2
    assert set(np.unique(counts)) <= {0, 20, 40}


@given(seed=SEEDS, clients=st.integers(1, 20), per_client=st.integers(1, 10))
@settings(max_examples=30)
def test_pathological_draws_classes_evenly(seed, clients, per_client):
    partition = pathological(BALANCED, clients, seed, classes_per_client=per_client)
    held_by = (label_counts(partition, BALANCED, 10) > 0).sum(axis=0)
    assert held_by.max() - held_by.min() <= 1
    assert partition.left_out.size == 400 * max(0, 10 - clients * per_client)


def test_pathological_leaves_no_row_out_when_every_class_is_drawn():
    assert pathological(BALANCED, 5, 0, classes_per_client=2).left_out.size == 0


def test_pathological_gives_a_rare_class_no_more_holders_than_rows():
    labels = np.array([0] * 50 + [1] * 50 + [2])
    counts = label_counts(pathological(labels, 6, 1, classes_per_client=2), labels, 3)
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert sorted((counts > 0).sum(axis=0).tolist()) == [1, 5, 6]


# Sizes


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_sizes_follow_the_power_law(power):
    found = sizes_of(sizes(BALANCED, 8, 0, power=power))
    weights = [(rank + 1) ** -power for rank in range(8)]
    np.testing.assert_allclose(found, [4000 * w / sum(weights) for w in weights], atol=1)


def test_sizes_below_min_size_are_raised_and_the_rest_keep_their_proportions():
    # Shares of 110 in 1 : 1/4 : 1/9 : 1/16 leave two clients below 15: they get 15, and 80 rows go 4 : 1.
    assert sizes_of(sizes(np.zeros(110, dtype=int), 4, 0, power=2.0, min_size=15)) == [64, 16, 15, 15]


def test_a_steep_power_leaves_all_other_clients_min_size():
    assert sizes_of(sizes(np.zeros(30, dtype=int), 4, 0, power=1e300, min_size=2)) == [24, 2, 2, 2]


def test_sizes_do_not_depend_on_the_seed():
    assert sizes_of(sizes(BALANCED, 7, 0)) == sizes_of(sizes(BALANCED, 7, 1))


# Natural federations


def test_by_column_takes_numpy_strings_as_plain_ids():
    partition = by_column(np.array(["x", "y", "x"]))
    assert {client: rows.tolist() for client, rows in partition.clients.items()} == {"x": [0, 2], "y": [1]}
    assert all(type(client) is str for client in partition.clients)


def test_by_file_numbers_equal_names_without_colliding_with_other_files():
    partition = by_file(["a.txt", "b/a.txt", PurePath("a-2.txt"), "./a.txt", "c/a.txt", "d/a-2.txt"])
    assert {client: rows.tolist() for client, rows in partition.clients.items()} == {
        "a": [0, 3],
        "a-3": [1],
        "a-2": [2],
        "a-4": [4],
        "a-2-2": [5],
    }


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan"), 3])
def test_a_row_without_a_client_is_named_by_index_and_number(missing):
    with pytest.raises(ValueError, match=r"column 'author': row index 2 \(row number 3\) has"):
        by_column(["x", "y", missing], column="author")
    with pytest.raises(ValueError, match=r"by_file: row index 1 \(row number 2\) has"):
        by_file(["x.txt", missing])


@pytest.mark.parametrize("kind", [by_column, by_file])
def test_no_rows_is_an_error(kind):
    with pytest.raises(ValueError, match="no rows"):
        kind([])


# Errors every random kind has


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 2), dtype=int), "labels must be a 1-D array of integers, not 2-D of int64"),
        (np.zeros(4), "labels must be a 1-D array of integers, not 1-D of float64"),
        (np.zeros(4, dtype=bool), "not 1-D of bool"),
        (np.array(["a", "b"]), "not 1-D of <U1"),
    ],
)
def test_labels_must_be_one_dimensional_integers(kind, labels, message):
    with pytest.raises(ValueError, match=message):
        DEALS[kind](labels, 2, 0, **RANDOM[kind])


@pytest.mark.parametrize("kind", RANDOM)
def test_more_clients_than_rows_names_both(kind):
    with pytest.raises(ValueError, match="9 clients cannot share 8 rows"):
        DEALS[kind](np.arange(8), 9, 0, **RANDOM[kind])


@pytest.mark.parametrize(
    ("kind", "parameter", "value", "right"),
    [
        *[(kind, "clients", wrong, "at least 1") for kind in RANDOM for wrong in (0, -1, 2.0, True)],
        *[(kind, "seed", wrong, "at least 0") for kind in RANDOM for wrong in (-1, 0.5)],
        *[("dirichlet", "alpha", x, "finite number above 0") for x in (0, -0.1, np.inf, np.nan, "1")],
        ("dirichlet", "min_size", 0, "at least 1"),
        ("shards", "shards_per_client", 0, "at least 1"),
        ("pathological", "classes_per_client", 0, "at least 1"),
        *[("sizes", "power", wrong, "finite number above 0") for wrong in (0, -1.0, np.inf, np.nan)],
        ("sizes", "min_size", -3, "at least 1"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value(kind, parameter, value, right):
    options = {"clients": 2, "seed": 0, **RANDOM[kind], parameter: value}
    with pytest.raises(ValueError, match=rf"^{parameter}={value!r} must be a .*{right}"):
        DEALS[kind](BALANCED, **options)


@pytest.mark.parametrize("kind", ["dirichlet", "sizes"])
def test_too_few_rows_for_min_size_names_the_largest_possible_value(kind):
    with pytest.raises(ValueError, match=r"need 12 rows, but there are 11; use a min_size of at most 3"):
        DEALS[kind](np.arange(11), 3, 0, **RANDOM[kind], min_size=4)


def test_more_shards_than_rows_names_both():
    with pytest.raises(ValueError, match=r"need 12 shards, but there are only 11 rows"):
        shards(np.arange(11), 3, 0, shards_per_client=4)


def test_more_classes_per_client_than_classes_names_both():
    with pytest.raises(ValueError, match=r"classes_per_client=11, but the labels have only 10 classes"):
        pathological(BALANCED, 3, 0, classes_per_client=11)


def test_classes_with_too_few_rows_for_their_holders_is_an_error():
    with pytest.raises(ValueError, match=r"need 6 places, but the 2 classes have rows for only 4"):
        pathological(np.array([0, 0, 0, 0, 1]), 3, 0, classes_per_client=2)


# check and label_counts


def partition_of(*clients: list[int], left_out: tuple[int, ...] = (), dtype: type = np.int64) -> Partition:
    held = {str(i): np.array(rows, dtype=dtype) for i, rows in enumerate(clients)}
    return Partition(held, np.array(left_out, dtype=np.int64))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            partition_of([0, 1], [1, 2], left_out=(3,)),
            "row 1 is assigned twice: to client '0' and to client '1'",
        ),
        (
            partition_of([0, 1], [2], left_out=(2, 3)),
            "row 2 is assigned twice: to client '1' and to left_out",
        ),
        (partition_of([0, 1], [2]), "1 of 4 rows belong to no client and are not in left_out; first: 3"),
        (partition_of([0, 1, 1], [2, 3]), "client '0': row 1 is listed twice"),
        (
            partition_of([0, 2, 1], [3]),
            "client '0': row indices must be sorted, but 2 is before a smaller one",
        ),
        (partition_of([0, 1], [2, 3, 4]), "client '1': row 4 is outside the training set's rows 0 to 3"),
        (partition_of([-1, 0, 1], [2, 3]), "client '0': row -1 is outside"),
        (partition_of([0, 1], [2, 3], dtype=np.int32), "must be a 1-D int64 array, not 1-D of int32"),
    ],
)
def test_check_names_what_is_wrong_and_where(partition, message):
    with pytest.raises(ValueError, match=message):
        check(partition, 4)


def test_check_accepts_a_complete_partition_with_rows_left_out():
    check(partition_of([0, 3], [1], left_out=(2,)), 4)
    check(partition_of(), 0)
    with pytest.raises(ValueError, match="rows=-1 must be"):
        check(partition_of(), -1)


def test_label_counts_are_clients_by_classes():
    counts = label_counts(partition_of([0, 3], [1], left_out=(2,)), np.array([2, 0, 1, 2]), 4)
    assert counts.tolist() == [[0, 0, 2, 0], [1, 0, 0, 0]]
    assert counts.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 1, 3], 3, "row 2 has label 3; with classes=3 labels run from 0 to 2"),
        ([0, -1, 1], 3, "row 1 has label -1"),
        ([0, 1, 1], 0, "classes=0 must be"),
        ([0, 1], 2, "row 2 is outside the training set's rows 0 to 1"),
        ([0.0, 1.0, 1.0], 2, "labels must be a 1-D array of integers"),
    ],
)
def test_label_counts_refuses_labels_that_do_not_fit(labels, classes, message):
    with pytest.raises(ValueError, match=message):
        label_counts(partition_of([0, 1], [2]), np.array(labels), classes)
