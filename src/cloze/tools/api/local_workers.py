"""Train in processes of their own, for a caller that has only called a function, such as a notebook's kernel.

    train_in_processes(config, num_processes=2)

They are what `accelerate launch -m cloze train` starts: nothing is inherited from the caller, who may have computed
with threads or on a GPU, which a fork does not survive; and a process group, which cannot be taken down safely, ends
with them. What they print, the caller prints. Ctrl-C is passed on; they save a checkpoint and end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from cloze.config import TrainConfig
from cloze.errors import ClozeError, ConfigError, Stopped, TrainingError
from cloze.tools.launch.launcher import ENDS_WITH_PARENT, INTERRUPTED, START_AGAIN
from cloze.utils.shareable import split_secrets
from cloze.utils.terminal.console import show

_ERROR = "cloze: error: "


def train_in_processes(config: TrainConfig, num_processes: int) -> None:
    """Train a run on `num_processes` processes of this machine. Raises ClozeError or Stopped; KeyboardInterrupt if a
    checkpoint was saved after Ctrl-C."""
    if num_processes < 1:
        raise ConfigError("must be at least 1", where="num_processes")
    with tempfile.TemporaryDirectory(prefix="cloze-") as folder:
        file = Path(folder) / "train.yaml"
        values, secrets = split_secrets(dataclasses.asdict(config))
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        words = [sys.executable, "-m", "cloze.tools.launch.launcher", *launcher_flags(config, num_processes)]
        code, said = _follow([*words, "-m", "cloze", "train", "--config", str(file)], num_processes, secrets)
    if code == 0:
        return
    if code == INTERRUPTED:
        raise KeyboardInterrupt(said)
    if code == START_AGAIN:
        raise Stopped(said)
    error = ClozeError if code == ClozeError.exit_code else TrainingError
    raise error(said.removeprefix(_ERROR) or f"a process ended with exit code {code}", hint=None)


def launcher_flags(config: TrainConfig, num_processes: int) -> list[str]:
    """Return accelerate's flags: DDP, or DeepSpeed with the settings that `config` names."""
    flags = ["--num_processes", str(num_processes), "--num_machines", "1", "--main_process_port", "0"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if config.deepspeed is not None:
        return [*flags, "--use_deepspeed", "--deepspeed_config_file", config.deepspeed]
    if num_processes > 1:
        # Also on a CPU, where accelerate needs `--multi_gpu` to start several processes; no GPU is visible to them
        # then.
        gpus = ",".join(["-1"] * num_processes) if config.use_cpu or not torch.cuda.is_available() else "all"
        flags += ["--multi_gpu", "--rdzv_backend", "static", f"--gpu_ids={gpus}"]
    return flags


def _follow(words: list[str], num_processes: int, secrets: dict[str, str]) -> tuple[int, str]:
    """Run a command, print what it prints, pass Ctrl-C on; return its exit code, and its last line of Cloze's own.
    `secrets`: variables of its environment that hold what must not be written anywhere."""
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **secrets}
    environment |= {ENDS_WITH_PARENT: "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    # A session of its own: a notebook's interrupt goes to the kernel's whole process group, and would come twice.
    child = subprocess.Popen(words, env=environment, start_new_session=True, text=True, errors="replace", **pipes)  # type: ignore[call-overload]
    said = ""
    with child:
        while True:
            try:
                for line in child.stdout:
                    show(line.removesuffix("\n"))
                    if line.startswith("cloze: ") and not line.startswith("cloze: warning"):
                        said = line.strip()
                return child.wait(), said.removeprefix("cloze: ") if _ERROR not in said else said
            except KeyboardInterrupt:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGINT)
            except BaseException:
                child.kill()
                raise
