"""The command line: `cloze COMMAND ...`, also as `python -m cloze COMMAND ...`.

Hands the command's dataclass (`cloze.flags.parse`) to `cloze.commands.COMMAND.run`, and turns what a person can cause
(`ClozeError`) into one line on stderr and exit code 2. Imports nothing heavy: help and usage errors come at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from cloze.errors import ClozeError, LostRank, Stopped
from cloze.flags import parse

FIRST_WORD_SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave the interpreter with its exit code."""
    is_main = os.environ.get("RANK", "0") == "0"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    try:
        command, arguments = parse(sys.argv[1:] if argv is None else argv)
        code = importlib.import_module(f"cloze.commands.{command}").run(arguments) or 0
    except ClozeError as error:
        if error.is_ours_to_tell() if isinstance(error, LostRank) else is_main:
            print(f"cloze: error: {error}", file=sys.stderr)
        code = error.exit_code
        if not is_main and not isinstance(error, LostRank):
            let_rank_0_speak(code)
    except Stopped as stop:
        if is_main:
            print(f"cloze: {stop}", file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        if is_main:
            print("cloze: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    if is_main and "CLOZE_EXIT_FILE" in os.environ:  # a launcher's own exit code is 1, whatever ended the ranks
        with contextlib.suppress(OSError):
            Path(os.environ["CLOZE_EXIT_FILE"]).write_text(f"{code}\n", encoding="utf-8")
    leave(code)


def _stop(number: int, _: Any) -> None:
    raise Stopped(f"{signal.Signals(number).name}: stopped; what is finished is kept")


def let_rank_0_speak(code: int) -> None:
    """Wait before this rank ends with an error that rank 0 has too: the launcher ends the others as soon as one is
    gone, and rank 0, which tells it, may be a little later. It ends at once when the launcher says so."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(FIRST_WORD_SECONDS)


def leave(code: int) -> NoReturn:
    """Exit with `code`, at once where a process group is alive.

    Taking a gloo group down can abort the interpreter (torch 2.13: 19 of 25 exits) or wait for its own threads for
    ever (its destructor joins them while it holds the GIL), so it is left to the operating system.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
