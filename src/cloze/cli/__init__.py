"""The command line: options, help, completion, and the commands.

`run` is the entry point of a process (`cloze COMMAND ...`, `python -m cloze COMMAND ...`), and `main` that of a caller
with other work to do. See `cloze.cli.command_line`.

This module imports next to nothing: the modules of a command take seconds to import, and a signal that arrives in
that time must end the process in one line.
"""

from __future__ import annotations

from cloze.utils.early_signals import leave_on_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def run() -> NoReturn:
    """Run one command and exit with its code."""
    leave_on_signals()
    import cloze.utils.environment.processes  # noqa: F401 - rank 0 reports a signal, and this module knows the rank
    from cloze.cli import command_line

    command_line.run()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command; raise SystemExit with its code. See `cloze.cli.command_line.main`."""
    from cloze.cli import command_line

    command_line.main(argv)
