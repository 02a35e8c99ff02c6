"""Image classification."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.tasks.base import ReadRequest, Task

if TYPE_CHECKING:
    from pathlib import Path

    from fedsmoothlora.data.examples import Batch, Examples
    from fedsmoothlora.data.raw import LabelledImages
    from fedsmoothlora.modeling.loading import ImageClassifier
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.tasks.metrics import Measurement
    from fedsmoothlora.tasks.objectives import Classification


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Task):
    """Classify images.

    Attributes:
        kind: ``image-classification``.
    """

    hub_name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    auto_mapping: ClassVar[str] = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    unused_keys: ClassVar[tuple[str, ...]] = ("data.where_column", "data.where_values")

    kind: Literal["image-classification"] = "image-classification"

    def read(self, request: ReadRequest) -> ImageData:
        """The data of a run: images with their labels."""
        return ImageData(self, request)

    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> ImageClassifier:
        """The pretrained model with a head for ``classes``."""
        from fedsmoothlora.modeling.loading import load_image_classifier

        return load_image_classifier(model, classes, seed, empty=empty)

    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """``AutoImageProcessor.from_pretrained(folder)`` prepares images as the run did."""
        from fedsmoothlora.modeling.loading import image_statistics

        size, statistics = model.image_size, image_statistics(model)
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": size, "width": size},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(statistics.mean),
            "image_std": list(statistics.std),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


class ImageData:
    """Images of one size with a class each.

    Raises ``ConfigError`` or ``DataError`` if image size, data or source are not valid.
    """

    def __init__(self, task: ImageClassification, request: ReadRequest) -> None:
        from fedsmoothlora.data.sources import load_images
        from fedsmoothlora.data.texts import Texts
        from fedsmoothlora.modeling.loading import check_image_size

        model, data = request.model, request.data
        check_image_size(model)
        self._task, self._model, self._seed = task, model, request.seed
        self.data = load_images(data, request.seed, request.client_column, elsewhere=request.elsewhere)
        if isinstance(self.data.train, Texts):
            raise ConfigError(
                f"data.source = {data.source!r} holds texts: set task.kind = 'text-classification' or "
                "'causal-lm'"
            )

    @cached_property
    def train(self) -> Examples:
        """Pixels at the model's size, normalised as in its pretraining; images are resized at first use."""
        return self._examples(self.data.train)

    @cached_property
    def test(self) -> Examples | None:
        """The test images likewise, if there are any."""
        return None if self.data.test is None else self._examples(self.data.test)

    def load(self, *, empty: bool = False) -> ImageClassifier:
        """The pretrained model with a head for the classes of the data."""
        return self._task.load_model(self._model, self.data.classes, self._seed, empty=empty)

    def objective(self, loaded: Any) -> Classification:
        """Cross-entropy, with accuracy and other metrics of classification."""
        from fedsmoothlora.tasks.objectives import Classification

        return Classification(loaded.arguments, classes=self.data.classes)

    def measurement(self, rows: LabelledImages, batch_size: int) -> Measurement | None:
        """None: there is no costly metric."""
        return None

    def notes(self) -> list[str]:
        """Notes of the reader."""
        return self.data.notes

    def facts(self) -> list[str]:
        """None: `check` prints the numbers of rows and classes for every task."""
        return []

    def widest_batch(self, rows: int) -> Batch:
        """Images of the model's size."""
        import torch

        size = self._model.image_size
        return {
            "pixel_values": torch.empty(rows, 3, size, size, device="meta"),
            "labels": torch.empty(rows, dtype=torch.int64, device="meta"),
        }

    def _examples(self, images: LabelledImages) -> Examples:
        from fedsmoothlora.data.images import ImageExamples
        from fedsmoothlora.modeling.loading import image_statistics

        return ImageExamples(images, self._model.image_size, image_statistics(self._model))
