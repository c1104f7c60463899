"""The devices, ranks, engine and versions of each start of a run, in RUN/sessions.json.

A run may move between machines, numbers of ranks and engines; the model card lists them.

    note_session(output_dir, accelerator, first_step=120)
"""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from cloze.distributed.collectives import gather
from cloze.distributed.resilience.run_owner import check_owner
from cloze.training.engines.base import Engine
from cloze.utils import run_files
from cloze.utils.atomic_files import auxiliary_write, write_json
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.system import processor, versions_of

LIBRARIES = ("cloze", "torch", "transformers", "accelerate", "deepspeed")


def note_session(output_dir: Path, engine: Engine, first_step: int) -> None:
    """Add this start, from step `first_step` on, to RUN/sessions.json; every rank calls it.

    Starts whose steps are all repeated are removed. Hosts are counted, not named.
    """
    accelerator = engine.accelerator
    everyone = gather((socket.gethostname(), device_name(accelerator.device)))
    if not accelerator.is_main_process:
        return
    session = {
        "first_step": first_step,
        "ranks": accelerator.num_processes,
        "hosts": len({host for host, _ in everyone}),
        "devices": dict(Counter(device for _, device in everyone)),
        "engine": engine.support.name,
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "versions": versions_of(LIBRARIES),
    }
    check_owner(output_dir)
    kept = [one for one in read_sessions(output_dir) if one["first_step"] < first_step]
    with auxiliary_write(output_dir / run_files.SESSIONS):
        write_json(output_dir / run_files.SESSIONS, {"sessions": [*kept, session]})


def read_sessions(run_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of RUN/sessions.json; [] if the file is missing."""
    sessions = read_mapping(run_dir / run_files.SESSIONS).get("sessions")
    return [one for one in sessions if isinstance(one, dict)] if isinstance(sessions, list) else []


def device_name(device: torch.device) -> str:
    """Return a name like `NVIDIA H100 80GB HBM3`, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else device.type
