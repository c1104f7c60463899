"""Draw who imports whom in src/cloze, from the code: one line for each part, in the order of its layers.

    python tests/layers.py

A part stands below those that use it. Imports inside of functions count as well.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "cloze"


def part_of(path: Path) -> str:
    """`train/loss.py` is a part of `train`; a module at the top is a part by itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports() -> dict[str, set[str]]:
    """Each part, and the parts that it uses."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        uses = found.setdefault(part_of(path), set())
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            uses |= {name.split(".")[1] for name in names if name.startswith("cloze.")}
    return {part: (uses & found.keys()) - {part} for part, uses in found.items() if part != "__init__"}


def layers(graph: dict[str, set[str]]) -> list[list[str]]:
    """The parts from the outside in: the last layer uses nothing, each other one only those after it. Raises
    ValueError where two parts use each other."""
    left, found = dict(graph), []
    while left:
        lowest = sorted(part for part, uses in left.items() if not uses & left.keys())
        if not lowest:
            raise ValueError(f"imports go round in circles: {', '.join(sorted(left))}")
        found.append(lowest)
        left = {part: uses for part, uses in left.items() if part not in lowest}
    return found[::-1]


if __name__ == "__main__":
    graph = imports()
    for number, layer in enumerate(layers(graph), 1):
        for part in layer:
            print(f"{number:>2}  {part:<14} {' '.join(sorted(graph[part]))}")
