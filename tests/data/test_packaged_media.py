"""The packaged pictures with several digits, drum sounds and pronunciations have the described rows."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fedsmoothlora.data.label_sets import LabelSets
from fedsmoothlora.data.media_sources import load_audio, load_images
from fedsmoothlora.data.packaged import drum_sounds, mnist_5k, mnist_mosaics, pronunciations
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.text_sources import load_texts
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.packaged import t5_letters


@pytest.fixture(scope="module")
def mosaics() -> tuple[RawImages, RawImages]:
    return mnist_mosaics.load()


def quarters(picture: np.ndarray) -> set[bytes]:
    """The quarters of a picture that are not black."""
    parts = [picture[y : y + 28, x : x + 28] for y in (0, 28) for x in (0, 28)]
    return {part.tobytes() for part in parts if part.any()}


def test_a_mosaic_holds_one_image_of_each_of_its_digits(mosaics: tuple[RawImages, RawImages]) -> None:
    for part, digits in zip(mosaics, mnist_5k.load(), strict=True):
        label_of = {
            image.tobytes(): str(label) for image, label in zip(digits.pixels, digits.labels, strict=True)
        }
        for picture, names in zip(part.pixels, part.lists["digits"], strict=True):
            assert sorted(label_of[found] for found in quarters(picture)) == list(names)
    assert tuple(map(len, mosaics)) == (2000, 500)
    counts = [len(names) for names in mosaics[0].lists["digits"]]
    assert set(counts) == {1, 2, 3}


def test_no_digit_is_in_both_sets_of_mosaics(mosaics: tuple[RawImages, RawImages]) -> None:
    train, test = (set().union(*map(quarters, part.pixels)) for part in mosaics)
    assert not train & test


def test_packaged_sets_are_drawn_alike_every_time(mosaics: tuple[RawImages, RawImages]) -> None:
    again, _ = mnist_mosaics.load()
    np.testing.assert_array_equal(again.pixels, mosaics[0].pixels)
    assert again.lists == mosaics[0].lists
    taken = again.take(np.array([3, 1]))
    assert taken.lists["digits"] == [again.lists["digits"][3], again.lists["digits"][1]]
    assert pronunciations.load()[1].columns == pronunciations.load()[1].columns


def test_the_drum_sounds_are_different_recordings_of_four_classes() -> None:
    pytest.importorskip("soundfile")
    train, test = drum_sounds.load()
    assert (len(train), len(test)) == (79, 26)
    assert train.classes == ("clap", "hi-hat", "kick", "snare")
    digests = [*train.verify(), *test.verify()]
    assert len(set(digests)) == len(digests)
    assert np.bincount(test.labels).tolist() == [4, 8, 6, 8]
    lengths = [train.format(row).frames / train.format(row).rate for row in range(len(train))]
    assert np.median(lengths) < 1


def test_a_pronunciation_has_letters_and_phonemes_that_the_packaged_model_knows() -> None:
    train, test = pronunciations.load()
    assert (len(train), len(test)) == (20_000, 1_000)
    for part in (train, test):
        for row in map(part.row, range(len(part))):
            assert re.fullmatch(r"[a-z]( [a-z]){2,9}", row["letters"])
            assert set(row["letters"].split()) | set(row["phonemes"].split()) <= set(t5_letters.TOKENS)
    assert not set(train.columns["letters"]) & set(test.columns["letters"])


@pytest.mark.parametrize(
    ("load", "source", "wanted"),
    [
        (load_audio, "pkg:mnist-5k", "holds images, not recordings: set task.kind = 'image-classification'"),
        (load_images, "pkg:bbc-news", "holds texts, not images: set task.kind = 'text-classification' or"),
        (
            load_images,
            "pkg:mnist-mosaics",
            "any number of labels .digits.; set task.kind = 'multi-label-image'",
        ),
    ],
    ids=["images", "texts", "several"],
)
def test_packaged_rows_of_another_form_are_refused_with_their_task(
    load: object, source: str, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load(DataSettings(source=source), 0)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("column", "columns", "wanted"),
    [
        ("label", None, r"data\.label_column = 'label': .* set data\.label_column to digits"),
        ("label", ("0", "1"), r"task\.label_columns: .* set data\.label_column to digits"),
    ],
    ids=["column", "columns"],
)
def test_labels_of_packaged_images_are_a_column_of_lists(
    column: str, columns: tuple[str, ...] | None, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_images(DataSettings(source="pkg:mnist-mosaics"), 0, label_sets=LabelSets(column, columns))


def test_packaged_images_are_no_texts() -> None:
    with pytest.raises(ConfigError, match="holds images, not texts"):
        load_texts(DataSettings(source="pkg:mnist-5k"), 0, {"text": "task.prompt"}, None)
