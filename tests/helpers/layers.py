"""Show which part of src/cloze imports which, read from the code: one line for each part, from the outermost layer in.

    python tests/helpers/layers.py              # the folders and modules of src/cloze
    python tests/helpers/layers.py training     # those of src/cloze/training
    python tests/helpers/layers.py --write      # write the picture of the layers into docs/how-it-works.md

A part is a module or a folder that lies directly in the folder asked about. Imports inside of functions count.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from functools import cache
from pathlib import Path

from repository import PACKAGE, ROOT

PAGE = ROOT / "docs" / "how-it-works.md"
BEGIN, END = "<!-- layers -->\n", "<!-- end of layers -->\n"
WIDTH, INDENT = 115, 22  # of the picture, and of the descriptions in it


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """Return the modules of cloze that a file imports, as paths without suffix: `training/engines/ema`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "cloze":
                found.add(next((one for one in _candidates(parts[1:]) if _exists(one)), "__init__"))
    return frozenset(found - {"__init__"})


def _candidates(parts: list[str]) -> list[str]:
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _exists(module: str) -> bool:
    return (PACKAGE / f"{module}.py").is_file() or (PACKAGE / module / "__init__.py").is_file()


def folders() -> list[str]:
    """Return the folders of the package that hold modules, as paths below it; "" is the package itself."""
    return sorted({path.parent.relative_to(PACKAGE).as_posix().removeprefix(".") for path in PACKAGE.rglob("*.py")})


def imports(folder: str = "") -> dict[str, set[str]]:
    """Return for each part of a folder the other parts of it that it imports."""
    root = PACKAGE / folder
    found: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        if path == PACKAGE / "__init__.py":  # it imports only when one of its names is used
            continue
        part = path.relative_to(root).parts[0].removesuffix(".py")
        uses = found.setdefault(part, set())
        for module in imported_modules(path):
            target = PACKAGE / module
            if target != root and root in target.parents:
                uses.add(target.relative_to(root).parts[0])
    return {part: uses - {part} for part, uses in found.items()}


def layers(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the parts from the outermost layer in: each layer imports only from those after it. Raises ValueError if
    parts import each other in a circle."""
    left, found = dict(graph), []
    while left:
        lowest = sorted(part for part, uses in left.items() if not uses & left.keys())
        if not lowest:
            raise ValueError(f"imports form a circle: {', '.join(sorted(left))}")
        found.append(lowest)
        left = {part: uses for part, uses in left.items() if part not in lowest}
    return found[::-1]


def summary(path: Path) -> str:
    """Return the first sentence of the docstring of a module or a folder."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return text.partition(". ")[0].removesuffix(".")


def _lines(path: Path, indent: int) -> list[str]:
    """Return the lines of the picture for a folder and those in it, or for a module."""
    folder = path.is_dir()
    name = f"{' ' * indent}{path.name}{'/' if folder else ''}".ljust(INDENT)
    text = textwrap.wrap(summary(path / "__init__.py" if folder else path), WIDTH - INDENT - 4)
    lines = [left + right for left, right in zip([name, *[" " * INDENT] * len(text)], text or [""], strict=False)]
    inside = sorted(file.parent for file in path.glob("*/__init__.py")) if folder else []
    return lines + [line for one in inside for line in _lines(one, indent + 2)]


def picture() -> str:
    """Return the layers of the package as text: a box for each layer, which imports from the boxes below it."""
    border = f"+{'-' * (WIDTH - 2)}+"
    lines = [border]
    for layer in layers(imports()):
        for part in layer:
            path = PACKAGE / part
            lines += [
                f"| {line:<{WIDTH - 4}} |" for line in _lines(path if path.is_dir() else path.with_suffix(".py"), 0)
            ]
        lines.append(border)
    return "```text\n" + "\n".join(lines) + "\n```\n"


def with_picture(page: str) -> str:
    """Return the text of the page with the picture between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + picture() + END + rest.partition(END)[2]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(with_picture(PAGE.read_text()))
        sys.exit()
    graph = imports(*sys.argv[1:2])
    for number, layer in enumerate(layers(graph), 1):
        for part in layer:
            print(f"{number:>2}  {part:<14} {' '.join(sorted(graph[part]))}")
