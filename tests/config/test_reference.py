"""The reference of configuration keys has every key, with the type, default and meaning of the code."""

import tomllib
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Lt

from fedsmoothlora import methods, tasks
from fedsmoothlora.config import flat, read, reference, to_toml
from fedsmoothlora.config.in_words import default_of, meanings, toml, type_of
from fedsmoothlora.config.reference import Key
from fedsmoothlora.data import partitioning
from fedsmoothlora.errors import ConfigError

SECTIONS = reference.sections()


def only_key(dotted: str) -> Key:
    (group,) = reference.find(dotted).groups
    (key,) = group.keys
    return key


def test_every_key_of_a_written_configuration_is_listed() -> None:
    names = {f"{section.name}.{key}".lstrip(".") for section in SECTIONS for key in section.key_names()}
    for recipe in ("quickstart", "smollm2-asdiv", "frozen-features"):
        table = flat(tomllib.loads(to_toml(read(recipe))))
        assert not table.keys() - names


def test_every_key_has_a_meaning() -> None:
    keys = [key for section in SECTIONS for group in section.groups for key in group.keys]
    assert len(keys) > 100
    assert [key.name for key in keys if not key.meaning.endswith(".")] == []


@pytest.mark.parametrize(
    ("section", "key", "found"),
    [("method", "name", methods), ("task", "kind", tasks), ("partition", "kind", partitioning)],
)
def test_every_method_task_and_partition_has_a_group(section: str, key: str, found: object) -> None:
    names = found.names()  # type: ignore[attr-defined]
    conditions = [group.condition for group in reference.find(section).groups[1:]]
    assert conditions == [f'{section}.{key} = "{name}"' for name in names]


def test_a_key_has_its_type_default_and_meaning() -> None:
    key = only_key("training.lr")
    assert (key.type, key.allowed) == ("number", "above 0")
    own = {name: tasks.find(name).defaults.get("training.lr") for name in tasks.names()}
    assert (own["causal-lm"], own["preference"], own["text-classification"]) == (0.0003, 0.00005, 0.001)
    listed = "; ".join(f"{name}: {value}" for name, value in own.items() if value is not None)
    assert key.default == f"0.003 ({listed})"
    assert key.meaning.startswith("learning rate of the first round.")


def test_a_key_that_is_no_field_name_is_found_by_its_name_in_a_configuration() -> None:
    assert only_key("method.start").allowed == '"truncated", "exact"'
    assert not only_key("method.start").meaning.startswith("the key")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trainning", "did you mean training?"),
        ("training.lrr", "did you mean 'lr'?"),
        ("gamma", "did you mean method.gamma?"),
        ("gama", "did you mean method.gamma?"),
        ("nme", "did you mean name?"),
        ("qwertz", "The sections are model, data"),
        ("training.qwertz", "The keys of .training. are rounds"),
        ("", "unknown section"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reference.find(name)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, ("integer", "")),
        (bool, ("boolean", "")),
        (Annotated[int, Ge(1)] | None, ("integer", "at least 1")),
        (Annotated[float, Gt(0), Lt(1)], ("number", "above 0, below 1")),
        (Annotated[float, Interval(ge=0, le=1)], ("number", "at least 0, at most 1")),
        (Literal["a", "b"] | None, ("string", '"a", "b"')),
        (tuple[str, ...], ("list of strings", "")),
        (tuple[Annotated[int, Ge(1)], ...], ("list of integers", "each at least 1")),
        (
            tuple[int, ...] | Literal["all"],
            ("list of integers or string", '"all"'),
        ),
    ],
)
def test_a_type_in_words(hint: object, words: tuple[str, str]) -> None:
    assert type_of(hint) == words


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base.

    Attributes:
        one: the first,
            on two lines: with a colon.
        two: another.

    Raises:
        three: no attribute.
    """

    one: int
    two: str | None = None


@dataclass(frozen=True, kw_only=True)
class Derived(Base):
    """One more.

    Attributes:
        two: changed.
    """

    two: str | None = "x"


def test_meanings_and_defaults_are_those_of_the_class_and_its_bases() -> None:
    assert meanings(Derived) == {"one": "the first, on two lines: with a colon.", "two": "changed."}
    assert [default_of(part) for part in fields(Base)] == ["required", "not set"]
    assert [default_of(part) for part in fields(Derived)] == ["required", '"x"']


@dataclass(frozen=True, kw_only=True)
class Undocumented(methods.Method):
    gamma: float = 1.0
    steps: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    extra: dict[str, int] | None = None
    odd: tuple[bool, ...] = ()


def test_a_method_of_the_users_own_needs_no_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = reference._CHOICES["method"]
    mine = replace(choice, names=lambda: ("mine",), find=lambda name: Undocumented)
    monkeypatch.setitem(reference._CHOICES, "method", mine)
    (group,) = reference.find("method").groups[1:]
    assert [(key.name, key.type, key.default, key.meaning) for key in group.keys] == [
        ("gamma", "number", "1.0", ""),
        ("steps", "list of integers", "[1, 2]", ""),
        ("extra", "value", "not set", ""),
        ("odd", "list of values", "[]", ""),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (("a", "b"), '["a", "b"]'),
        ((), "[]"),
        (0.5, "0.5"),
        ("a\nb", '"a\\nb"'),
        (float("inf"), "inf"),
    ],
)
def test_a_value_as_toml(value: object, text: str) -> None:
    assert toml(value) == text
