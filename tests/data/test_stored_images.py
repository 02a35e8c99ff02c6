import io
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fedsmoothlora.data.images import ImageExamples
from fedsmoothlora.data.raw import LabelledImages, RawImages
from fedsmoothlora.data.stored_images import StoredImages
from tests.pixels import processor


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stored(*contents: bytes | str | None, folder: Path = Path()) -> StoredImages:
    # As a table has them: bytes, a path, or nothing.
    values = [None if one is None else {"bytes": one, "path": None} for one in contents]
    values = [{"bytes": None, "path": one} if isinstance(one, str) else value
              for one, value in zip(contents, values, strict=True)]  # fmt: skip
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return StoredImages(
        datasets.Dataset.from_dict({"image": values}, features=features),
        folder,
        np.arange(len(contents), dtype=np.int64) % 2,
        ("a", "b"),
        tuple(f"a.csv: row {row + 1}" for row in range(len(contents))),
        "picture",
    )


def noise(height: int, width: int, *rest: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, *rest), dtype=np.uint8)


def pixels(content: bytes, size: int) -> np.ndarray:
    """``(size, size, 3)``"""
    return stored(content).processed([0], processor(size))[0].permute(1, 2, 0).numpy()


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    image = noise(5, 5, 3)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(image)), 5), image)


def test_a_jpeg_is_rotated_by_its_exif_orientation() -> None:
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 8))  # the top half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: what was on top is then at the right
    found = pixels(encoded(image, "JPEG", exif=exif, quality=95), 16)
    assert found[:, 9:].min() > 200
    assert found[:, :7].max() < 50


def test_transparent_pixels_are_blended_with_white() -> None:
    image = np.zeros((2, 2, 4), dtype=np.uint8)
    image[..., 0] = 200
    image[..., 3] = [[255, 0], [128, 255]]
    found = pixels(encoded(Image.fromarray(image)), 2)
    np.testing.assert_allclose(found[0, 0], [200, 0, 0])
    np.testing.assert_allclose(found[0, 1], [255, 255, 255])
    np.testing.assert_allclose(found[1, 0], [227, 127, 127], atol=1)


def test_palette_images_become_rgb_with_white_for_transparent() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image = image.resize((2, 2), Image.Resampling.NEAREST)
    assert pixels(encoded(image), 2).tolist() == [[[255, 0, 0], [0, 0, 255]]] * 2
    assert pixels(encoded(image, transparency=1), 2).tolist() == [[[255, 0, 0], [255, 255, 255]]] * 2


def test_16_bits_a_pixel_are_scaled_to_8() -> None:
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    found = pixels(encoded(Image.fromarray(levels)), 2)
    assert found[..., 0].tolist() == [[0, 100], [200, 255]]
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_image_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert pixels(encoded(image, kind), 8).min() >= 250


@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (8, 20)])
def test_the_shorter_side_is_resized_and_the_middle_kept(shape: tuple[int, int]) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = Image.fromarray((127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 7)).astype(np.uint8)).convert("RGB")
    size, scale = 20, 20 / min(shape)
    whole = image.resize((round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    wanted = np.asarray(whole.crop((left, top, left + size, top + size))).astype(int)
    # Half a pixel of the crop is lost to rounding there.
    assert np.abs(pixels(encoded(image), size) - wanted).mean() < 4


def test_paths_are_relative_to_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = noise(4, 4, 3)
    (tmp_path / "in" / "x.png").write_bytes(encoded(Image.fromarray(image)))
    for path in ("in/x.png", str(tmp_path / "in" / "x.png")):
        found = stored(path, folder=tmp_path).processed([0], processor(4))[0]
        np.testing.assert_array_equal(found.permute(1, 2, 0), image)


def sets() -> list[LabelledImages]:
    contents = [encoded(Image.fromarray(noise(10 + i, 12, 3))) for i in range(7)]
    labels = np.arange(7, dtype=np.int64) % 2
    return [
        stored(*contents),
        RawImages(np.stack([noise(9, 9) + np.uint8(i) for i in range(7)]), labels, ("a", "b")),
        RawImages(np.stack([noise(9, 9, 3) + np.uint8(i) for i in range(7)]), labels, ("a", "b")),
    ]


@pytest.mark.parametrize("images", sets())
def test_pixels_kept_in_memory_equal_those_read_for_each_batch(images: LabelledImages) -> None:
    need = 7 * images.channels * 8 * 8
    kept, lazy = (ImageExamples(images, processor(8), memory=memory) for memory in (need, need - 1))
    for rows in ([3, 0, 3], [6], range(7)):
        first, second = kept.batch(rows), lazy.batch(rows)
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert torch.equal(first["labels"], second["labels"])


@pytest.mark.parametrize("images", sets())
def test_take_returns_the_given_rows(images: LabelledImages) -> None:
    rows = np.array([5, 1, 2])
    taken = images.take(rows)
    assert len(taken) == 3
    assert taken.labels.tolist() == images.labels[rows].tolist()
    assert torch.equal(taken.processed([0, 2], processor(8)), images.processed([5, 2], processor(8)))


def test_images_are_decoded_once_if_they_fit_in_memory_else_for_each_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, decoded = sets()[0], []
    real = StoredImages._content

    def counted(self: StoredImages, row: int) -> bytes:
        decoded.append(row)
        return real(self, row)

    monkeypatch.setattr(StoredImages, "_content", counted)
    kept = ImageExamples(images, processor(8))
    assert decoded == list(range(7))
    kept.batch([1, 2])
    assert len(decoded) == 7
    decoded.clear()
    lazy = ImageExamples(images, processor(8), memory=0)
    assert decoded == []
    lazy.batch([4, 2])
    assert decoded == [4, 2]


PNG, JPEG = (encoded(Image.fromarray(noise(40, 40, 3)), kind) for kind in ("PNG", "JPEG"))
NO_PIXELS = b"P6\n0 4\n255\n"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (PNG[: len(PNG) // 2], "cannot be read, perhaps it is cut off"),
        (JPEG[: len(JPEG) // 2], "cannot be read, perhaps it is cut off"),
        (JPEG[:-100], "cannot be read, perhaps it is cut off"),
        (b"hello", r"not an image that Pillow can read \(5 bytes\)"),
        (b"", "the image is empty: 0 bytes"),
        (NO_PIXELS, "image"),
        (None, "there is no image; give its path or its bytes"),
        ("missing.png", "there is no file 'missing.png'"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "32 bits a pixel"),
    ],
)
def test_an_image_that_cannot_be_used_is_named_with_file_row_and_column(content, text: str) -> None:
    images = stored(PNG, content)
    with pytest.raises(ValueError, match=rf"^a\.csv: row 2, column 'picture': .*{text}"):
        images.verify()
    with pytest.raises(ValueError, match=rf"^a\.csv: row 2, column 'picture': .*{text}"):
        images.processed([0, 1], processor(8))


def test_a_folder_in_place_of_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"row 1, column 'picture': '.*sub' cannot be read: Is a directory"):
        stored("sub", folder=tmp_path).verify()


def test_the_first_of_many_broken_images_are_listed_and_all_counted() -> None:
    with pytest.raises(ValueError, match=r"^8 of 9 images cannot be used") as caught:
        stored(PNG, *[b"x"] * 8).verify()
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    assert "row 2, column" in lines[1]
    assert lines[-1].strip() == "and 3 more"


def test_good_images_pass_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored(PNG, JPEG).verify()
