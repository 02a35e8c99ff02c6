"""Sections in which a name decides which other keys there are: ``[method]`` and ``[partition]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from fedsmoothlora import methods
from fedsmoothlora.config.validation import problems, refusal, unknown_key, validate
from fedsmoothlora.data import partitioning
from fedsmoothlora.data.partitioning import Partitioning

DEFAULT_PARTITION = "iid"


def checked_method(section: Any) -> methods.Method:
    """``[method]`` as the method that its ``name`` names, with its options; or the user's own method.

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
    """The user's own method, if its options are valid."""
    try:
        methods.check_own(method)
    except ValueError as error:
        raise refusal(f"method: {error}") from None
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


def checked_partition(table: Any) -> Partitioning:
    """``[partition]`` as the partition that its ``kind`` names, with the keys of that kind.

    Raises pydantic's ``ValidationError``.
    """
    if not isinstance(table, Mapping):
        raise refusal(f"partition = {table!r} must be a section, [partition]")
    name = table.get("kind", DEFAULT_PARTITION)
    try:
        kind = partitioning.find(name)
    except ValueError as error:
        raise refusal(f"partition.kind: {error}") from None
    elsewhere = {key: _kinds_with(key) for key in table.keys() - partition_keys(name)}
    misplaced = [
        f"partition.{key} = {table[key]!r} belongs to partition.kind = {' or '.join(map(repr, kinds))}, "
        f"not {name!r}"
        for key, kinds in elsewhere.items()
        if kinds
    ]
    fitting = {key: value for key, value in table.items() if not elsewhere.get(key)}
    try:
        checked = validate(kind, fitting)
    except ValidationError as error:
        texts = problems(error, kind, fitting, "partition")
        needed = f": partition.kind = {name!r} needs it"
        raise refusal(
            *misplaced, *(text + needed if text.endswith(" is missing") else text for text in texts)
        ) from None
    if misplaced:
        raise refusal(*misplaced)
    return checked


def partition_keys(kind: object) -> frozenset[str]:
    """The keys of a kind of partition; none for a kind that there is not."""
    if kind not in partitioning.names():
        return frozenset()
    return frozenset(part.name for part in fields(partitioning.find(str(kind))))


def _kinds_with(key: str) -> list[str]:
    return [name for name in partitioning.names() if key in partition_keys(name)]
