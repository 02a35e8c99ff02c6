import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fedsmoothlora.data.media_sources import load_images
from fedsmoothlora.data.packaged import fashion_mnist
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.errors import PackageError

IMAGES = {part: np.random.default_rng(0).integers(0, 256, (rows, 3, 3), dtype=np.uint8)
          for part, rows in [("train", 12), ("t10k", 5)]}  # fmt: skip
LABELS = {"train": [*range(10), 0, 9], "t10k": [9, 0, 3, 3, 1]}


def idx(array: np.ndarray) -> bytes:
    """The IDX format as http://yann.lecun.com/exdb/mnist describes it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(params=[".gz", ""])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for part in ("train", "t10k"):
        files = {
            f"{part}-images-idx3-ubyte": idx(IMAGES[part]),
            f"{part}-labels-idx1-ubyte": idx(np.array(LABELS[part], dtype=np.uint8)),
        }
        for name, content in files.items():
            packed = gzip.compress(content) if request.param else content
            (tmp_path / f"{name}{request.param}").write_bytes(packed)
    return tmp_path


def rewrite(folder: Path, name: str, change) -> None:
    packed = folder / f"{name}.gz"
    if packed.is_file():
        packed.write_bytes(gzip.compress(change(gzip.decompress(packed.read_bytes()))))
    else:
        (folder / name).write_bytes(change((folder / name).read_bytes()))


def test_packed_and_plain_files_are_read_through_the_configuration(folder: Path) -> None:
    data = load_images(DataSettings(source="pkg:fashion-mnist", path=str(folder)), 0)
    for part, images in [("train", data.train), ("t10k", data.test)]:
        np.testing.assert_array_equal(images.pixels, IMAGES[part])
        assert images.labels.tolist() == LABELS[part]
    assert data.classes[9] == "Ankle boot"
    assert len(data.classes) == 10


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda content: b"\0\0\x0d\x03" + content[4:], "begins with the bytes 00000d03; should be 00000803"),
        (lambda content: content[:7], "cut off: it ends within its header, after 7 bytes"),
        (lambda content: content[:-1], "cut off: 123 bytes, should be 124 for 12×3×3"),
        (lambda content: content + b"x", "has bytes after its end: 125 bytes, should be 124"),
        (lambda content: b"", "begins with the bytes ; should be 00000803"),
    ],
)
def test_a_wrong_file_is_named(folder: Path, change, text: str) -> None:
    rewrite(folder, "train-images-idx3-ubyte", change)
    with pytest.raises(PackageError, match=f"train-images-idx3-ubyte.*{text}"):
        fashion_mnist.load(str(folder))


def test_a_gzip_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(idx(IMAGES["train"]))
    for broken in (packed[:-9], b"no gzip", packed[:30] + b"\xff" * 20 + packed[50:]):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(broken)
        with pytest.raises(PackageError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
            fashion_mnist.load(str(tmp_path))


def test_labels_that_are_too_few_or_name_no_class_are_refused(folder: Path) -> None:
    rewrite(folder, "t10k-labels-idx1-ubyte", lambda _: idx(np.array([1, 2, 10, 0, 0], dtype=np.uint8)))
    with pytest.raises(PackageError, match="t10k-labels-idx1-ubyte: row 2 has the label 10"):
        fashion_mnist.load(str(folder))
    rewrite(folder, "t10k-labels-idx1-ubyte", lambda _: idx(np.array([1, 2], dtype=np.uint8)))
    with pytest.raises(PackageError, match="row 2 has no label"):
        fashion_mnist.load(str(folder))


def test_if_the_data_are_missing_the_error_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "FOLDER", tmp_path / "missing")
    how = r"apt-get install dataset-fashion-mnist.*apt-get download.*dpkg -x.*data\.path"
    with pytest.raises(PackageError, match=f"no folder .*missing; .*{how}"):
        fashion_mnist.load()
    with pytest.raises(PackageError, match=f"no file .*train-images-idx3-ubyte.gz.*{how}"):
        fashion_mnist.load(str(tmp_path))
