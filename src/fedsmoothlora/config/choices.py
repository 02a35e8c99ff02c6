"""Sections in which a name determines the other keys: ``[method]``, ``[partition]`` and ``[task]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from fedsmoothlora import methods, tasks
from fedsmoothlora.config.validation import problems, refusal, unknown_key, validate
from fedsmoothlora.data import partitioning
from fedsmoothlora.data.partitioning import Partitioning
from fedsmoothlora.tasks import Task

Chosen = TypeVar("Chosen")


def checked_method(section: Any) -> methods.Method:
    """The method that ``[method]`` names, with its options; or the user's own method, checked.

    Raises pydantic's ``ValidationError``.
    """
    if isinstance(section, methods.Method):
        return _own_method(section)
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise refusal(f"[method] needs name, one of {', '.join(methods.names())}")
    try:
        kind = methods.find(section["name"])
    except ValueError as error:
        raise refusal(f"method.name: {error}") from None
    return _with_options(kind, {key: value for key, value in section.items() if key != "name"})


def _own_method(method: methods.Method) -> methods.Method:
    """The user's own method, with its options checked."""
    try:
        methods.check_own(method)
    except ValueError as error:
        raise refusal(f"method: {error}") from None
    if method.options().get("preset") is not None:
        raise refusal(
            "method.preset fills in keys of a configuration's table; give a table, or set the options "
            "themselves"
        )
    return _with_options(type(method), method.options())


def _with_options(kind: type[methods.Method], options: Mapping[str, Any]) -> methods.Method:
    """A method with its options, by their keys in ``[method]``."""
    names = kind.option_names()
    if unknown := [unknown_key(f"method.{key}", key, sorted(names)) for key in options if key not in names]:
        raise refusal(*unknown)
    table = {names[key]: value for key, value in options.items()}
    try:
        return validate(kind, table)
    except ValidationError as error:
        keys = {name: key for key, name in names.items()}
        raise refusal(*problems(error, kind, table, "method", keys)) from None


@dataclass(frozen=True)
class Choice(Generic[Chosen]):
    """A section whose ``kind`` determines its class, and with it the other keys.

    Attributes:
        section: name of the section.
        default: the kind if the section names none.
        names: returns all kinds.
        find: returns the class of a kind, a dataclass of its keys; raises ``ConfigError`` if it is unknown.
    """

    section: str
    default: str
    names: Callable[[], tuple[str, ...]]
    find: Callable[[str], type[Chosen]]

    def checked(self, table: Any) -> Chosen:
        """The section as the class that its ``kind`` names.

        Raises pydantic's ``ValidationError``.
        """
        section = self.section
        if not isinstance(table, Mapping):
            raise refusal(f"{section} = {table!r} must be a section, [{section}]")
        name = table.get("kind", self.default)
        try:
            kind = self.find(name)
        except ValueError as error:
            raise refusal(f"{section}.kind: {error}") from None
        elsewhere = {key: self._kinds_with(key) for key in table.keys() - self.keys(name)}
        misplaced = [
            f"{section}.{key} = {table[key]!r} belongs to {section}.kind = {' or '.join(map(repr, kinds))}, "
            f"not {name!r}"
            for key, kinds in elsewhere.items()
            if kinds
        ]
        fitting = {key: value for key, value in table.items() if not elsewhere.get(key)}
        try:
            checked = validate(kind, fitting)
        except ValidationError as error:
            texts = problems(error, kind, fitting, section)
            needed = f": {section}.kind = {name!r} needs it"
            raise refusal(
                *misplaced, *(text + needed if text.endswith(" is missing") else text for text in texts)
            ) from None
        if misplaced:
            raise refusal(*misplaced)
        return checked

    def keys(self, kind: object) -> frozenset[str]:
        """The keys of a kind; none for a kind that does not exist."""
        if kind not in self.names():
            return frozenset()
        found: Any = self.find(str(kind))
        return frozenset(part.name for part in fields(found))

    def _kinds_with(self, key: str) -> list[str]:
        return [name for name in self.names() if key in self.keys(name)]


PARTITION: Choice[Partitioning] = Choice("partition", "iid", partitioning.names, partitioning.find)
TASK: Choice[Task] = Choice("task", "image-classification", tasks.names, tasks.find)
