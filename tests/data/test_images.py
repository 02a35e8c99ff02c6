import numpy as np
import pytest
import torch
from PIL import Image

from fedsmoothlora.data.images import ImageExamples
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.modeling.image_processors import ImageProcessor
from tests.pixels import processor


def levels(size: int) -> ImageProcessor:
    """Leaves grey levels as they are."""
    return processor(size, (0.0,) * 3, (1 / 255,) * 3)


def raw(*shape: int) -> RawImages:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, shape, dtype=np.uint8)
    smooth[: shape[0] // 2] = smooth[: shape[0] // 2] // 128 * 255  # hard edges, where bicubic overshoots
    return RawImages(smooth, np.arange(shape[0], dtype=np.int64) % 2, ("a", "b"))


@pytest.mark.parametrize("size", [14, 20, 45, 56])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_resizing_is_pillows_bicubic_within_one_grey_level(size: int, channels: tuple[int, ...]) -> None:
    images = raw(6, 28, 28, *channels)
    got = ImageExamples(images, levels(size)).batch(range(6))["pixel_values"]
    assert got.shape == (6, 3, size, size)
    for row, pixels in enumerate(images.pixels):
        image = Image.fromarray(pixels).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        wanted = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
        assert float((got[row] - wanted).abs().max()) <= 1.01


def test_images_of_the_right_size_are_left_as_they_are() -> None:
    images = raw(4, 28, 28)
    got = ImageExamples(images, levels(28)).batch([2])["pixel_values"]
    wanted = torch.from_numpy(images.pixels[2]).float().expand(1, 3, 28, 28)
    torch.testing.assert_close(got, wanted)


def test_pixels_are_normalised_channel_by_channel() -> None:
    images = raw(4, 28, 28, 3)
    got = ImageExamples(images, processor(28, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))).batch([3, 1])
    wanted = (images.pixels[[3, 1]] / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.3])
    assert got["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(got["pixel_values"], wanted.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert got["labels"].tolist() == [1, 1]


def test_grey_images_are_normalised_as_three_equal_channels() -> None:
    grey = raw(4, 28, 28)
    colour = RawImages(np.repeat(grey.pixels[..., None], 3, axis=3), grey.labels, grey.classes)
    made = processor(20, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    first, second = (ImageExamples(images, made).batch(range(4)) for images in (grey, colour))
    torch.testing.assert_close(first["pixel_values"], second["pixel_values"])
