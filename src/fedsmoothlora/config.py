"""Configurations: TOML files and recipes, read into typed settings and refused where they cannot be right."""

from __future__ import annotations

import difflib
import math
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
from annotated_types import Ge, Gt
from pydantic import TypeAdapter, ValidationError

from fedsmoothlora import methods
from fedsmoothlora.adapters import LoraSettings
from fedsmoothlora.data.sources import DataSettings
from fedsmoothlora.engines.flower.settings import FlowerSettings
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.kinds import DEFAULTS, TaskSettings
from fedsmoothlora.models import ModelSettings
from fedsmoothlora.participation import ParticipationSettings
from fedsmoothlora.server_optimizers import ServerSettings
from fedsmoothlora.state import CheckpointSettings
from fedsmoothlora.tracking import TrackingSettings
from fedsmoothlora.training import TrainingSettings
from fedsmoothlora.transport import TransportSettings
from fedsmoothlora.uploads import UploadSettings

Settings = TypeVar("Settings")

# A bound that may be switched off.
_MAY_BE_INFINITE = ("uploads.max_norm_factor",)

# Of these, an override of one takes the place of the other.
_ALTERNATIVES = (("training.epochs", "training.steps"), ("participation.clients", "participation.fraction"))

# Keys and sections that may change between a run and its resumption.
_NO_MATHEMATICS = ("name", "description", "checkpoint", "tracking", "flower", "machine.jobs")


# By kind: its keys, and whether they must be given.
_PARTITION_KEYS: dict[str, dict[str, bool]] = {
    "iid": {"clients": True},
    "dirichlet": {"alpha": True, "clients": True, "min_size": False},
    "shards": {"clients": True, "shards_per_client": False},
    "pathological": {"clients": True, "classes_per_client": True},
    "sizes": {"clients": True, "power": False, "min_size": False},
    "by_column": {"column": True},
    "by_file": {},
}


