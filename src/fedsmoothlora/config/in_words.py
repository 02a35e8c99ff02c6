"""Annotated types, default values and docstrings of settings, in words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from annotated_types import Ge, Gt, Interval, Le, Lt

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_PLURALS = {str: "strings", int: "integers", float: "numbers"}


def type_of(hint: Any) -> tuple[str, str]:
    """A type and its allowed values, such as ``integer`` and ``at least 1``."""
    is_union = get_origin(hint) in (UnionType, Union)
    members = [one for one in get_args(hint) if one is not NoneType] if is_union else [hint]
    types, allowed = zip(*map(_member, members), strict=True)
    return " or ".join(dict.fromkeys(types)), "; ".join(filter(None, allowed))


def _member(hint: Any) -> tuple[str, str]:
    if get_origin(hint) is Literal:
        return _TYPES[type(get_args(hint)[0])], one_of(get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        bounds = _bounds(inner)
        plural = _PLURALS.get(_bare(inner), "values")
        return f"list of {plural}", f"each {bounds}" if bounds else ""
    return _TYPES.get(_bare(hint), "value"), _bounds(hint)


def _bare(hint: Any) -> Any:
    """A type without its annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _bounds(hint: Any) -> str:
    annotations = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return ", ".join(word for annotation in annotations for word in _bound(annotation))


def _bound(annotation: Any) -> Iterator[str]:
    match annotation:
        case Interval():
            for part in annotation:
                yield from _bound(part)
        case Ge(ge=value):
            yield f"at least {value}"
        case Gt(gt=value):
            yield f"above {value}"
        case Le(le=value):
            yield f"at most {value}"
        case Lt(lt=value):
            yield f"below {value}"


def one_of(values: Iterable[Any]) -> str:
    """Allowed values, as TOML writes them."""
    return ", ".join(map(toml, values))


def default_of(part: Field[Any]) -> str:
    """A default as TOML writes it; ``required`` or ``not set`` where there is no value."""
    default = part.default
    if part.default_factory is not MISSING:
        default = part.default_factory()
    if default is MISSING:
        return "required"
    return "not set" if default is None else toml(default)


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    plain = list(value) if isinstance(value, tuple) else value
    text = tomli_w.dumps({"value": plain}).removeprefix("value = ").strip()
    return re.sub(r"\s*\n\s*", " ", text).replace("[ ", "[").replace(", ]", "]")


def meanings(kind: type) -> dict[str, str]:
    """The meaning of every attribute that the docstrings of a class and of its bases list, by name."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= _attributes(vars(base).get("__doc__") or "")
    return found


def _attributes(docstring: str) -> dict[str, str]:
    """The texts below ``Attributes:``, each as one line, by name."""
    _, _, block = inspect.cleandoc(docstring).partition("Attributes:\n")
    block, *_ = re.split(r"^\S", block, maxsplit=1, flags=re.MULTILINE)
    texts = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", block, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in texts}
