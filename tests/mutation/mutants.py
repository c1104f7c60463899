"""Small changes of a module's source that a test should notice: one operator, constant, condition or call each."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
SWAPPED_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil"}
DROPPED_CALLS = ("sorted", "abs", "reversed")  # f(x) becomes x
DROPPED_METHODS = ("float", "double", "clone", "detach", "contiguous", "abs", "long", "int", "bool")  # x.f() becomes x
# Words, speed, and what a machine without a GPU cannot notice.
IRRELEVANT_KEYWORDS = ("hint", "where", "flush", "exist_ok", "non_blocking", "device", "pin_memory")
MESSAGES = ("say", "warn", "complain", "show", "print", "isinstance", "TypeVar", "NewType", "cast")


@dataclass(frozen=True)
class Mutant:
    """One change: `before` at (`line`, `column`) of `module` becomes `after`, in the function `function`."""

    module: str
    function: str  # "" at module level
    block: str  # the innermost list of statements that it changes, as `blocks_of` names it; "" at module level
    line: int
    column: int
    end: tuple[int, int]
    before: str
    after: str
    text: str  # of its line

    @property
    def name(self) -> str:
        """Return what identifies the mutant in reports and in `equivalent.txt`; it has no line number."""
        return f"{self.module} {self.function or '-'}: {self.before} => {self.after} in: {self.text}"

    def apply(self, source: str) -> str:
        """Return `source` with the change made; lines keep their numbers, except after a dropped long statement."""
        starts = _line_starts(source)
        start, stop = starts[self.line - 1] + self.column, starts[self.end[0] - 1] + self.end[1]
        padding = "\n" * (self.end[0] - self.line)
        after = "pass" if self.after == "pass" else f"({self.after}{padding})"
        return (source.encode()[:start] + after.encode() + source.encode()[stop:]).decode()


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Return the mutants of a module's source, in the order of its lines, without two of the same text."""
    tree, content, starts, lines = ast.parse(source), source.encode(), _line_starts(source), source.splitlines()
    found: dict[tuple[int, int, str, str], Mutant] = {}
    blocks = {name: blocks_of(name, function, source) for name, function in functions_of(source)}
    for function, node, parent in _nodes(tree, ""):
        if not hasattr(node, "end_lineno"):
            continue
        before = content[starts[node.lineno - 1] + node.col_offset : starts[node.end_lineno - 1] + node.end_col_offset]
        for changed in _changes(node, type(parent).__name__ if parent else ""):
            # A condition that is never true changes what a test does only if the test runs what it guards.
            never = parent is not None and isinstance(changed, ast.Constant) and changed.value is False
            line = parent.body[0].lineno if never and isinstance(parent, ast.If | ast.While) else node.lineno
            after = "pass" if isinstance(changed, ast.Pass) else ast.unparse(changed)
            mutant = Mutant(
                module,
                function,
                _block_at(line, blocks.get(function, {})),
                node.lineno,
                node.col_offset,
                (node.end_lineno, node.end_col_offset),
                " ".join(before.decode().split()),
                after,
                lines[node.lineno - 1].strip(),
            )
            found.setdefault((node.lineno, node.col_offset, mutant.before, after), mutant)
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.column))


def _line_starts(source: str) -> list[int]:
    """Return the byte at which each line begins."""
    return list(accumulate(map(len, source.encode().splitlines(keepends=True)), initial=0))


