"""The interface of a task: its keys in a configuration, and the steps of a run that depend on the task.

Importing this module imports no torch. Files of tasks import libraries inside their functions, so that a
configuration is read without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fedsmoothlora.data.examples import Batch, Examples
    from fedsmoothlora.data.loading import Data
    from fedsmoothlora.data.settings import DataSettings
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.tasks.metrics.base import Measurement
    from fedsmoothlora.tasks.objectives.base import Objective


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """The settings that a task reads the data of a run by.

    Attributes:
        model: ``[model]``.
        data: ``[data]``.
        seed: seed of the run.
        client_column: column that names the client of each row, if there is one.
        elsewhere: whether the training rows are held at sites, so that none are read here.
    """

    model: ModelSettings
    data: DataSettings
    seed: int
    client_column: str | None = None
    elsewhere: bool = False


def check_installed(packages: Sequence[str], key: str, extra: str = "tasks") -> None:
    """Raise ``ConfigError`` if a package is missing; ``key`` is the key or value that needs it.

    ``extra`` is the extra of this package that installs it.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{key} needs the package {missing[0]}, which is not installed: "
            f"pip install 'fedsmoothlora[{extra}]'"
        )


def check_label_columns(label_columns: Sequence[str] | None) -> None:
    """Raise ``ConfigError`` for fewer than two label columns, and for one that is named twice."""
    if label_columns is not None and len(set(label_columns)) != max(len(label_columns), 2):
        raise ConfigError(f"label_columns = {list(label_columns)} should name two or more different columns")


class Loaded(Protocol):
    """A loaded model.

    Attributes:
        model: the model.
        head: names of the head's modules.
        drawn: names of the parameters that are not the checkpoint's.
        notes: facts that users should know before training.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def head(self) -> tuple[str, ...]: ...
    @property
    def drawn(self) -> frozenset[str]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


class TaskData(Protocol):
    """The data of a run as its task uses them, read and checked.

    Attributes:
        data: training and test rows.
        train: the training rows as the model's inputs.
        test: the test rows, if there are any.
    """

    @property
    def data(self) -> Data[Any]: ...
    @property
    def train(self) -> Examples: ...
    @property
    def test(self) -> Examples | None: ...

    def load(self, *, empty: bool = False) -> Loaded:
        """The pretrained model for these data; ``empty``: on the meta device, without weights."""
        ...

    def objective(self, loaded: Any) -> Objective:
        """Loss and evaluation of a model that `load` returned."""
        ...

    def measurement(self, rows: Any, batch_size: int) -> Measurement | None:
        """The costly metric on some of these rows, if one is configured."""
        ...

    def examples(self, rows: Any) -> Examples:
        """Other rows of the same form as the model's inputs, such as changed copies of training rows."""
        ...

    def notes(self) -> list[str]:
        """Warnings for the user before training."""
        ...

    def facts(self) -> list[str]:
        """Further lines about the data that `check` prints."""
        ...

    def widest_batch(self, rows: int) -> Batch:
        """The largest batch of that many rows, on the meta device."""
        ...


@runtime_checkable
class NeedsPretrained(Protocol):
    """Data of a run that need values of the pretrained model, such as `TaskData` with a reference model."""

    def prepare(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> None:
        """Compute the values; called once before round 0, with LoRA disabled.

        Args:
            model: the pretrained model.
            to_device: moves a batch to its device.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task. Its fields are the keys of ``[task]``; a key that is not set is ``None``.

    A subclass in a file of this folder is a task that configurations can name. The name is the only value and
    the default of its field ``kind``. Every other key has a default too.

    Attributes:
        kind: the name of the task.
        defaults: defaults of keys of other sections, by dotted key.
        hub_name: the Hugging Face hub's name of the task.
        auto_class: name of the class of transformers that loads models for the task.
        auto_mapping: name of the table of such models in ``transformers.models.auto.modeling_auto``.
        metrics: names of the metrics that every evaluation may have; the first is the main metric, by which
            `compare` and `tune` decide.
        classifies: whether each row has one class, and the model tells the classes apart.
        weighs_labels: whether ``training.class_weights`` weighs the labels of a task that does not classify
            rows.
        problem_type: ``config.problem_type`` of transformers' sequence classifiers; None for other models.
        unused_keys: dotted keys of other sections that the task gives no use; a report does not list them.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    hub_name: ClassVar[str]
    auto_class: ClassVar[str]
    auto_mapping: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    classifies: ClassVar[bool] = True
    weighs_labels: ClassVar[bool] = False
    problem_type: ClassVar[str | None] = None
    unused_keys: ClassVar[tuple[str, ...]] = ()

    kind: str = ""

    @classmethod
    def summary(cls) -> str:
        """One line about the task: the first of its docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    def check(self) -> None:  # noqa: B027 - refuses nothing
        """Raise ``ConfigError`` for keys that contradict each other; ``task.`` is put before its text."""

    def check_layers(self, layers: Sequence[str], head: Sequence[str]) -> None:  # noqa: B027 - refuses nothing
        """Raise ``ConfigError`` for layers that cannot be adapted.

        Args:
            layers: names of the adapted layers.
            head: names of the head's modules.
        """

    @abstractmethod
    def read(self, request: ReadRequest) -> TaskData:
        """Read and check the data of a run.

        Raises:
            ConfigError: the keys do not fit the model or the data.
            DataError: the data are not valid.
        """

    @abstractmethod
    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> Loaded:
        """The pretrained model, from its settings alone: the data are not read.

        Args:
            model: ``[model]``.
            classes: classes of the data, in the order of their labels; names of the model's outputs for tasks
                whose rows have no class (``Data.label_names``).
            seed: seed of the run, from which weights that the checkpoint lacks are drawn.
            empty: whether to build it on the meta device, without weights.
        """

    @abstractmethod
    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """Write the tokenizer or image processor in transformers' format."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the metrics that a run with these keys may have, depending on its data."""
        # Accuracy is the default of checkpoint.best.
        accuracy = () if "checkpoint.best" in self.defaults else ("accuracy",)
        return tuple(dict.fromkeys((*self.metrics, "loss", *accuracy)))

    @property
    def costly(self) -> tuple[str, ...]:
        """Names of the measured metrics that are too costly for every round (`TaskData.measurement`)."""
        return ()

    @property
    def units_per_row(self) -> int:
        """The most units of a row that metrics are means over, such as tokens; 1 where rows are the units."""
        return 1

    @property
    def why_not_saved(self) -> str | None:
        """The reason why transformers has no class for the trained model; None if it has one."""
        return None

    @property
    def prompt_format(self) -> dict[str, Any] | None:
        """Template of prompts, for `fedsmoothlora.exports.generation.Prompting`; None without prompts."""
        return None

    def prompt_format_of(self, form: str | None) -> dict[str, Any] | None:
        """The template of prompts for rows of a form that was recognised.

        Args:
            form: the form of the rows, if they have one (``form`` of `fedsmoothlora.data.loading.Data`).
        """
        return self.prompt_format
