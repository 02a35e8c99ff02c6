"""Audio classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Gt

from fedsmoothlora.tasks.base import ReadRequest, Task, check_installed

if TYPE_CHECKING:
    from pathlib import Path

    from fedsmoothlora.data.audio import AudioExamples
    from fedsmoothlora.data.examples import Batch
    from fedsmoothlora.data.stored_audio import StoredAudio
    from fedsmoothlora.modeling.audio import AudioClassifier
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.tasks.metrics import Measurement
    from fedsmoothlora.tasks.objectives import RecordingClassification


@dataclass(frozen=True, kw_only=True)
class AudioClassification(Task):
    """Classify recordings.

    Recordings are WAV, FLAC and other files that ``soundfile`` reads, in a folder for each class or in a
    table with a column of paths. Channels are averaged, and other sampling rates than the model's are
    converted.

    Attributes:
        kind: ``audio-classification``.
        max_seconds: longest recording in seconds. A longer recording loses its end; such rows are counted and
            reported.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "lora.target_modules": ["all-linear"],
            "training.batch_size": 8,
            "training.optimizer": "adamw",
            "training.lr": 0.001,
            "evaluation.batch_size": 16,
        }
    )
    hub_name: ClassVar[str] = "audio-classification"
    auto_class: ClassVar[str] = "AutoModelForAudioClassification"
    auto_mapping: ClassVar[str] = "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "macro_f1", "mcc", "auroc")
    unused_keys: ClassVar[tuple[str, ...]] = (
        *("data.where_column", "data.where_values", "data.image_column", "data.max_value"),
        "model.image_size",
    )

    kind: Literal["audio-classification"] = "audio-classification"
    max_seconds: Annotated[float, Gt(0)] = 10.0

    def read(self, request: ReadRequest) -> AudioData:
        """The data of a run: recordings with their classes."""
        check_installed(("soundfile",), f"task.kind = {self.kind!r}", extra="audio")
        return AudioData(self, request)

    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> AudioClassifier:
        """The pretrained model with a head for ``classes``."""
        from fedsmoothlora.modeling.audio import load_audio_classifier

        return load_audio_classifier(model, classes, seed, empty=empty)

    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """Write the checkpoint's own feature extractor."""
        from fedsmoothlora.modeling.audio import load_feature_extractor

        load_feature_extractor(model).save(folder)


class AudioData:
    """Labelled recordings as the model's feature extractor prepares them.

    Raises ``ConfigError`` or ``DataError`` if feature extractor or recordings cannot be used.
    """

    def __init__(self, task: AudioClassification, request: ReadRequest) -> None:
        from fedsmoothlora.data.media_sources import load_audio
        from fedsmoothlora.modeling.audio import load_feature_extractor, shortest_input
        from fedsmoothlora.modeling.loading import model_config

        self._task, self._model, self._seed = task, request.model, request.seed
        self._extractor = load_feature_extractor(request.model)
        self._shortest = shortest_input(model_config(request.model))
        self._longest = max(round(task.max_seconds * self._extractor.rate), self._shortest)
        self.data = load_audio(request.data, request.seed, request.client_column, elsewhere=request.elsewhere)
        self._notes = list(self.data.notes)
        self.train = self._noted(self.data.train, "training")
        self.test = None if self.data.test is None else self._noted(self.data.test, "test")

    def examples(self, rows: StoredAudio) -> AudioExamples:
        """Recordings as the model's inputs."""
        from fedsmoothlora.data.audio import AudioExamples

        return AudioExamples(
            rows,
            rate=self._extractor.rate,
            longest=self._longest,
            shortest=self._shortest,
            name=self._extractor.name,
            extract=self._extractor,
        )

    def load(self, *, empty: bool = False) -> AudioClassifier:
        """The pretrained model with a head for the classes of the data."""
        return self._task.load_model(self._model, self.data.classes, self._seed, empty=empty)

    def objective(self, loaded: Any) -> RecordingClassification:
        """Cross-entropy, with accuracy and other metrics of classification."""
        from fedsmoothlora.tasks.objectives import RecordingClassification

        return RecordingClassification(classes=self.data.classes)

    def measurement(self, rows: StoredAudio, batch_size: int) -> Measurement | None:
        """None: there is no costly metric."""
        return None

    def notes(self) -> list[str]:
        """Notes of the reader, and the numbers of recordings that were resampled or cut."""
        return self._notes

    def facts(self) -> list[str]:
        """The lengths of the training recordings."""
        if not len(self.train):
            return []
        seconds = [samples / self._extractor.rate for samples in self.train.lengths]
        shortest, longest = min(seconds), max(seconds)
        return [f"training recordings: {shortest:.3g} to {longest:.3g} s at {self._extractor.rate} Hz"]

    def widest_batch(self, rows: int) -> Batch:
        """Recordings as long as the longest, or as ``max_seconds`` without rows; without a mask."""
        import numpy as np
        import torch

        longest = max(self.train.lengths, default=self._longest)
        shape = self._extractor(np.zeros(longest, dtype=np.float32)).shape
        return {
            self._extractor.name: torch.empty(rows, *shape, device="meta"),
            "labels": torch.empty(rows, dtype=torch.int64, device="meta"),
        }

    def _noted(self, rows: StoredAudio, what: str) -> AudioExamples:
        """The rows as examples, with notes on them."""
        found = self.examples(rows)
        if found.resampled:
            self._notes.append(
                f"{found.resampled} of {len(found)} {what} recordings have another sampling rate than the "
                f"model's {self._extractor.rate} Hz and are resampled"
            )
        if found.cut:
            self._notes.append(
                f"{found.cut} of {len(found)} {what} recordings are longer than task.max_seconds = "
                f"{self._task.max_seconds:g}: their ends are not read"
            )
        return found
