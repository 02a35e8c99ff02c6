"""Image folders as users have them: with splits, descriptions, leftovers, and images of all kinds."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsmoothlora.data.leftovers import is_leftover
from fedsmoothlora.data.media_sources import ImageData, load_images
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.split_names import split_of
from fedsmoothlora.data.stored_images import StoredImages


def picture(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 6), level).save(path)
    return path


def folder(root: Path, *names: str, first: int = 0) -> Path:
    """Images of grey levels that count from ``first``."""
    for level, name in enumerate(names, first):
        picture(root / name, level)
    return root


def load(source: Path, **keys: Any) -> ImageData:
    return load_images(DataSettings(source=str(source), **keys), 0)


def levels(images: Any) -> list[int]:
    return [images.image(row).getpixel((0, 0))[0] for row in range(len(images))]


def refused(text: str, source: Path, **keys: Any) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        load(source, **keys)
    assert "\n" not in str(caught.value)


# -- splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "other"),
    [
        ("train", "test", "validation"),
        ("train2017", "test2017", "val2017"),
        ("Training", "Testing", "Dev"),
        ("my-train", "eval_images", "valid.1"),
        ("data/train", "data/test", "data/val"),
    ],
)
@pytest.mark.parametrize("client", ["", "one/"])
def test_folders_of_splits_are_training_and_test_set_and_never_classes(
    tmp_path: Path, train: str, test: str, other: str, client: str
) -> None:
    root = folder(tmp_path / "x", f"{train}/{client}a/1.png", f"{train}/{client}b/1.png")
    folder(root, f"{test}/{client}a/1.png", f"{test}/{client}b/2.png", first=10)
    folder(root, f"{other}/{client}a/1.png", first=20)
    data = load(root)
    assert data.classes == ("a", "b")
    assert levels(data.train) == [0, 1]
    assert levels(data.test) == [10, 11]
    (note,) = data.notes
    assert f"{Path(train).name} is the training set" in note
    assert f"{Path(test).name} is the test set" in note
    assert f"{Path(other).name} is not read" in note


def test_the_configuration_chooses_among_the_splits(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    assert load(root).test is None
    assert levels(load(root, test_split="validation").test) == [2, 3]
    assert levels(load(root, train_split="validation").train) == [2, 3]
    assert levels(load(root, test=str(root / "val")).test) == [2, 3]
    other = folder(tmp_path / "y", "train/a/1.png", "test/b/1.png", first=30)
    assert levels(load(root, test=str(other)).test) == [31]
    refused(
        "no folder of the split 'test' .data.test_split.; there are train, validation",
        root,
        test_split="test",
    )
    refused("no test split; name one of train, validation in data.test", root, test=str(root))


def test_the_test_set_inside_the_source_is_not_trained_on(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "a/1.png", "b/1.png", "held out/a/1.png", "held out/b/1.png")
    assert levels(load(root, test=str(root / "held out")).train) == [0, 1]
    clients = folder(tmp_path / "y", "one/a/1.png", "two/b/1.png", "three/a/1.png")
    data = load(clients, test=str(clients / "three"))
    assert (levels(data.train), levels(data.test)) == ([0, 1], [2])
    splits = folder(tmp_path / "z", "train/a/1.png", "train/b/1.png", "test/a/1.png")
    for test in (splits, splits / "test", tmp_path / "z" / ".." / "z" / "test"):
        data = load(splits, test=str(test))
        assert (levels(data.train), levels(data.test)) == ([0, 1], [2])
    mixed = folder(tmp_path / "w", "a/1.png", "b/1.png", "test/a/1.png")
    refused("test look like splits", mixed)
    assert levels(load(mixed, test=str(mixed / "test")).train) == [0, 1]


def test_a_file_in_training_and_test_set_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "a/1.png", "b/1.png")
    refused(f"^{root}/a/1.png: the file is both a training and a test image", root, test=str(root))
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    refused(f"it is the same file as {root}/a/1.png", root, test=str(linked))
    other = folder(tmp_path / "y", "a/1.png", first=9)
    (other / "a" / "2.png").hardlink_to(root / "b" / "1.png")
    refused(f"^{other}/a/2.png: .*it is the same file as {root}/b/1.png", root, test=str(other))


@pytest.mark.parametrize("name", ["test", "Test", "val2017", "validation", "eval", "testing"])
def test_a_split_beside_class_folders_is_refused(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path / "x", "a/1.png", "b/1.png", f"{name}/1.png")
    refused(f"^{root}: {name} look like splits", root)
    refused("look like splits", folder(tmp_path / "y", f"one/{name}/1.png", "one/b/1.png"))


def test_classes_with_names_like_splits_are_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "train/1.png", "test tube/1.png", "dev board/1.png", "ship/1.png")
    assert load(root).classes == ("dev board", "ship", "test tube", "train")


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    refused("train2014 and train2017 both look like the train split", folder(
        tmp_path / "x", "train2014/a/1.png", "train2017/a/1.png", "val2017/a/1.png"
    ))  # fmt: skip


@given(st.text(st.sampled_from("tesrainvlidg-_. 01X"), max_size=12))
def test_split_names_follow_the_hub(name: str) -> None:
    from datasets import data_files

    splits = data_files.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME
    file = f"{name.lower()}/x.png"
    if not name.strip(" .") or not name.isprintable():
        return
    found = {
        str(split)
        for split, patterns in splits.items()
        if any(_matches(file, pattern) for pattern in patterns)
    }
    assert (split_of(name) in found) if found else (split_of(name) is None)


def _matches(file: str, pattern: str) -> bool:
    import re

    from fsspec.utils import glob_translate

    return re.match(glob_translate(f"/x/{pattern}"), f"/x/{file}") is not None


def test_names_of_splits() -> None:
    names = ["train", "TRAIN", "train2017", "x-val", "dev.1", "test_images", "evaluation", "trains", "latest"]
    assert [split_of(name) for name in names] == [
        "train", "train", "train", "validation", "validation", "test", "test", None, None,
    ]  # fmt: skip


# -- other files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "classes.json", "a/metadata.csv"])
def test_descriptions_in_an_image_folder_are_not_its_tables(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path / "x", "a/1.png", "b/1.png")
    (root / name).write_text('{"file_name": "a/1.png"}\n' if name.endswith("l") else "[1, 2]\n")
    data = load(root)
    assert (data.classes, levels(data.train)) == (("a", "b"), [0, 1])
    assert "1 file is of unknown type" in data.notes[0]


def test_a_metadata_file_names_the_images_of_a_flat_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "1.png", "2.png")
    (root / "metadata.csv").write_text("file_name,label\n2.png,dog\n1.png,cat\n")
    data = load(root)
    assert (levels(data.train), data.train.labels.tolist(), data.classes) == ([1, 0], [1, 0], ("cat", "dog"))
    (root / "metadata.csv").write_text("file_name,kind\n2.png,dog\n1.png,cat\n")
    assert load(root, label_column="kind").classes == ("cat", "dog")
    refused("there is no column 'label'", root)
    (root / "metadata.csv").write_text("image,label\n2.png,dog\n1.png,cat\n")
    assert levels(load(root).train) == [1, 0]


def test_a_metadata_file_names_images_in_one_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "images/1.png", "images/2.png")
    (root / "metadata.csv").write_text("file_name,label\nimages/2.png,dog\nimages/1.png,cat\n")
    data = load(root)
    assert (levels(data.train), data.classes) == ([1, 0], ("cat", "dog"))
    assert not [note for note in data.notes if "ignored" in note]


def test_images_beside_the_table_that_names_them_are_not_called_ignored(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "1.png", "2.png")
    (root / "readme.rst").write_text("not read")
    (root / "metadata.csv").write_text("file_name,label\n2.png,dog\n1.png,cat\n")
    (note,) = [note for note in load(root).notes if "ignored" in note]
    assert "1 file is of unknown type" in note
    assert "readme.rst" in note


def test_files_left_by_file_servers_are_ignored(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "x", "a/1.png", "b/1.png", "@eaDir/1.png/SYNO_THUMB.png", "a/@eaDir/1.png", "a/._1.png",
        "#recycle/c/1.png", "__MACOSX/a/1.png", "lost+found/1.png", "$RECYCLE.BIN/1.png",
    )  # fmt: skip
    data = load(root)
    assert (data.classes, levels(data.train), data.notes) == (("a", "b"), [0, 1], [])
    assert not any(map(is_leftover, (Path("eaDir"), Path("recycle"), Path("a.png"))))


def test_the_order_of_rows_is_that_of_the_librarys_image_folders(tmp_path: Path) -> None:
    names = ["b/1.png", "b/10.png", "b/2.png", "b/A.PNG", "a-b/x y.png", "a/[1].png", "a/é.jpg", "B/z.png"]
    root = folder(tmp_path / "x", *names)
    library = datasets.load_dataset(
        "imagefolder",
        data_files={"train": [f"{root}/*/*"]},
        split="train",
        cache_dir=str(tmp_path / "cache"),
    ).cast_column("image", datasets.Image(decode=False))
    assert isinstance((train := load(root).train), StoredImages)
    assert list(train.places) == [row["image"]["path"] for row in library]


def test_replaced_images_of_the_same_names_and_times_are_read_again(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "a/1.png", "b/1.png")
    load(root)
    folder(root, "a/1.png", "b/1.png", first=100)
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert levels(load(root).train) == [100, 101]


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "kernel", "broken link"])
def test_a_file_that_is_not_regular_is_refused_without_opening_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "x", "a/1.png", "b/1.png")
    monkeypatch.chdir(root / "a")  # the names of sockets are short
    special = Path("2.png")
    if kind == "fifo":
        os.mkfifo(special)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("2.png")
    else:
        special.symlink_to({"device": "/dev/zero", "kernel": "/proc/version"}.get(kind, "nowhere"))
    text = {"broken link": "there is no file", "kernel": "is a file of the kernel"}.get(
        kind, "is a device, FIFO or socket; should be a file"
    )
    refused(f"^{root}/a/2.png: cannot be read as an image: .*{text}", root)
    table = tmp_path / "x" / "t.csv"
    table.write_text("image,label\nb/1.png,b\na/2.png,a\n")
    refused(f"t.csv: row 2 .*{text}", table)
    refused(f"t.csv: row 2 .*{text}", table, max_value=255)


# -- equal images ------------------------------------------------------------------------------------


def test_test_images_among_the_training_images_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "train/a/1.png", "train/b/1.png", "test/a/3.png")
    (root / "test" / "b").mkdir()
    (root / "test" / "b" / "same bytes.png").write_bytes((root / "train" / "b" / "1.png").read_bytes())
    Image.open(root / "train" / "a" / "1.png").convert("RGB").save(root / "test" / "a" / "same pixels.bmp")
    note = load(root).notes[-1]
    assert "2 of 3 test rows are also training rows" in note
    assert f"{root}/test/a/same pixels.bmp equals {root}/train/a/1.png" in note
    assert "also training rows" not in " ".join(load(root, verify=False).notes)


def test_equal_images_of_two_classes_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "a/1.png", "b/1.png", "c/1.png")
    picture(root / "c" / "2.png", 1)
    (note,) = load(root).notes
    assert "1 input has different labels" in note
    assert f"{root}/b/1.png has 'b', {root}/c/2.png has 'c'" in note


def test_classes_that_differ_only_in_case_are_noted(tmp_path: Path) -> None:
    (note,) = load(folder(tmp_path / "x", "pos/1.png", "Pos/1.png", "neg/1.png")).notes
    assert "differ only in case or spaces: 'Pos' and 'pos'" in note


# -- more than 8 bits --------------------------------------------------------------------------------


def deep(path: Path, *values: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([values, values], dtype=np.uint16)).save(path)
    return path


def deep_folder(root: Path, highest: int) -> Path:
    deep(root / "a" / "1.png", 0, highest // 2)
    deep(root / "b" / "1.tiff", highest // 3, highest)
    return root


@pytest.mark.parametrize(
    ("highest", "range"), [(200, 255), (255, 255), (256, 4095), (4095, 4095), (4096, 65535), (65535, 65535)]
)
def test_the_range_of_the_training_images_scales_all_images(tmp_path: Path, highest: int, range: int) -> None:
    root = deep_folder(tmp_path / "x", highest)
    deep(tmp_path / "test" / "a" / "1.png", 0, highest // 4)
    data = load(root, test=str(tmp_path / "test"))
    assert data.max_value == range
    assert f"scaled from 0 ... {range} (data.max_value)" in data.notes[0]
    for images, row, value in (
        (data.train, 0, highest // 2),
        (data.train, 1, highest),
        (data.test, 0, highest // 4),
    ):
        assert images.image(row).getpixel((1, 0)) == (round(value * 255 / range),) * 3
    assert load(root, verify=False).max_value == range


def test_the_configuration_sets_the_range(tmp_path: Path) -> None:
    root = deep_folder(tmp_path / "x", 1000)
    data = load(root, max_value=2000)
    assert (data.max_value, data.notes) == (None, [])
    assert data.train.image(1).getpixel((1, 0)) == (128,) * 3
    refused(
        r"^.*/b/1.tiff: a pixel has the value 1000, .* from 0 ... 900; set data.max_value",
        root,
        max_value=900,
    )


def test_a_test_image_above_the_range_is_refused(tmp_path: Path) -> None:
    deep(tmp_path / "test" / "a" / "1.png", 0, 5000)
    refused(
        "test/a/1.png: a pixel has the value 5000",
        deep_folder(tmp_path / "x", 4000),
        test=str(tmp_path / "test"),
    )


def test_images_of_8_bits_have_no_range(tmp_path: Path) -> None:
    data = load(folder(tmp_path / "x", "a/1.png", "b/1.png"))
    assert (data.max_value, data.notes) == (None, [])


def png_of_16_bits(path: Path, colours: int, value: int) -> None:
    """A PNG of 16 bits a channel, which Pillow cannot write in colour."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colours]
    row = b"\0" + struct.pack(">H", value) * 4 * channels

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, colours, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row * 4))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("colours", [2, 4, 6])
def test_colour_images_of_16_bits_are_right_or_refused(tmp_path: Path, colours: int) -> None:
    root = folder(tmp_path / "x", "a/1.png")
    png_of_16_bits(root / "b" / "1.png", colours, 4000)
    refused("b/1.png: a colour image of 16 bits a channel", root)
    png_of_16_bits(root / "b" / "1.png", colours, 65535)
    data = load(root)
    assert data.max_value == 65535
    assert data.train.image(1).getpixel((0, 0)) == (255, 255, 255)


# -- kinds of image ----------------------------------------------------------------------------------


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "a/1.png")
    (root / "b").mkdir()
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    frames[0].save(root / "b" / "1.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(load(root).train.image(1).getpixel((0, 0)), (255, 0, 0), atol=1)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "YCbCr")])
def test_other_colours_become_rgb(tmp_path: Path, kind: str, mode: str) -> None:
    root = folder(tmp_path / "x", "a/1.png")
    (root / "b").mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).convert(mode).save(root / "b" / "1.tif", kind)
    np.testing.assert_allclose(load(root).train.image(1).getpixel((8, 8)), (200, 30, 30), atol=4)
