"""What one process finds out about its own machine, as plain JSON; nothing is judged here.

facts = find_facts(process, offload="none")
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cloze
from cloze.errors import ClozeError
from cloze.tools.doctor.this_process import ThisProcess
from cloze.utils.environment import requests
from cloze.utils.foreign.json_yaml import read_json
from cloze.utils.system import versions_of

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers", "huggingface_hub")
HUB_SECONDS = 8.0


def find_facts(process: ThisProcess) -> dict[str, Any]:
    """Return the facts of this rank; DeepSpeed's kernels are tried on the first rank of each machine only."""
    return {
        "rank": process.rank,
        "local_rank": process.local_rank,
        "host": socket.gethostname(),
        "versions": find_versions(),
        "gpus": find_gpus(),
        "nvidia": bool(list(Path("/dev").glob("nvidia[0-9]*"))),
        "limits": {name: _limit(name) for name in ("nofile", "memlock")},
        "shm_bytes": _size_of("/dev/shm"),
        "infiniband": bool(_names("/sys/class/infiniband")),
        "cpus": sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "interfaces": {name: os.environ.get(name) for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")},
        "offload": find_offload(os.environ),
        "ops": find_ops() if process.first_on_host else None,
    }


def find_versions() -> dict[str, str]:
    """Return the versions of Python, of Cloze (with its commit in a git checkout) and of packages with their build
    targets."""
    import torch

    found = {"python": platform.python_version(), "cloze": cloze.__version__}
    commit = _output(["git", "-C", str(Path(cloze.__file__).parent), "describe", "--always", "--dirty"])
    if commit and (Path(cloze.__file__).parents[2] / ".git").exists():
        found["cloze"] += f" ({commit})"
    found |= dict.fromkeys(PACKAGES, "missing") | versions_of(PACKAGES)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        if torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if driver:
        found["driver"] = driver.split()[0]
    return found


def find_gpus() -> list[dict[str, Any]]:
    """Name and memory in GiB of each GPU that torch may use here; `used_gib`: what is taken already."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            found.append({"name": name, "memory_gib": total / 2**30, "used_gib": (total - free) / 2**30})
        except RuntimeError as error:
            found.append({"name": "", "memory_gib": 0.0, "used_gib": 0.0, "error": str(error).splitlines()[0]})
    return found


def find_offload(environment: Mapping[str, str]) -> str:
    """Return none, cpu or nvme: where the DeepSpeed settings of `accelerate launch` put optimizer or weights."""
    devices = requests.offload_devices(environment)
    with contextlib.suppress(ClozeError, AttributeError):
        settings = read_json(requests.deepspeed_file(environment) or "", typed=True)
        zero = settings.get("zero_optimization", {})
        devices |= {zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    return "nvme" if "nvme" in devices else "cpu" if "cpu" in devices else "none"


def find_ops() -> dict[str, Any]:
    """Return whether DeepSpeed's CPU Adam (offload to the CPU) and async_io (to NVMe) can be built here, and with
    what.

    These are the two that Cloze's runs load: on GPUs its optimizers are torch's own fused ones.
    """
    import torch

    tools: dict[str, Any] = {
        "compiler": bool(shutil.which("g++") or shutil.which("c++")),
        "ninja": bool(shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")),
    }
    if torch.cuda.is_available():
        from torch.utils.cpp_extension import CUDA_HOME

        tools["cuda_toolkit"] = CUDA_HOME is not None
    else:
        requests.run_deepspeed_on_cpu()
    try:
        with _silent():
            from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

            for name, builder in (("cpu_adam", CPUAdamBuilder), ("async_io", AsyncIOBuilder)):
                tools[name] = bool(builder().is_compatible(verbose=False))
    except Exception as error:  # DeepSpeed raises many kinds of errors: no CUDA toolkit, another one than torch's, ...
        tools["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return tools


def find_hub() -> dict[str, Any]:
    """Return the owner of the Hub token and what it lacks to push, never the token itself. `state`: absent, ok, or a
    problem."""
    found: dict[str, Any] = {"state": f"no answer within {HUB_SECONDS:.0f} s"}
    thread = threading.Thread(target=lambda: found.update(_ask_hub()), daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return dict(found)


def _ask_hub() -> dict[str, Any]:
    from huggingface_hub import get_token

    from cloze.errors import HubError
    from cloze.export.hub.client import Target, ask, connect, missing_right

    if not get_token():
        return {"state": "absent"}
    try:
        who = ask(connect(None, quiet=True).whoami, "the Hub", ())
    except HubError as error:
        return {"state": error.what}
    token = who.get("auth", {}).get("accessToken") or {}
    repo = f"{who['name']}/any"
    lacks = missing_right(who, repo, Target(repo))
    scopes = sorted(
        {one for scoped in (token.get("fineGrained") or {}).get("scoped", []) for one in scoped["permissions"]}
    )
    return {"state": "ok", "name": who["name"], "role": token.get("role"), "scopes": scopes, "lacks": lacks}


def _limit(name: str) -> int | None:
    """Return the soft limit, which applies to this process; None for no limit."""
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
    return None if soft == resource.RLIM_INFINITY else soft


def _size_of(path: str) -> int | None:
    """Return the size of the file system there in bytes; None if it cannot be read."""
    try:
        usage = os.statvfs(path)
    except OSError:
        return None
    return usage.f_blocks * usage.f_frsize


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _output(command: list[str]) -> str:
    """Return the output of a command; "" if it is missing, fails or takes 10 s."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard stdout and stderr, also of compilers that the block starts."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, fd in zip((1, 2), kept, strict=True):
            os.dup2(fd, number)
            os.close(fd)
        os.close(nowhere)
