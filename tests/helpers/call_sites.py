"""Calls in Python source, with the function that each is in, for tests that forbid some of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def call_sites(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield (name of the innermost function, "" outside of all, and the call)."""
    waiting = [(tree, "")]
    while waiting:
        node, function = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            yield function, node
        waiting += [(child, function) for child in ast.iter_child_nodes(node)]


def dotted(node: ast.AST) -> list[str]:
    """Return the parts of a dotted name; what is not a name (a call, a subscript) is "?"."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id if isinstance(node, ast.Name) else "?", *reversed(parts)]
