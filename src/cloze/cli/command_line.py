"""The command line: `cloze COMMAND ...`, also as `python -m cloze COMMAND ...` (see `cloze.cli`).

Passes the command's dataclass (`cloze.config.parser.parse`) to `cloze.cli.commands.COMMAND.run`, and reports a user
error (`ClozeError`) in one line on stderr, with exit code 2 (`cloze.distributed.resilience.report_error`). Imports
nothing heavy, so that help and usage errors appear at once.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import io
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn, TextIO

from cloze import __version__
from cloze.cli.help import show_help, wants_help
from cloze.config.parser import check_command, choose_log_format, overridden, parse
from cloze.config.relations import ignored_options
from cloze.distributed.resilience.report_error import leave_code, report_error
from cloze.errors import DiskError, Stopped
from cloze.utils.early_signals import (
    EXIT_INTERRUPTED,
    REQUESTS,
    exit_code_of_signal,
    is_importing,
    is_sent_again,
    leave_on_signals,
    signal_again,
)
from cloze.utils.terminal.console import (
    answer,
    log_format,
    show,
    silence_libraries,
    silence_other_ranks,
    tell_end,
    warn,
)
from cloze.utils.terminal.json_events import end_json, is_json, lost_output, speak_json
from cloze.utils.terminal.library_output import escape_library_output, own_stdout

ANSWERS = ("compare", "inspect", "plan", "replay", "submit")  # commands that are run to read what they say


def run() -> NoReturn:
    """Run `main`, and exit with its code, whatever libraries leave behind.

    Threads of pyarrow's, when a stream is left before its end, abort some interpreters on their way out ("terminate
    called without an active exception", exit code -6). So what Python does at its end is done here, and then no more.
    """
    escape_library_output()
    silence_libraries()
    try:
        main()
    except (KeyboardInterrupt, Stopped) as stop:  # between the end of the command and that of `_signals_raise`
        os._exit(stop.exit_code if isinstance(stop, Stopped) else EXIT_INTERRUPTED)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        leave_on_signals(end.code)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave the interpreter with its exit code."""
    silence_other_ranks()
    _requests.clear()
    lost_output.clear()
    words: list[str] = []
    try:
        words = choose_log_format(sys.argv[1:] if argv is None else argv)
        if is_json():
            speak_json()
        code = _run_command(words)
    except Stopped as stop:
        code = stop.exit_code
        tell_end(str(stop), code)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        tell_end("interrupted", code)
    except Exception as error:
        if _requests:  # a library made another error of it, or it broke what was under way
            code = exit_code_of_signal(_requests[0])
            tell_end(_line_of(_requests[0]), code)
        else:
            code = _code_of(error)
    leave_code(code)
    end_json()
    is_reader_gone()
    leave(_code_of_output(code, only_log=words[:1] == ["train"]))


def _code_of(error: Exception) -> int:
    """Report an error; return the exit code."""
    gone = isinstance(error, BrokenPipeError) and is_reader_gone()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = _output_error(error)
    return 128 + signal.SIGPIPE if gone else report_error(error)


def is_reader_gone() -> bool:
    """Flush stdout; return whether its reader has closed the pipe (`cloze archs | head`). If so, redirect stdout to
    /dev/null."""
    gone = False
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        gone = any(state & select.POLLERR for _, state in poll.poll(0))  # the other end of the pipe is closed
    except BrokenPipeError:
        gone = True
    except (OSError, ValueError):  # stdout has no file descriptor
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _code_of_output(code: int, only_log: bool) -> int:
    """Return the exit code: 2 in place of 0 if a full disk did not take the output, unless that was `only_log`."""
    for stream in (sys.stdout, sys.stderr):
        if error := _unwritable(stream):
            lost_output[:] = [error]
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code if only_log or code or not lost_output else report_error(_output_error(lost_output[0]))


def _unwritable(stream: TextIO) -> OSError | None:
    """Return why a stream cannot be flushed; None if it can, or if its reader is gone."""
    try:
        stream.flush()
    except OSError as error:
        return None if error.errno is None or isinstance(error, BrokenPipeError) else error
    return None


def _output_error(error: OSError) -> DiskError:
    what = f"cannot write: {os.strerror(error.errno or 0)}"
    return DiskError(what, where=error.filename or "stdout or another file", hint="free some space, and run it again")


def _run_command(words: list[str]) -> int:
    """Help and version without the parser, whose import takes longer than they do; else the command's exit code."""
    if wants_help(words):
        if any(not word.startswith("-") for word in words):
            check_command(words)
        show_help(words)
        return 0
    if words[:1] == ["--version"]:
        show(f"cloze {__version__}")
        return 0
    if "--print_config" in words:
        show(_configuration(words))
        return 0
    command, arguments = parse(words)
    ignored = [*overridden(words), *ignored_options(arguments)]
    if ignored:
        warn(f"ignored: {'; '.join(ignored)}")
    answer(command in ANSWERS)
    module = importlib.import_module(f"cloze.cli.commands.{command}")
    hidden = contextlib.nullcontext() if log_format() == "verbose" else own_stdout()
    with _signals_raise(), hidden:
        return module.run(arguments) or 0


def _configuration(words: list[str]) -> str:
    """Return what `--print_config` prints, without tokens: it is meant to be kept as a recipe."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse(words)
    return re.sub(r"(?m)^((?:hub_)?token:).*$", r"\1 null", printed.getvalue()).rstrip("\n")


_requests: list[int] = []  # the signals that have arrived in this process


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Raise KeyboardInterrupt or Stopped for signals while the block runs; the handlers before it are those after it,
    so that a second signal does not wait until the first is reported."""
    before = {
        number: signal.signal(number, _stop) for number in REQUESTS if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    if not is_sent_again(number):
        _requests.append(number)
    if is_importing(frame):
        if len(_requests) > 1:
            os._exit(exit_code_of_signal(_requests[0]))
        signal_again(number)
        return
    if _requests[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(_line_of(_requests[0]))


def _line_of(number: int) -> str:
    is_key = number == signal.SIGINT
    return "interrupted" if is_key else f"{signal.Signals(number).name}: stopped; what is finished is kept"


def leave(code: int) -> NoReturn:
    """Exit with `code`, without cleaning up if a process group is alive.

    Taking a gloo group down can abort the interpreter (torch 2.13: 19 of 25 exits) or wait for its own threads for
    ever (its destructor joins them while it holds the GIL), so it is left to the operating system.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
