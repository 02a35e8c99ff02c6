"""Image classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsmoothlora.tasks.base import ReadRequest, Task

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fedsmoothlora.data.examples import Batch, Examples
    from fedsmoothlora.data.media_sources import ImageData as Images
    from fedsmoothlora.data.raw import LabelledImages
    from fedsmoothlora.modeling.loading import ImageClassifier
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.tasks.metrics import Measurement
    from fedsmoothlora.tasks.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Task):
    """Classify images.

    Attributes:
        kind: ``image-classification``.
    """

    hub_name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    auto_mapping: ClassVar[str] = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "macro_f1", "mcc", "auroc")
    unused_keys: ClassVar[tuple[str, ...]] = (
        *("data.where_column", "data.where_values"),
        "data.audio_column",
    )

    kind: Literal["image-classification"] = "image-classification"

    def read(self, request: ReadRequest) -> ImageData:
        """The data of a run: images with their labels."""
        return ImageData(self, request)

    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> ImageClassifier:
        """The pretrained model with a head for ``classes``."""
        from fedsmoothlora.modeling.loading import load_image_classifier

        return load_image_classifier(model, classes, seed, problem_type=self.problem_type, empty=empty)

    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """Write the checkpoint's own image processor, set to the size of the run."""
        from fedsmoothlora.modeling.loading import image_processor

        image_processor(model).save(folder)


class ImageData:
    """Labelled images as the model's image processor prepares them.

    Raises ``ConfigError`` or ``DataError`` if image size, image processor or data cannot be right.
    """

    def __init__(self, task: ImageClassification, request: ReadRequest) -> None:
        from fedsmoothlora.modeling.loading import image_processor

        self._processor = image_processor(request.model)
        self._task, self._model, self._seed = task, request.model, request.seed
        self.data = self._read(request)

    @cached_property
    def train(self) -> Examples:
        """The training images; processed at the first use."""
        return self.examples(self.data.train)

    @cached_property
    def test(self) -> Examples | None:
        """The test images; processed at the first use."""
        return None if self.data.test is None else self.examples(self.data.test)

    def examples(self, rows: LabelledImages) -> Examples:
        """Images as the model's inputs."""
        from fedsmoothlora.data.images import ImageExamples

        return ImageExamples(rows, self._processor, labels=self._targets(rows))

    def load(self, *, empty: bool = False) -> ImageClassifier:
        """The pretrained model with a head for the classes of the data."""
        return self._task.load_model(self._model, self.data.outputs, self._seed, empty=empty)

    def objective(self, loaded: Any) -> Objective:
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

        labels = self._targets(self.data.train)
        return {
            "pixel_values": torch.empty(rows, 3, *self._processor.size, device="meta"),
            "labels": torch.empty((rows, *labels.shape[1:]), dtype=labels.dtype, device="meta"),
        }

    def _read(self, request: ReadRequest) -> Images:
        """Training and test rows."""
        from fedsmoothlora.data.media_sources import load_images

        return load_images(request.data, request.seed, request.client_column, elsewhere=request.elsewhere)

    def _targets(self, rows: LabelledImages) -> Tensor:
        """The label of every row."""
        import torch

        return torch.from_numpy(rows.labels.copy())
