"""`cloze archs`: the architectures of the installed transformers, and what works for each."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

from rich import box
from rich.table import Table

from cloze.config import ArchsConfig
from cloze.model.archs import GONE, NOTES, Architecture, architectures
from cloze.utils.atomic_files import write_json
from cloze.utils.output_file import check_output_file
from cloze.utils.terminal.console import say, show, show_table

_COLUMNS = ("sdpa", "flash", "flex", "check-\npointing", "bf16", "ZeRO-3", "sparse\nhead")


def run(config: ArchsConfig) -> None:
    """Print the table, or one row of it, and write it as JSON if asked to. Raises ConfigError, DiskError."""
    output = check_output_file(config.output) if config.output is not None else None
    found = architectures(config.model_type)
    show_table(_table(found), width=100)
    gone = GONE if config.model_type is None else {}
    for name, hint in sorted(gone.items()):
        show(f" {name:<18} {hint}")
    noted = {note for one in found for note in one.note.split("; ")}
    show("".join(f"\n {note:<18} {meaning}" for note, (_, meaning) in NOTES.items() if note in noted))
    if output is not None:
        rows = [dataclasses.asdict(one) for one in found]
        write_json(output, {"transformers": version("transformers"), "architectures": rows, "gone": gone})
        say("archs", f"written to {config.output}")


def _table(found: list[Architecture]) -> Table:
    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=f"masked language models of transformers {version('transformers')}",
        title_justify="left",
    )
    shown.add_column("model_type", no_wrap=True)
    for name in _COLUMNS:
        shown.add_column(name, justify="center", no_wrap=True)
    shown.add_column("note")
    for one in found:
        flags = dataclasses.astuple(one)[1:-1]
        shown.add_row(one.model_type, *("yes" if flag else "-" for flag in flags), one.note)
    return shown
