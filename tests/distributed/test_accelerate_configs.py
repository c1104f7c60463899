"""The shipped accelerate configurations start the world they promise, on a machine without a GPU too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from ranks import free_port
from repository import HELPERS, ROOT

SCRIPT = HELPERS / "show_world.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what the configurations do without a GPU")


def launch(config: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{config}.yaml"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *flags, str(SCRIPT)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def worlds(*launchers: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What every process of these launchers printed."""
    found = []
    for launcher in launchers:
        output, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, output
        found += [json.loads(line[6:]) for line in output.splitlines() if line.startswith("WORLD ")]
    return found


@pytest.mark.slow
def test_cpu_starts_two_processes_in_one_world():
    world = {"ranks": [0, 1], "engine": "DistributedDataParallel", "stage": None, "device": "cpu"}
    assert worlds(launch("cpu")) == [world, world]


@pytest.mark.slow
def test_zero3_starts_two_processes_with_deepspeed_stage_3():
    world = {"ranks": [0, 1], "engine": "DeepSpeedEngine", "stage": 3, "device": "cpu"}
    assert worlds(launch("zero3")) == [world, world]


@pytest.mark.slow
def test_fsdp2_is_dropped_by_plain_accelerate_where_no_gpu_is():
    """Why `cloze.distributed.fsdp_plugin.keep_on_cpu` is there."""
    world = {"ranks": [0, 1], "engine": "DistributedDataParallel", "stage": None, "device": "cpu"}
    assert worlds(launch("fsdp2")) == [world, world]


@pytest.mark.slow
def test_multi_node_joins_two_launchers_to_one_world():
    port = str(free_port())
    here = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    machines = [launch("multi_node", *here, "--machine_rank", rank) for rank in ("0", "1")]
    world = {"ranks": [0, 1], "engine": "DeepSpeedEngine", "stage": 2, "device": "cpu"}
    try:
        assert worlds(*machines) == [world, world]
    finally:
        for machine in machines:
            machine.kill()
