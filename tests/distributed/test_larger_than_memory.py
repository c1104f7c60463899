"""The proof: a model whose training state is three times the memory that a process may have is trained by three
processes with ZeRO-3 and offload to a disk, resumed, consolidated and evaluated, each under that limit; one process
without a limit computes the same losses.

The kernel enforces the limit on the whole process: Python, torch, DeepSpeed and their buffers count. The state is 12
bytes a parameter, the fp32 weight and AdamW's two moments; gradients come on top. So the three processes together have
as much memory as the state is large, and a part of that for nothing else than being processes: a part of the state has
to be on the disk.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from memory_limit import MemoryGroup, memory_group
from ranks import compile_async_io, free_port
from repository import ROOT

# 429 million parameters: 5.1 GB of state. The largest tensor has 9.4 million elements.
MODEL = ["--model_type", "roberta", "--config_overrides"]
MODEL += [
    "hidden_size=1536,num_hidden_layers=15,num_attention_heads=12,intermediate_size=6144,"
    "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
]
PARAMETERS = 428_000_000
LIMIT = 12 * PARAMETERS // 3
# From the third step on, unless a checkpoint interrupts it, DeepSpeed knows the order of the modules and plans by it.
FLAGS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-4", "--seed", "1"]
WORLD = 3


def settings(folder: Path) -> Path:
    """ds_configs/zero3_nvme.json for this model: buffers of the size of its tensors, nothing kept in memory."""
    compile_async_io()
    found = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    zero = found["zero_optimization"]
    zero |= {"sub_group_size": 4_000_000, "stage3_max_live_parameters": 30_000_000}
    zero |= {"stage3_prefetch_bucket_size": 10_000_000, "reduce_bucket_size": 10_000_000}
    zero["offload_optimizer"] |= {"nvme_path": str(folder / "disk")}
    zero["offload_param"] |= {"nvme_path": str(folder / "disk"), "buffer_size": 3_500_000, "buffer_count": 6}
    zero["offload_param"]["max_in_cpu"] = 0
    for offload in (zero["offload_optimizer"], zero["offload_param"]):
        offload["pin_memory"] = False  # it is done by copying, for which there is no room
    path = folder / "settings.json"
    path.write_text(json.dumps(found))
    return path


def run(argv: list[str], groups: list[MemoryGroup | None], log_dir: Path, timeout: float = 1500, before: str = ""):
    """`cloze ARGV` on fresh processes, each in its group; their exit codes and what they printed."""
    log_dir.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes, logs = [], [log_dir / f"rank-{rank}.log" for rank in range(len(groups))]
    for rank, group in enumerate(groups):
        code = (group.enter if group else "") + before
        code += "import torch; torch.set_num_threads(1)\nimport cloze.cli, sys; cloze.cli.main(sys.argv[1:])"
        # What is freed goes back to the system: else holes in glibc's heap count too.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        if len(groups) > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(groups))}
            environment |= {"LOCAL_WORLD_SIZE": str(len(groups)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with logs[rank].open("w") as log:
            command = [sys.executable, "-c", code, *argv]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [log.read_text() for log in logs]


def limited(argv: list[str], world_size: int, log_dir: Path) -> list[int]:
    """The same under the limit; every process must end well. The most memory that each had at once."""
    with memory_group("a", LIMIT) as a, memory_group("b", LIMIT) as b, memory_group("c", LIMIT) as c:
        groups = [a, b, c][:world_size]
        codes, outputs = run(argv, groups, log_dir)
    assert codes == [0] * world_size, "\n".join(outputs)
    return [group.peak for group in groups]


def losses(folder: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_three_processes_train_what_is_three_times_as_large_as_each_may_be(prepared: Path, tmp_path: Path, figure):
    flags = [*MODEL, *FLAGS, "--dataset_name", str(prepared)]
    plain, divided = tmp_path / "plain", tmp_path / "divided"
    one = ["train", *flags, "--output_dir", str(plain), "--save_strategy", "no", "--per_device_train_batch_size", "3"]
    codes, outputs = run(one, [None], tmp_path / "log-plain")
    assert codes == [0], outputs[0]

    three = ["train", *flags, "--output_dir", str(divided), "--per_device_train_batch_size", "1"]
    three += ["--deepspeed", str(settings(tmp_path)), "--resume_from_checkpoint", "auto"]
    peaks = limited(three, WORLD, tmp_path / "log-train")
    manifest = json.loads((divided / "checkpoint-4" / "checkpoint.json").read_text())
    numel = sum(math.prod(facts["shape"]) for facts in manifest["parameters"].values())
    assert 12 * numel >= 3 * LIMIT
    first = losses(divided)
    shutil.rmtree(divided / "checkpoint-4")
    peaks += limited(three, WORLD, tmp_path / "log-resume")
    for found in (first, losses(divided)):
        figure("larger than memory: losses against one process", abs(found / losses(plain) - 1).max())
        np.testing.assert_allclose(found, losses(plain), rtol=1e-4)
    peaks += limited(["consolidate", str(divided)], 1, tmp_path / "log-consolidate")
    peaks += limited(["evaluate", str(divided), "--data", str(prepared)], 1, tmp_path / "log-evaluate")
    assert json.loads((divided / "eval.json").read_text())["perplexity"] > 1
    figure("larger than memory: the most memory of a process, in limits", max(peaks) / LIMIT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["alone", "zero2"])
def test_the_limit_bites_without_offload_and_says_so(prepared: Path, tmp_path: Path, engine: str):
    """Alone: address space for data (RLIMIT_DATA) ends, which Python can still say. On three ranks of ZeRO-2: the
    kernel ends a process, and the others say whom they have lost."""
    argv = ["train", *MODEL, *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    if engine == "alone":
        before = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}))\n"
        codes, outputs = run(argv, [None], tmp_path / "log", before=before)
        assert codes == [2]
        assert "cloze: error: roberta: there is not enough memory for the whole model" in outputs[0].splitlines()[-1]
        return
    argv += ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json")]
    with memory_group("a", LIMIT) as a, memory_group("b", LIMIT) as b, memory_group("c", LIMIT) as c:
        codes, outputs = run(argv, [a, b, c], tmp_path / "log", timeout=600)
    assert -signal.SIGKILL in codes
    assert all(code != 0 for code in codes)
    survivors = [output for code, output in zip(codes, outputs, strict=True) if code != -signal.SIGKILL]
    assert all("cloze: error: " in output for output in survivors)
