"""The entry points: `run` for a process of its own (`cloze COMMAND ...`, `python -m cloze COMMAND ...`), `main` for a
caller with other work to do. See `cloze.command_line`.

This module imports next to nothing: the modules of a command take seconds to import, and a signal that arrives in
that time must end the process in one line.
"""

from __future__ import annotations

from cloze.early import leave_on_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def run() -> NoReturn:
    """Run one command and exit with its code."""
    leave_on_signals()
    from cloze import command_line

    command_line.run()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command; raise SystemExit with its code. See `cloze.command_line.main`."""
    from cloze import command_line

    command_line.main(argv)
