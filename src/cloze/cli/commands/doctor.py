"""`cloze doctor`: are these machines fit to train on?"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

from cloze.config import DoctorConfig
from cloze.errors import LaunchError, Stopped
from cloze.tools.doctor.this_process import ThisProcess, announce, find_this_process
from cloze.utils.atomic_files import write_json
from cloze.utils.output_file import check_output_file
from cloze.utils.terminal.console import show


def run(config: DoctorConfig) -> int:
    """Examine all ranks and print the table on rank 0; return 0, or 2 if a row is red."""
    process = find_this_process(os.environ)
    if config.json is not None:
        config = dataclasses.replace(config, json=str(check_output_file(config.json, "give another --json")))
    if process.world_size == 1:
        from cloze.tools.doctor.examine import alone

        return _conclude(config, alone(config))
    announce(process)
    # Read once, by `import torch`: the table reports failures, so torch need not.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        code, line = _together(config, process), ""
    except LaunchError as error:
        # cloze.cli.command_line lets rank 0 speak only; here it is the rank that cannot reach it which knows.
        code, line = error.exit_code, f"error: {error}"
    except Stopped as stop:
        code, line = stop.exit_code, "" if process.rank else str(stop)
    except KeyboardInterrupt:
        code, line = 128 + signal.SIGINT, "" if process.rank else "interrupted"
    if line:
        show(f"cloze: {line}", sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's groups of two are left to the operating system: see cloze.cli.command_line.leave


def _together(config: DoctorConfig, process: ThisProcess) -> int:
    from cloze.tools.doctor.meeting import join, part  # it needs no torch to find out that rank 0 cannot be reached

    meeting = join(process, config.timeout)
    from cloze.tools.doctor.examine import examine

    findings = examine(config, meeting)
    return part(meeting, _conclude(config, findings) if findings else 0)


def _conclude(config: DoctorConfig, findings: dict) -> int:
    """Judge the facts and print the rows."""
    from cloze.tools.doctor.report import judge, show

    rows = judge(findings)
    show(rows)
    if config.json:
        write_json(Path(config.json), {"findings": findings, "rows": [dataclasses.asdict(row) for row in rows]})
    return 2 if any(row.state == "bad" for row in rows) else 0
