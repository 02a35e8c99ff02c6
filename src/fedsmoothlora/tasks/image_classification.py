"""Image classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.tasks.base import Task

if TYPE_CHECKING:
    from pathlib import Path

    from fedsmoothlora.data.examples import Batch, Examples
    from fedsmoothlora.data.raw import LabelledImages
    from fedsmoothlora.data.settings import DataSettings
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

    kind: Literal["image-classification"] = "image-classification"

    def read(
        self,
        model: ModelSettings,
        data: DataSettings,
        seed: int,
        client_column: str | None,
        *,
        elsewhere: bool = False,
    ) -> ImageData:
        """The data of a run, images with their labels."""
        return ImageData(self, model, data, seed, client_column, elsewhere=elsewhere)

    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> ImageClassifier:
        """The pretrained model with a head for ``classes``."""
        from fedsmoothlora.modeling.loading import load_image_classifier

        return load_image_classifier(model, classes, seed, empty=empty)

    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """Write the checkpoint's own image processor, set to the size of the run."""
        from fedsmoothlora.modeling.loading import image_processor

        image_processor(model).save(folder)


class ImageData:
    """Labelled images as the model's image processor prepares them.

    Raises ``ConfigError`` or ``DataError`` if image size, image processor or data cannot be right.
    """

    def __init__(
        self,
        task: ImageClassification,
        model: ModelSettings,
        data: DataSettings,
        seed: int,
        client_column: str | None,
        *,
        elsewhere: bool,
    ) -> None:
        from fedsmoothlora.data.sources import load_images
        from fedsmoothlora.data.texts import Texts
        from fedsmoothlora.modeling.loading import image_processor

        self._processor = image_processor(model)
        self._task, self._model, self._seed = task, model, seed
        self.data = load_images(data, seed, client_column, elsewhere=elsewhere)
        if isinstance(self.data.train, Texts):
            raise ConfigError(
                f"data.source = {data.source!r} holds texts: set task.kind = 'text-classification' or "
                "'causal-lm'"
            )

    @cached_property
    def train(self) -> Examples:
        """The training images; processed at the first use."""
        return self._examples(self.data.train)

    @cached_property
    def test(self) -> Examples | None:
        """The test images; processed at the first use."""
        return None if self.data.test is None else self._examples(self.data.test)

    def load(self, *, empty: bool = False) -> ImageClassifier:
        """The pretrained model with a head for the data's classes."""
        return self._task.load_model(self._model, self.data.classes, self._seed, empty=empty)

    def objective(self, loaded: Any) -> Classification:
        """Cross-entropy; accuracy and the like."""
        from fedsmoothlora.tasks.objectives import Classification

        return Classification(loaded.arguments)

    def measurement(self, rows: LabelledImages, batch_size: int) -> Measurement | None:
        """None: all metrics are cheap."""
        return None

    def notes(self) -> list[str]:
        """What was noticed while reading."""
        return self.data.notes

    def facts(self) -> list[str]:
        """Nothing beside numbers of rows and classes."""
        return []

    def widest_batch(self, rows: int) -> Batch:
        """Images of the model's size."""
        import torch

        return {
            "pixel_values": torch.empty(rows, 3, *self._processor.size, device="meta"),
            "labels": torch.empty(rows, dtype=torch.int64, device="meta"),
        }

    def _examples(self, images: LabelledImages) -> Examples:
        from fedsmoothlora.data.images import ImageExamples

        return ImageExamples(images, self._processor)
