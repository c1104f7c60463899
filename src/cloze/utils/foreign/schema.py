"""Check the structure of a JSON value: its names and the types of their values.

    check({"shards": [{"file": "../x"}]}, {"shards": [{"file": FILE, "?blocks": COUNT}]})     # ValueError

A checksum shows that a file is as it was written, not who wrote it: so what is read from it is checked like any other.
A mapping names what it must have (`?name`: what it may have) and may have more; `Each` is a mapping with any names; a
list has one shape for all its elements; a type, a tuple of types or a function says what a single value is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cloze.utils.foreign.lenient_read import is_number
from cloze.utils.foreign.paths import is_plain_name, plain_path, printable

_HEX = re.compile(r"[0-9a-f]{64}")
MAX_TEXT = 100_000


@dataclass(frozen=True)
class Each:
    """A mapping whose values have one shape, and whose names fulfil `name`."""

    value: Any
    name: Callable[[Any], bool] | None = None


def COUNT(value: Any) -> bool:
    """Return whether a value is a count: an integer from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63


def NUMBER(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold."""
    return is_number(value)


def TEXT(value: Any) -> bool:
    """Return whether a value is printable text."""
    return isinstance(value, str) and value.isprintable() and len(value) <= MAX_TEXT


def FILE(value: Any) -> bool:
    """Return whether a value is the plain name of a file."""
    return is_plain_name(value)


def PATH(value: Any) -> bool:
    """Return whether a value is a relative path of plain names."""
    try:
        return bool(plain_path(value))
    except Exception:  # a ClozeError: any other path
        return False


def SHA256(value: Any) -> bool:
    """Return whether a value is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and bool(_HEX.fullmatch(value))


def optional(shape: Any) -> Callable[[Any], bool]:
    """Return a function that accepts None and values of a shape."""
    return lambda value: value is None or matches(value, shape)


def matches(value: Any, shape: Any) -> bool:
    """Return whether a value has a shape."""
    try:
        check(value, shape)
    except ValueError:
        return False
    return True


def check(value: Any, shape: Any, where: str = "") -> None:
    """Raise ValueError, naming the place in the value, if it has not this shape."""
    if isinstance(shape, dict):
        _is(isinstance(value, dict), where, value)
        for key, inner in shape.items():
            name = key.removeprefix("?")
            if name in value:
                check(value[name], inner, f"{where}.{name}" if where else name)
            elif name == key:
                raise ValueError(f"{where or 'it'} has no {name}")
    elif isinstance(shape, Each):
        _is(isinstance(value, dict), where, value)
        for key, inner in value.items():
            _is((shape.name or TEXT)(key), f"a name in {where or 'it'}", key)
            check(inner, shape.value, f"{where}.{key}" if where else key)
    elif isinstance(shape, list):
        _is(isinstance(value, list), where, value)
        for number, inner in enumerate(value):
            check(inner, shape[0], f"{where}[{number}]")
    elif isinstance(shape, type | tuple):
        _is(isinstance(value, shape), where, value)
    else:
        _is(shape(value), where, value)


def _is(good: bool, where: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{printable(where or 'it')} cannot be {printable(repr(value))[:60]}")
