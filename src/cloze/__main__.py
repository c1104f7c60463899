"""`python -m cloze` is `cloze`; `accelerate launch -m cloze train ...` comes in here on every rank."""

import atexit
import os
import sys

from cloze.cli import main


def run() -> None:
    """`main`, but an error's exit code is what comes out: threads that pyarrow and datasets leave behind a stream that
    ended early sometimes abort the interpreter on its way out ("terminate called without an active exception")."""
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int) or end.code == 0:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(end.code)


if __name__ == "__main__":
    run()
