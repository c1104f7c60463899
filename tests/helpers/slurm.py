"""A real SLURM cluster on this machine, for tests: mini-slurm, one network namespace for each node.

cluster = Cluster(folder)                               # up; down() ends it, and everything on its nodes
job = cluster.sbatch("--nodes=2", "slurm/train.sbatch", "recipe.yaml", cwd=workplace)
cluster.wait(job, "COMPLETED")
cluster.tool("crash", "node2"); cluster.tool("boot", "node2")
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from repository import HELPERS, ROOT

TOOL = HELPERS / "mini-slurm"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


class Cluster:
    """Nodes node1, node2, ... of 4 CPUs and 2 pretended GPUs each; partitions `main` and `urgent`, which preempts."""

    def __init__(self, folder: Path, nodes: int = 2, **settings: str):
        # Production clusters track a step by its cgroup; pgid is nearest to that of what works in a container, for it
        # does not signal every process that a step has started (linuxproc does, and hides what is missing).
        self.settings = {"MINI_SLURM_PROCTRACK": "pgid", "MINI_SLURM_GRACE": "20", **settings}
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.env |= {"MINI_SLURM_DIR": str(folder), "MINI_SLURM_MODE": "net", "MINI_SLURM_NODES": str(nodes)}
        self.env |= self.settings
        self.folder = folder

    def up(self) -> None:
        self.tool("up")
        told = self.tool("env")
        for name, value in re.findall(r"(\w+)=(\S+)", told):
            self.env[name] = value

    def down(self) -> None:
        self.tool("down")

    def tool(self, *words: str) -> str:
        """A verb of mini-slurm."""
        done = subprocess.run([str(TOOL), *words], env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"mini-slurm {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *words: str, cwd: Path | None = None, check: bool = True, **more: str) -> str:
        """A command of SLURM's, or one that calls them."""
        done = subprocess.run(list(words), env=self.env | more, cwd=cwd, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + ("" if check else done.stderr)

    def sbatch(self, *words: str, cwd: Path, **more: str) -> str:
        """Submit; the number of the job."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **more).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Reason, ExitCode, Restarts, NodeList, ..."""
        told = self.run("scontrol", "--oneliner", "show", "job", job, check=False)
        return dict(re.findall(r"(\w+)=(\S*)", told))

    def state(self, job: str) -> str:
        return self.facts(job).get("JobState", "")

    def wait(self, job: str, wanted: str = "", seconds: float = 180.0, logs: Callable[[], str] = lambda: "") -> str:
        """Until the job has ended; its state, which has to be `wanted` where that is given."""
        state = ""
        for _ in self.until(seconds):
            state = self.state(job)
            if state in ENDED:
                break
        assert state in ENDED, f"{job} is {self.facts(job)}\n{logs()}"
        assert not wanted or state == wanted, f"{job} is {self.facts(job)}\n{logs()}"
        return state

    @staticmethod
    def until(seconds: float, pause: float = 0.2):
        """Yields again and again, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            yield
            time.sleep(pause)

    def processes(self, node: str) -> list[str]:
        """Command lines of what runs on a node, but for SLURM's own."""
        told = self.tool("on", node, "ps", "-e", "-o", "args=")
        return [
            line
            for line in told.splitlines()
            if not re.search(r"slurm|munge|^ps |^sleep |mini-slurm|^bash .*__node", line)
        ]


def make_workplace(folder: Path, prepared: Path) -> Path:
    """A folder as the repository's root is, with a recipe for a tiny model and one for its blocks."""
    for name in ("launch", "ds_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    sizes = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
    recipe = {
        "dataset_name": "blocks",
        "output_dir": "run",
        "model_type": "roberta",
        "config_overrides": f"{sizes},hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 30,
        "save_steps": 10,
        "logging_steps": 1,
        "use_cpu": True,
    }
    source = prepared.parent
    blocks = {
        "dataset_name": str(source / "corpus.jsonl"),
        "text_field": "answers.text",
        "tokenizer_name": str(source / "tokenizer"),
        "block_size": 32,
        "validation_split_percentage": 10,
        "output": "blocks",
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "tiny.prepare.yaml").write_text(yaml.safe_dump(blocks))
    return folder
