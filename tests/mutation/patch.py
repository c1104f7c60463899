"""Puts a mutant's code into the functions of an imported module, which saves importing it again."""

from __future__ import annotations

import ast
import functools
import gc
from types import CodeType, FunctionType

from mutants import Mutant

CACHE = type(functools.cache(len))


def function_of(mutant: Mutant, source: str) -> ast.FunctionDef | None:
    """Return the outermost function whose body a mutant changes; None if it changes a default, a decorator or code
    outside of functions."""

    def search(node: ast.AST) -> ast.FunctionDef | None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef) and child.body[0].lineno <= mutant.line <= child.end_lineno:
                return (
                    child if (mutant.line, mutant.column) >= (child.body[0].lineno, child.body[0].col_offset) else None
                )
            if isinstance(child, ast.ClassDef):
                found = search(child)
                if found is not None:
                    return found
        return None

    return search(ast.parse(source))


def replace(mutant: Mutant, source: str) -> bool:
    """Replace the code of every function object that a mutant changes; return whether one was found.

    `source`: the source of the mutant's module without the mutation. Cached results are forgotten.
    """
    function = function_of(mutant, source)
    assert function is not None
    old, new = (_code(compile(text, mutant.module, "exec"), function) for text in (source, mutant.apply(source)))
    functions = [one for one in gc.get_objects() if type(one) is FunctionType and one.__code__ == old]
    for one in functions:
        one.__code__ = new
    for one in gc.get_objects():
        if type(one) is CACHE and (one.__module__ or "").startswith("cloze"):
            one.cache_clear()
    return bool(functions)


def _code(module: CodeType, function: ast.FunctionDef) -> CodeType:
    """Return the code object of a function or method in a compiled module."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    todo = [module]
    while todo:
        code = todo.pop()
        if code.co_name == function.name and code.co_firstlineno == first:
            return code
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    raise AssertionError(f"{function.name} has no code")
