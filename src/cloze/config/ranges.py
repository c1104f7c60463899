"""The values that an option may have, declared next to its definition and checked whenever a configuration is made.

    draws: Annotated[int, Ge(1), Le(MAX_COUNT)] = 1

A dataclass that inherits from `Ranged` raises ConfigError in one line for a value of another type or outside its
range, so no code below the configuration has to check a single option; relations between options remain there.
Numbers must be finite. Imports nothing heavy: help and completion show the ranges.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

from cloze.errors import ConfigError
from cloze.utils.shareable import SECRETS
from cloze.utils.suggest import suggestion
from cloze.utils.terminal.redact import remember, secret_in

# Technical limits. They are far above any use, and keep products of two options inside 64 bits.
MAX_COUNT = 2**31 - 1
MAX_STEPS = 10**12
MAX_NODES = 10**6
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 8, 2**20  # tokens
MAX_BATCH = 2**24  # blocks
MAX_SECONDS = 10**8  # three years
MAX_SEED = 2**32 - 1  # as numpy.random.seed
MAX_RATE = 1e6  # learning rates and decays
MAX_BETA = 0.999999  # for Adam: float32 rounds values much closer to 1 up to 1
MIN_EPSILON = 1e-30  # of Adam: float32 rounds what is far below to 0, and the first zero gradient gives 0 / 0
_HIDDEN = 10**6  # help does not show an upper limit from here on


@dataclass(frozen=True)
class Ge:
    """At least `bound`."""

    bound: float


@dataclass(frozen=True)
class Gt:
    """Above `bound`."""

    bound: float


@dataclass(frozen=True)
class Le:
    """At most `bound`."""

    bound: float


@dataclass(frozen=True)
class Lt:
    """Below `bound`."""

    bound: float


@dataclass(frozen=True)
class Matches:
    """A text that `pattern` matches as a whole (without case), described by `meaning`, for example `a time`."""

    pattern: str
    meaning: str
    example: str


SIZE = Matches(r"\s*(?=[\d.]*[1-9])\d{1,18}(\.\d{1,18})?\s*[KMGT]?B?\s*", "a size", "write 500MB or 5GB")

TIME = Matches(r"\d+(-\d+)?(:\d+){0,2}|UNLIMITED", "a time", "as sbatch takes it: 4:00:00, 2-0, 90")


@dataclass(frozen=True)
class Allowed:
    """What an option may be. `kinds`: its types; `literals`: single values beside them; `bounds`: of a number."""

    kinds: tuple[type, ...]
    literals: tuple[Any, ...]
    bounds: tuple[Ge | Gt | Le | Lt, ...]
    text: Matches | None

    def __str__(self) -> str:
        """Return the range in words, without technical limits: `at least 1`, `above 0 and at most 1`; else empty."""
        low, high = self._end((Ge, Gt)), self._end((Le, Lt))
        if high is not None and high.bound >= _HIDDEN:
            high = None
        if isinstance(low, Ge) and isinstance(high, Le):
            return f"between {low.bound} and {high.bound}"
        return " and ".join(_say(bound) for bound in (low, high) if bound is not None)

    def _end(self, kinds: tuple[type, ...]) -> Ge | Gt | Le | Lt | None:
        return next((bound for bound in self.bounds if isinstance(bound, kinds)), None)

    def fault(self, value: Any) -> str | None:
        """Return the problem with a value; None if it is valid."""
        if any(value is one or (type(value) is type(one) and value == one) for one in self.literals):
            return None
        if not self._has_type(value):
            return f"must be {self.types}, not {_shown(value)}"
        if isinstance(value, str) and self.text is not None:
            fits = re.fullmatch(self.text.pattern, value, re.IGNORECASE)
            return None if fits else f"{_shown(value)} is not {self.text.meaning}"
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return None
        if not isinstance(value, numbers.Integral) and not math.isfinite(value):
            return f"must be a finite number, not {_shown(value)}"
        broken = next((bound for bound in self.bounds if not _holds(bound, value)), None)
        if broken is None:
            return None
        said = str(self)
        visible = not (isinstance(broken, Le | Lt) and broken.bound >= _HIDDEN)
        return f"must be {said if visible else _say(broken)}, not {_shown(value)}"

    def hint(self, value: Any) -> str | None:
        """Return what to write instead of a value that has a fault, if that is known."""
        if self.text is not None:
            return self.text.example
        words = [str(one) for one in self.literals]
        return suggestion(str(value), words) if words else None

    def _has_type(self, value: Any) -> bool:
        if value is None or isinstance(value, bool):
            return type(value) in self.kinds
        of = {int: numbers.Integral, float: numbers.Real, str: str | os.PathLike}
        return any(isinstance(value, of.get(kind, kind)) for kind in self.kinds if kind not in (bool, type(None)))

    @property
    def types(self) -> str:
        """Return its types in words: `a whole number`, `one of no, steps, epoch`."""
        names = {int: "a whole number", float: "a number", str: "a text", dict: "a mapping", list: "a list"}
        names |= {bool: "true or false"}
        literals = f"one of {', '.join(map(str, self.literals))}" if self.literals else ""
        return " or ".join([*[names[kind] for kind in self.kinds if kind in names], *([literals] if literals else [])])


class Ranged:
    """A configuration whose values are checked when it is made."""

    def __post_init__(self) -> None:
        """Raise ConfigError for the first value that its option may not have."""
        for name, allowed in allowed_values(type(self)).items():  # type: ignore[arg-type]
            fault = allowed.fault(getattr(self, name))
            if fault is not None:
                raise ConfigError(fault, where=f"--{name}", hint=allowed.hint(getattr(self, name)))
        remember(getattr(self, name, None) for name in SECRETS)
        for name in allowed_values(type(self)).keys() - set(SECRETS):  # type: ignore[arg-type]
            if kind := secret_in(str(getattr(self, name))):
                raise ConfigError(
                    f"holds what looks like {kind}, and would be stored with the run",
                    where=f"--{name}",
                    hint="give secrets as --token or in the environment (HF_TOKEN)",
                )


@functools.cache
def allowed_values(config: type) -> dict[str, Allowed]:
    """Return the allowed values of each option of a configuration's class, by name."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {field.name: _read(hints[field.name]) for field in dataclasses.fields(config)}


def _read(hint: Any) -> Allowed:
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *found = typing.get_args(hint)
        marks = tuple(found)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    literals = tuple(value for part in parts if typing.get_origin(part) is typing.Literal for value in part.__args__)
    kinds = tuple(typing.get_origin(part) or part for part in parts if typing.get_origin(part) is not typing.Literal)
    bounds = tuple(mark for mark in marks if isinstance(mark, Ge | Gt | Le | Lt))
    return Allowed(kinds, literals, bounds, next((mark for mark in marks if isinstance(mark, Matches)), None))


def _holds(bound: Ge | Gt | Le | Lt, value: Any) -> bool:
    if isinstance(bound, Ge):
        return bool(value >= bound.bound)
    if isinstance(bound, Gt):
        return bool(value > bound.bound)
    return bool(value <= bound.bound if isinstance(bound, Le) else value < bound.bound)


def _say(bound: Ge | Gt | Le | Lt) -> str:
    words = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    return f"{words[type(bound)]} {bound.bound}"


def _shown(value: Any) -> str:
    """Return a value as text for a message; integers with thousands of digits are abbreviated."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
