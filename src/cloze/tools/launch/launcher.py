"""Run `accelerate launch`, with an exit code that tells a batch job whether to start again.

If a rank ends with an error, accelerate exits with 1 for any reason, and prints 60 lines, even after a clean stop. A
signal to it kills the ranks 30 s later, in the middle of a large save. Here signals are passed on to the ranks, which
end when they have saved. The flags are the same, and `launch/multi_node` and `slurm/train.sbatch` start one on each
machine:

    python -m cloze.tools.launch.launcher --config_file multi_node.yaml --machine_rank 1 ... -m cloze train ...
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from cloze.utils.environment.processes import SECRET
from cloze.utils.terminal.console import show, silence_libraries

START_AGAIN, INTERRUPTED, MEND = 75, 130, 2
ENDS_WITH_PARENT = "CLOZE_ENDS_WITH_PARENT"  # in the environment: stop the ranks when the process above this one dies


def exit_code(codes: Iterable[int]) -> int:
    """Return the code of a machine from those of its ranks, where a negative one is a signal: 2 (something to mend)
    before any other failure, that before Ctrl-C (130), that before 75 (start again: stopped, or a rank killed or
    lost)."""
    found = set(codes)
    failed = sorted(code for code in found if code > 0 and code not in (START_AGAIN, INTERRUPTED, MEND))
    for code in (MEND, *failed, INTERRUPTED):
        if code in found:
            return code
    return START_AGAIN if found - {0} else 0


def children() -> list[int]:
    """Return the processes that this one has started (Linux)."""
    found = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in file.read_text().split()]
    return found


def pass_on(number: int, _: Any) -> None:
    """Pass a signal to the processes that this one has started, and continue to wait for them."""
    for pid in children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def pass_on_or_leave(number: int, frame: Any) -> None:
    """Forward the signal as `pass_on`, or exit at once if no process was started yet, also during an import."""
    if not children():
        os._exit(INTERRUPTED if number == signal.SIGINT else START_AGAIN)
    pass_on(number, frame)


def is_one_machine(arguments: Any) -> bool:
    """Return whether all ranks are started here, as accelerate's arguments or configuration file say."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    machines = arguments.num_machines
    file = arguments.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    if machines is None and file is not None:
        machines = getattr(load_config_from_file(file), "num_machines", None)
    return machines in (None, 1)


def main() -> NoReturn:
    """Launch, wait, and leave with `exit_code`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:  # of nohup, or a shell's background
            signal.signal(number, pass_on_or_leave)
    silence_libraries()
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from cloze.distributed.resilience.stop_signals import end_with_launcher
    from cloze.utils.terminal.screen import put_in_order

    # What torch (2.13) registers for TERM, INT, HUP and QUIT when it starts ranks; a single one is started without it.
    api._terminate_process_handler = pass_on  # type: ignore[assignment]
    if os.environ.pop(ENDS_WITH_PARENT, None):
        end_with_launcher()
    try:
        arguments = launch_command_parser().parse_args()
        if is_one_machine(arguments):
            os.environ.setdefault(SECRET, secrets.token_hex(32))
        launch_command(arguments)
    except ChildFailedError as error:
        put_in_order(2)
        sys.exit(exit_code(failure.exitcode for failure in error.failures.values()))
    except subprocess.CalledProcessError as error:
        put_in_order(2)
        sys.exit(exit_code([error.returncode]))
    except SignalException as error:
        sys.exit(exit_code([128 + error.sigval] if error.sigval == 2 else [-int(error.sigval)]))
    except ConnectionError as error:  # raised by accelerate for a port in use, which another start may find free
        show(f"cloze: error: {' '.join(str(error).split())[:300]}", sys.stderr)
        sys.exit(START_AGAIN)
    except DistError as error:
        line = " ".join(str(error).split())
        show(f"cloze: error: the machines cannot join ({line[:300]})", sys.stderr)
        sys.exit(START_AGAIN)
    sys.exit(0)


if __name__ == "__main__":
    main()