@dataclass(frozen=True, kw_only=True)
class PartitionSettings:
    """The keys of ``[partition]``.

    Attributes:
        kind: how rows are dealt; see `fedsmoothlora list partitions`.
        clients: how many (not ``by_column`` and ``by_file``, where the data says it).
        alpha: concentration of ``dirichlet``; 0.1 is very uneven, 10 nearly even.
        min_size: the fewest rows a client may get (``dirichlet``, ``sizes``); 1 unless set.
        shards_per_client: of ``shards``; 2 unless set.
        classes_per_client: of ``pathological``.
        power: exponent of ``sizes``; 1 unless set.
        column: whose values are the clients of ``by_column``.
    """

    kind: Literal["iid", "dirichlet", "shards", "pathological", "sizes", "by_column", "by_file"] = "iid"
    clients: Annotated[int, Ge(1)] | None = None
    alpha: Annotated[float, Gt(0)] | None = None
    min_size: Annotated[int, Ge(1)] | None = None
    shards_per_client: Annotated[int, Ge(1)] | None = None
    classes_per_client: Annotated[int, Ge(1)] | None = None
    power: Annotated[float, Gt(0)] | None = None
    column: str | None = None

    def options(self) -> dict[str, Any]:
        """The keys that are set, without the kind."""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "kind"}
        return {name: value for name, value in values.items() if value is not None}

    def check(self) -> None:
        """Raise ``ConfigError`` for a key that this kind lacks or has no use for."""
        belongs = _PARTITION_KEYS[self.kind]
        for key, value in self.options().items():
            if key not in belongs:
                kinds = " or ".join(repr(kind) for kind, keys in _PARTITION_KEYS.items() if key in keys)
                raise ConfigError(f"{key} = {value!r} belongs to partition.kind = {kinds}, not {self.kind!r}")
        for key, needed in belongs.items():
            if needed and getattr(self, key) is None:
                raise ConfigError(f"{key} is missing: partition.kind = {self.kind!r} needs it")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The keys of ``[evaluation]``.

    Attributes:
        batch_size: rows at once; fixed by the configuration, since it changes the last bits of a metric.
        clients: also evaluate each client's own model on its validation rows, right after its training.
        test: measure on the test set; without it, figures are means over the clients' validation rows, as
            where there is no test set. `fedsmoothlora tune` chooses that way.
        diagnostics: record figures that explain a run beside those that measure it.
    """

    batch_size: Annotated[int, Ge(1)] = 256
    clients: bool = False
    test: bool = True
    diagnostics: bool = False


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """The keys of ``[machine]``.

    Attributes:
        threads: threads of torch's operations; fixed, since it changes the last bits of a sum.
        jobs: clients that train at once, each in a process of its own with ``threads`` threads; changes no
            result. On processors, and on Linux.
        device: ``auto`` takes a GPU where there is one.
    """

    threads: Annotated[int, Ge(1)] = 2
    jobs: Annotated[int, Ge(1)] = 1
    device: Literal["auto", "cpu"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: everything that decides its result.

    Attributes:
        name: of the run.
        description: one sentence for people.
        seed: of everything that is drawn.
        model: ``[model]``.
        lora: ``[lora]``.
        data: ``[data]``.
        task: ``[task]``.
        partition: ``[partition]``.
        method: ``[method]``: ``name``, and that method's own options.
        training: ``[training]``.
        server: ``[server]``.
        participation: ``[participation]``.
        transport: ``[transport]``.
        uploads: ``[uploads]``.
        evaluation: ``[evaluation]``.
        checkpoint: ``[checkpoint]``.
        tracking: ``[tracking]``.
        flower: ``[flower]``.
        machine: ``[machine]``.
    """

    name: str
    model: ModelSettings
    data: DataSettings
    description: str = ""
    seed: Annotated[int, Ge(0)] = 0
    task: TaskSettings = field(default_factory=TaskSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    partition: PartitionSettings = field(default_factory=lambda: PartitionSettings(clients=5))
    method: methods.Method = field(default_factory=lambda: _method({"name": "fedsmoothlora"}, "method"))
    training: TrainingSettings = field(default_factory=TrainingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    participation: ParticipationSettings = field(default_factory=ParticipationSettings)
    transport: TransportSettings = field(default_factory=TransportSettings)
    uploads: UploadSettings = field(default_factory=UploadSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    flower: FlowerSettings = field(default_factory=FlowerSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)


def to_toml(settings: Any) -> str:
    """Settings as TOML, every default written out; `read` takes a configuration's back."""
    table: dict[str, Any] = {}
    for part in fields(settings):
        value = getattr(settings, part.name)
        if isinstance(value, methods.Method):
            table[part.name] = {"name": value.name, **_table(value.options)}
        else:
            table[part.name] = _table(value) if is_dataclass(value) else value
    # Plain keys first: in TOML they would belong to the last section otherwise.
    return tomli_w.dumps(dict(sorted(table.items(), key=lambda item: isinstance(item[1], dict))))


def first_difference(mine: str, theirs: str, ignoring: Sequence[str] = ()) -> str | None:
    """The first key in which two settings, as TOML, differ so that results would; None if in none.

    Dotted keys of ``ignoring`` may differ too.
    """
    one, other = (flat(tomllib.loads(text)) for text in (mine, theirs))
    free = (*_NO_MATHEMATICS, *ignoring)
    keys = [key for key in sorted(one.keys() | other.keys()) if not _within(key, free)]
    return next((key for key in keys if one.get(key) != other.get(key)), None)


def _within(key: str, parts: Sequence[str]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def partition_kinds() -> tuple[str, ...]:
    """The kinds of partition that ``partition.kind`` takes."""
    return get_args(get_type_hints(PartitionSettings)["kind"])


def recipes() -> dict[str, str]:
    """The recipes that the package ships, name to description."""
    found = {}
    for file in sorted(resources.files(f"{__package__}.recipes").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            table = tomllib.loads(file.read_text(encoding="utf-8"))
            found[file.name.removesuffix(".toml")] = str(table["description"])
    return found


def read(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration.

    Args:
        config: a TOML file, a recipe's name, or a table.
        overrides: values to put in place of its own, by dotted key: ``{"training.rounds": 3}``. Another
            ``method.name`` starts from that method's defaults, another ``partition.kind`` keeps of the old
            keys those that it has too.

    Raises:
        ConfigError: it cannot be read, or a key or a value in it cannot be right.
    """
    origin, table = _load(config)
    overrides = dict(overrides or {})
    if "method.name" in overrides:
        # Another method has other options: its own defaults, not what the file sets for the first one.
        name = overrides.pop("method.name")
        if not isinstance(table.get("method"), dict) or table["method"].get("name") != name:
            table["method"] = {"name": name}
    if "partition.kind" in overrides and isinstance(table.get("partition"), dict):
        wanted = _PARTITION_KEYS.get(overrides["partition.kind"], {})
        table["partition"] = {key: value for key, value in table["partition"].items() if key in wanted}
    for key, value in overrides.items():
        _override(table, key, value)
        for one, other in (*_ALTERNATIVES, *(pair[::-1] for pair in _ALTERNATIVES)):
            if key == one and other not in overrides:
                section, _, name = other.partition(".")
                table[section].pop(name, None)
    _fill_in(table)
    checked = from_table(Config, table, origin)
    if checked.lora.head_r is not None and checked.model.head == "full":
        raise ConfigError(
            f"{origin}: lora.head_r = {checked.lora.head_r} belongs to model.head = 'lora'; a head that is "
            "trained whole has no LoRA"
        )
    if not checked.lora.target_modules and checked.model.head != "full":
        raise ConfigError(
            f"{origin}: lora.target_modules is empty and model.head = 'lora': nothing would be trained; "
            "name layers to adapt, or set model.head = 'full'"
        )
    return checked


def _fill_in(table: dict[str, Any]) -> None:
    """What a kind of task means by a configuration that says nothing; whatever it says stands."""
    task = table.get("task")
    kind = task.get("kind") if isinstance(task, dict) else None
    for dotted, value in DEFAULTS.get(kind if isinstance(kind, str) else "", {}).items():
        name, _, key = dotted.partition(".")
        section = table.setdefault(name, {})
        if isinstance(section, dict):
            section.setdefault(key, value)


def from_table(kind: type[Settings], table: Mapping[str, Any], origin: str) -> Settings:
    """A table as settings of ``kind``: every key known, every value of its type, all of them together right.

    Raises ``ConfigError`` that names ``origin``, the key, the value and what would be right.
    """
    checked = _typed(kind, table, origin)
    assert isinstance(checked, kind)
    _check_together(checked, origin)
    return checked


def parse_override(text: str) -> tuple[str, Any]:
    """``training.rounds=20`` as key and value; the value is TOML, or a bare word for a string.

    Raises ``ConfigError`` if there is no ``=``.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {text!r}: write KEY=VALUE, for instance training.rounds=20")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _load(config: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where the configuration came from, and its table."""
    if isinstance(config, Mapping):
        return "configuration", _copy(config)
    path = Path(config)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        origin = str(path)
    else:
        known = recipes()
        if str(config) not in known:
            close = difflib.get_close_matches(str(config), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ConfigError(
                f"{str(config)!r} is neither a TOML file nor a recipe{hint} Recipes: {', '.join(known)}"
            )
        text = resources.files(f"{__package__}.recipes").joinpath(f"{config}.toml").read_text("utf-8")
        origin = f"recipe {config}"
    try:
        return origin, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None


def _override(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {section} is a value, not a section")
    table[last] = value


def _typed(kind: type, table: Any, origin: str, path: str = "") -> Any:
    """``table`` as the dataclass ``kind``; every key is known and every value has the right type."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{origin}: {path} = {table!r} must be a section, [{path}]")
    hints = get_type_hints(kind, include_extras=True)
    known = {part.name for part in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        dotted = f"{path}.{key}" if path else key
        if key not in known:
            raise ConfigError(f"{origin}: {_unknown(dotted, key, sorted(known))}")
        if hints[key] is methods.Method:
            values[key] = _method(value, dotted, origin)
        elif is_dataclass(hints[key]):
            values[key] = _typed(hints[key], value, origin, dotted)
        else:
            values[key] = _value(hints[key], value, origin, dotted)
    for part in fields(kind):
        if part.name not in values and _is_required(part):
            dotted = f"{path}.{part.name}" if path else part.name
            raise ConfigError(f"{origin}: {dotted} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, origin: str, dotted: str) -> Any:
    try:
        # Lax for sequences only: TOML has arrays, settings have tuples.
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(value, int) and not isinstance(value, bool) and float in _kinds(hint):
            value = float(value)
        checked = TypeAdapter(hint).validate_python(value, strict=True)
        if isinstance(checked, float) and not math.isfinite(checked) and dotted not in _MAY_BE_INFINITE:
            raise ConfigError(f"{origin}: {dotted} = {value!r}: input should be a finite number")
        return checked
    except ValidationError as error:
        reasons = {_reason(detail) for detail in error.errors() if detail["type"] != "none_required"}
        raise ConfigError(f"{origin}: {dotted} = {value!r}: {'; '.join(sorted(reasons))}") from None


def _reason(detail: Any) -> str:
    message = str(detail["msg"])
    return message[0].lower() + message[1:]


def _kinds(hint: Any) -> Iterator[Any]:
    """The plain types that an annotation is made of."""
    if get_origin(hint) is Annotated:
        yield from _kinds(get_args(hint)[0])
    elif get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _kinds(part)
    else:
        yield hint


def _method(table: Any, dotted: str, origin: str = "configuration") -> methods.Method:
    """``[method]``: the name decides which other keys there are."""
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise ConfigError(f"{origin}: [{dotted}] needs name, one of {', '.join(methods.names())}")
    try:
        module = methods.module_of(table["name"])
    except ValueError as error:
        raise ConfigError(f"{origin}: {dotted}.name: {error}") from None
    options = {key: value for key, value in table.items() if key != "name"}
    return methods.Method(table["name"], module, _typed(module.Options, options, origin, dotted))


def _unknown(dotted: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    there = f"The keys there are {', '.join(known)}" if known else "There are no keys there"
    return f"{dotted}: unknown key{hint} {there}"


def _is_required(part: Any) -> bool:
    return part.default is MISSING and part.default_factory is MISSING


def _table(value: Any) -> dict[str, Any]:
    """A settings object as a TOML table; keys that are not set are left out."""
    found = {part.name: getattr(value, part.name) for part in fields(value)}
    return {
        name: list(one) if isinstance(one, tuple) else one for name, one in found.items() if one is not None
    }


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def _check_together(settings: Any, origin: str) -> None:
    """What no single value shows."""

    def refuse(text: str) -> None:
        raise ConfigError(f"{origin}: {text}")

    training: TrainingSettings = settings.training
    if training.epochs is not None and training.steps is not None:
        refuse(f"training.epochs = {training.epochs} and training.steps = {training.steps}: give one of them")
    if training.accumulation > training.batch_size:
        refuse(
            f"training.accumulation = {training.accumulation} parts of training.batch_size = "
            f"{training.batch_size} rows: a part needs a row"
        )
    if training.momentum is not None and training.optimizer != "sgd":
        refuse(f"training.momentum = {training.momentum} belongs to training.optimizer = 'sgd'")
    if training.lr_min > training.lr:
        refuse(f"training.lr_min = {training.lr_min} is above training.lr = {training.lr}")
    _check_optimizers(settings, refuse)
    if settings.transport.dtype != "float32" and not settings.lora.target_modules:
        refuse(
            f"transport.dtype = {settings.transport.dtype!r} codes LoRA factors, and there are none: "
            "lora.target_modules is empty; leave it at 'float32'"
        )
    participation: ParticipationSettings = settings.participation
    if participation.clients is not None and participation.fraction is not None:
        refuse(
            f"participation.clients = {participation.clients} and "
            f"participation.fraction = {participation.fraction}: give one of them"
        )
    if isinstance(settings, Config):
        if (key := settings.model.untouched_by) and settings.method.sends(0) == "W":
            refuse(
                f"{key} leaves the pretrained weights as they are, and method {settings.method.name!r} "
                "trains them: leave that key out, or take a method that trains LoRA"
            )
        try:
            settings.partition.check()
        except ValueError as error:
            refuse(f"partition.{error}")
        try:
            settings.task.check()
        except ValueError as error:
            refuse(f"task.{error}")
        try:
            settings.flower.check()
        except ValueError as error:
            refuse(str(error))


def _check_optimizers(settings: Any, refuse: Callable[[str], None]) -> None:
    """Federated optimisers, beside the method and the clients' own optimiser."""
    method: methods.Method = settings.method
    training: TrainingSettings = settings.training
    try:
        feedback = bool(getattr(method.options, "server_feedback", False))
        settings.server.check(method.name, method.traits, feedback)
        settings.transport.check(method.name, method.traits)
    except ValueError as error:
        refuse(str(error))
    if not training.scaffold:
        return
    if not method.traits.coordinates_last:
        lasting = methods.with_trait("coordinates_last")
        refuse(
            f"training.scaffold = true does not go with method {method.name!r}: what it trains has another "
            f"meaning in every round, and control variates with it; it goes with {', '.join(lasting)}"
        )
    if training.optimizer != "sgd" or training.momentum != 0 or training.max_grad_norm is not None:
        refuse(
            "training.scaffold = true needs plain SGD, whose steps it reads the gradient from: "
            "training.optimizer = 'sgd', training.momentum = 0 and no training.max_grad_norm"
        )