def functions_of(module: str | ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the dotted name and the node of every function of a module (its source, or its tree)."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}{child.name}"
                if isinstance(child, ast.FunctionDef):
                    yield name, child
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(ast.parse(module) if isinstance(module, str) else module, "")


def blocks_of(name: str, function: ast.FunctionDef, source: str) -> dict[str, list[ast.stmt]]:
    """Return the lists of statements of a function: its body, and each branch of a condition or loop, without those of
    functions inside it. Their names change if the function changes, but not if the rest of the module does."""
    digest = hashlib.sha256((ast.get_source_segment(source, function) or "").encode()).hexdigest()[:8]
    found = {}

    def walk(node: ast.AST) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                found[f"{name}@{digest}+{value[0].lineno - function.lineno}"] = value
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
                    walk(child)

    walk(function)
    return found


def _block_at(line: int, blocks: dict[str, list[ast.stmt]]) -> str:
    """Return the innermost block that contains a line; "" if none does."""
    found = [name for name, block in blocks.items() if block[0].lineno <= line <= (block[-1].end_lineno or 0)]
    return max(found, key=lambda name: blocks[name][0].lineno, default="")


def _nodes(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST, ast.AST | None]]:
    """Yield the function of each node that may change, the node, and what it is the condition of, or None.

    Annotations, messages and errors are left out.
    """
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _skipped(child):
                continue
            inside = function
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inside = f"{function}.{child.name}".lstrip(".")
            elif not isinstance(child, (ast.expr_context, ast.operator, ast.cmpop, ast.arguments)):
                yield function, child, node if name in ("test", "ifs") else None
            yield from _nodes(child, inside)


def _skipped(node: ast.AST) -> bool:
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    return isinstance(node, ast.Call) and _called(node) in MESSAGES


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _changes(node: ast.AST, condition: str) -> Iterator[ast.AST]:
    """Yield the changed forms of one node."""
    if condition and not isinstance(node, ast.Constant):
        yield ast.Constant(False)
        if condition != "While":  # a loop without an end says nothing
            yield ast.Constant(True)
    kind = type(node).__name__
    changes = globals().get(f"_of_{kind.lower()}")
    if changes is not None:
        yield from changes(node)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _of_compare(node: ast.Compare) -> Iterator[ast.AST]:
    for place, operator in enumerate(node.ops):
        for other in COMPARISONS[type(operator)]:
            yield _with(node, ops=[*node.ops[:place], other(), *node.ops[place + 1 :]])


def _of_binop(node: ast.BinOp) -> Iterator[ast.AST]:
    other = OPERATORS.get(type(node.op))
    text = isinstance(node.left, ast.JoinedStr) or isinstance(getattr(node.left, "value", None), str)
    if other is not None and not text:
        yield _with(node, op=other())


def _of_boolop(node: ast.BoolOp) -> Iterator[ast.AST]:
    for place in range(len(node.values)):
        rest = [*node.values[:place], *node.values[place + 1 :]]
        yield rest[0] if len(rest) == 1 else _with(node, values=rest)
    yield _with(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())


def _of_unaryop(node: ast.UnaryOp) -> Iterator[ast.AST]:
    if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand


def _of_constant(node: ast.Constant) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        if node.value > 1:
            yield ast.Constant(node.value - 1)
    elif isinstance(node.value, float):
        yield ast.Constant(node.value * 2 or 1.0)


def _of_ifexp(node: ast.IfExp) -> Iterator[ast.AST]:
    yield node.body
    yield node.orelse


def _of_call(node: ast.Call) -> Iterator[ast.AST]:
    name = _called(node)
    if name in SWAPPED_NAMES and isinstance(node.func, ast.Name):
        yield _with(node, func=ast.Name(SWAPPED_NAMES[name], ast.Load()))
    elif name in SWAPPED_NAMES and isinstance(node.func, ast.Attribute):
        yield _with(node, func=_with(node.func, attr=SWAPPED_NAMES[name]))
    if name in DROPPED_CALLS and isinstance(node.func, ast.Name) and node.args:
        yield node.args[0]
    if name in DROPPED_METHODS and isinstance(node.func, ast.Attribute) and not node.args:
        yield node.func.value
    for place, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in IRRELEVANT_KEYWORDS:
            yield _with(node, keywords=[*node.keywords[:place], *node.keywords[place + 1 :]])


def _of_expr(node: ast.Expr) -> Iterator[ast.AST]:
    if isinstance(node.value, ast.Call):
        yield ast.Pass()


def _of_assign(node: ast.Assign) -> Iterator[ast.AST]:
    if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
        yield ast.Pass()


def _of_augassign(node: ast.AugAssign) -> Iterator[ast.AST]:
    yield ast.Pass()


def _of_continue(node: ast.Continue) -> Iterator[ast.AST]:
    yield ast.Pass()


def _of_break(node: ast.Break) -> Iterator[ast.AST]:
    yield ast.Pass()
