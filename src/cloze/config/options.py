"""The options of a command, read from its dataclass and the docstrings under its fields; imports nothing heavy.

for option in options_of(config.TrainConfig): print(option.name, option.values, option.help)
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloze.config.ranges import allowed_values


@dataclass(frozen=True)
class Option:
    """One option. `kind`: bool, int, float, str or dict; `values`: what it may be, where that is a list (a switch may
    be left without one); `home`: the dataclass that declares it; `limits`: its range in words."""

    name: str
    kind: str
    values: tuple[str, ...]
    default: Any
    required: bool
    help: str
    home: str
    limits: str = ""

    @property
    def about(self) -> str:
        """Return its help, with its range."""
        return f"{self.help} [{self.limits}]".lstrip() if self.limits else self.help

    @property
    def metavar(self) -> str:
        """Return the placeholder for the value in a help text."""
        if self.kind == "bool":
            return f"[{'|'.join(self.values)}]"
        if self.values:
            return f"{{{','.join(self.values)}}}"
        return {"int": "N", "float": "X", "dict": "JSON"}.get(self.kind, "TEXT")


def options_of(dataclass: type) -> list[Option]:
    """Return all options of a command's dataclass, inherited ones first."""
    hints, allowed = typing.get_type_hints(dataclass), allowed_values(dataclass)
    helps: dict[str, str] = {}
    homes: dict[str, str] = {}
    for base in reversed(dataclass.__mro__):
        found = _docstrings(base)
        helps |= {name: text for name, text in found.items() if text}
        homes |= {name: base.__name__ for name in found}
    options = []
    for field in dataclasses.fields(dataclass):
        kind, values = _kind_of(hints[field.name])
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        options.append(
            Option(
                name=field.name,
                kind=kind,
                values=values,
                default=None if required else field.default,
                required=required,
                help=helps.get(field.name, ""),
                home=homes[field.name],
                limits=str(allowed[field.name]),
            )
        )
    return options


def _kind_of(hint: Any) -> tuple[str, tuple[str, ...]]:
    """Return the type and the values: `bool | Literal["auto"]` -> bool, (true, false, auto); `int | None` -> int,
    ()."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    values = tuple(str(one) for part in parts if typing.get_origin(part) is typing.Literal for one in part.__args__)
    if bool in parts:
        return "bool", ("true", "false", *values)
    for kind in (int, float, dict):
        if any(part is kind or typing.get_origin(part) is kind for part in parts):
            return kind.__name__, values
    return "str", values


def _docstrings(dataclass: type) -> dict[str, str]:
    """Return the docstring under each field that a class itself declares; "" without a docstring."""
    file = getattr(sys.modules.get(dataclass.__module__), "__file__", None)
    body = _classes(file).get(dataclass.__name__, []) if file and dataclasses.is_dataclass(dataclass) else []
    found: dict[str, str] = {}
    last = None
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
            found[last] = ""
        elif last and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[last] = " ".join(str(node.value.value).split())
            last = None
    return found


@functools.cache
def _classes(file: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
