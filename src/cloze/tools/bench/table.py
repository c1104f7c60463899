"""A table of measurements, as text and as JSON, with the machine and versions it was made on.

table = Table("prepare", ["what", "seconds", "Mtok/s"])
table.add("cloze, .jsonl", 2.4, 21.0)
table.details = {"seconds": [2.4, 2.5]}     # for the file only
table.notes.append("each was run once")     # a line below the table
table.show(Path("bench.json"))
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from cloze.utils.atomic_files import write_json
from cloze.utils.system import processor, versions_of
from cloze.utils.terminal.console import show, show_table

_PACKAGES = (
    "cloze",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "tokenizers",
    "gigatoken",
    "numpy",
    "pyarrow",
)


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, and versions of Python and of the relevant packages."""
    packages = dict.fromkeys(_PACKAGES, "not installed") | versions_of(_PACKAGES)
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "packages": packages,
    }


class Table:
    """Rows of figures under named columns."""

    def __init__(self, title: str, columns: list[str]):
        self.title, self.columns = title, columns
        self.rows: list[list[Any]] = []
        self.details: dict[str, Any] = {}
        self.notes: list[str] = []

    def add(self, *cells: Any) -> None:
        """Append a row; numbers are shown with three digits that matter."""
        self.rows.append(list(cells))

    def show(self, output: Path | None = None) -> None:
        """Print it, and write it as JSON where asked."""
        facts = machine()
        packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
        caption = f"{facts['cores']} cores of {facts['processor']}, {facts['memory_gib']} GiB; {packages}"
        shown = RichTable(title=self.title, caption=caption, title_justify="left", caption_justify="left")
        for number, name in enumerate(self.columns):
            shown.add_column(name, justify="left" if number == 0 else "right")
        for row in self.rows:
            shown.add_row(*(_cell(cell) for cell in row))
        show_table(shown, width=100 if len(self.columns) < 8 else 140)
        for note in self.notes:
            show(note)
        self.write(output)

    def write(self, output: Path | None) -> None:
        """Write it as JSON, with the machine and the command; nothing where `output` is None."""
        if output is None:
            return
        facts = {"title": self.title, "command": " ".join(sys.argv), "machine": machine()}
        write_json(output, {**facts, "columns": self.columns, "rows": self.rows, "notes": self.notes, **self.details})


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
