"""What torch reports about a machine's GPUs is used as documented.

Query functions of torch, which compute nothing, are replaced by answers from real machines. Tests that compute on a
GPU are in tests/distributed/test_on_gpu.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from cloze.config import TrainConfig
from cloze.distributed import collectives
from cloze.distributed.world import check_device
from cloze.errors import ConfigError, LaunchError
from cloze.model.flops import peak_flops
from cloze.tools.api.local_workers import launcher_flags
from cloze.tools.doctor.facts import find_gpus
from cloze.tools.planning.gpus import GPUS, this_machine
from cloze.training import find_batch_size
from cloze.training.engines import deepspeed_schema
from cloze.training.logging.metrics import peak_memory
from cloze.training.logging.sessions import device_name
from cloze.training.optim import optimizers
from cloze.training.prepare_model import configure_async_steps
from cloze.training.trainer import seed_dropout
from cloze.utils.environment import processes

GIB = 2**30
CUDA = torch.device("cuda", 0)
Answer = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Make torch answer as on a machine with `count` GPUs of one kind; queries about GPU `broken` raise."""

    def answer(name: str, memory: int, capability: tuple[int, int] = (9, 0), count: int = 1, broken: int = -1) -> None:
        def of(value: object) -> Callable[[object], object]:
            def asked(device: object = None) -> object:
                if device == broken:
                    raise RuntimeError("CUDA error: unknown error\nCompile with TORCH_USE_CUDA_DSA")
                return value

            return asked

        properties = SimpleNamespace(name=name, total_memory=memory)
        for question, value in {
            "get_device_properties": properties,
            "get_device_name": name,
            "get_device_capability": capability,
            "mem_get_info": (memory // 4, memory),
            "memory_reserved": 700,
            "memory_allocated": 500,
            "max_memory_allocated": 900,
        }.items():
            monkeypatch.setattr(torch.cuda, question, of(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return answer


@pytest.mark.parametrize(
    ("name", "memory", "capability", "like", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 85_029_158_912, (9, 0), "H100-80GB", "bf16"),
        ("NVIDIA H200", 150_110_011_392, (9, 0), "H200", "bf16"),
        ("NVIDIA A100-SXM4-40GB", 42_298_834_944, (8, 0), "A100-40GB", "bf16"),
        ("NVIDIA A100-SXM4-80GB", 84_987_740_160, (8, 0), "A100-80GB", "bf16"),
        ("NVIDIA A100 80GB PCIe", 84_987_740_160, (8, 0), "A100-PCIE-80GB", "bf16"),
        ("Tesla V100-SXM2-32GB", 34_072_559_616, (7, 0), "V100-32GB", "fp16"),
        ("Tesla T4", 15_835_398_144, (7, 5), "T4", "fp16"),
    ],
)
def test_the_gpus_of_a_machine_are_found_in_the_catalogue(
    gpus: Answer, name: str, memory: int, capability: tuple[int, int], like: str, half: str
):
    gpus(name, memory, capability, count=8)
    gpu, count = this_machine()
    known = GPUS[like]
    assert (gpu.name, gpu.memory, gpu.half, count) == (name, memory, half, 8)
    assert (gpu.peak, gpu.hbm, gpu.link, gpu.pcie) == (known.peak, known.hbm, known.link, known.pcie)
    assert gpu.half == known.half
    assert peak_flops(half) == known.peak
    assert peak_flops("no") is None


def test_a_gpu_that_is_not_in_the_catalogue_has_no_peak_and_the_links_of_pcie_4(gpus: Answer):
    gpus("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * GIB)
    gpu, _ = this_machine()
    assert (gpu.peak, gpu.memory, gpu.link, gpu.pcie) == (None, 10 * GIB, 32e9, 32e9)
    assert peak_flops("bf16") is None


def test_the_doctor_names_each_gpu_and_the_error_of_a_broken_one(gpus: Answer):
    gpus("NVIDIA L4", 24 * GIB, count=2, broken=1)
    good, bad = find_gpus()
    assert good == {"name": "NVIDIA L4", "memory_gib": 24.0, "used_gib": 18.0}
    assert bad == {"name": "", "memory_gib": 0.0, "used_gib": 0.0, "error": "CUDA error: unknown error"}


def test_peak_memory_counts_tensors_and_free_memory_includes_what_torch_keeps_unused(gpus: Answer):
    gpus("NVIDIA L4", 4000)
    assert device_name(CUDA) == "NVIDIA L4"
    assert peak_memory(CUDA) == 900
    assert find_batch_size._free(CUDA) == 1000 + 200


@pytest.mark.parametrize(
    ("deferred", "device", "policy", "unread"),
    [
        (True, "cuda", "stop", 1),
        (True, "cuda", "skip", 1),
        (True, "cuda", "rollback", 1),
        (False, "cuda", "stop", 0),
        (True, "cpu", "skip", 0),
    ],
)
def test_the_host_runs_ahead_if_the_gpu_refuses_bad_steps_itself(
    deferred: bool, device: str, policy: str, unread: int
):
    engine = SimpleNamespace(deferred=deferred, accelerator=SimpleNamespace(device=torch.device(device)))
    assert configure_async_steps(engine, TrainConfig(output_dir="", on_nonfinite=policy)) == unread
    assert engine.hold_after_refusal is (policy == "stop")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dropout_is_seeded_on_every_device(device: str):
    torch.manual_seed(0)
    seed_dropout(7, torch.device(device))
    first = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def launched(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    for name in ("ACCELERATE_USE_CPU", "DS_ACCELERATOR", processes.LAUNCHED_LOCAL_RANK):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))


def test_a_process_that_sees_only_its_own_gpu_gives_libraries_index_0_and_keeps_its_rank(gpus: Answer, monkeypatch):
    launched(monkeypatch, 3)
    gpus("NVIDIA L4", 24 * GIB, count=1)
    check_device(on_cpu=False, wants_deepspeed=True)
    assert os.environ["LOCAL_RANK"] == "0"
    assert processes.local_rank() == 3


@pytest.mark.parametrize(("visible", "on_cpu"), [(4, False), (1, True)])
def test_a_process_that_sees_all_gpus_or_uses_none_keeps_its_local_rank(
    gpus: Answer, monkeypatch, visible: int, on_cpu: bool
):
    launched(monkeypatch, 3)
    gpus("NVIDIA L4", 24 * GIB, count=visible)
    check_device(on_cpu=on_cpu, wants_deepspeed=False)
    assert os.environ["LOCAL_RANK"] == "3"
    assert processes.LAUNCHED_LOCAL_RANK not in os.environ


@pytest.mark.parametrize(
    ("environment", "on_cpu", "deepspeed", "line"),
    [
        ({}, False, False, "process 3 of this machine, but 2 GPUs are visible.*--num_processes"),
        ({"ACCELERATE_USE_CPU": "true"}, False, False, "use the CPU, but there is a GPU; add --use_cpu"),
        ({"ACCELERATE_USE_CPU": "true"}, True, True, "both the CPU and DeepSpeed"),
        ({"DS_ACCELERATOR": "cpu"}, False, True, "DS_ACCELERATOR: is cpu, and this run uses a GPU"),
        ({"DS_ACCELERATOR": "cuda"}, True, True, "DS_ACCELERATOR: is cuda, and this run uses the CPU"),
    ],
)
def test_an_environment_that_asks_for_another_device_is_a_one_line_error(
    gpus: Answer, monkeypatch, environment: dict[str, str], on_cpu: bool, deepspeed: bool, line: str
):
    launched(monkeypatch, 3)
    gpus("NVIDIA L4", 24 * GIB, count=2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=line):
        check_device(on_cpu, deepspeed)


@pytest.mark.parametrize(
    ("gpu", "use_cpu", "ids"), [(True, False, "all"), (True, True, "-1,-1"), (False, False, "-1,-1")]
)
def test_ranks_of_a_notebook_are_given_all_gpus_or_none(monkeypatch, gpu: bool, use_cpu: bool, ids: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert f"--gpu_ids={ids}" in launcher_flags(TrainConfig(output_dir="", use_cpu=use_cpu), 2)


def test_messages_between_ranks_are_sent_from_the_memory_that_the_backend_wants(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for backend, device in (("gloo", torch.device("cpu")), ("nccl", torch.device("cuda", 2))):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda group, backend=backend: backend)
        assert collectives._device(None) == device


def test_gpu_direct_storage_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(deepspeed_schema, "schema", deepspeed_schema.schema.__wrapped__)  # without its cache
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    deepspeed_schema.check_values({"aio": {"use_gds": True}}, "ds.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="use_gds: cannot be true: it needs a GPU"):
        deepspeed_schema.check_values({"aio": {"use_gds": True}}, "ds.json")


@pytest.mark.parametrize("compiler", ["/usr/bin/g++", None])
def test_offload_on_a_gpu_uses_deepspeeds_adam_if_it_can_be_compiled(gpus: Answer, monkeypatch, capsys, compiler):
    gpus("NVIDIA L4", 24 * GIB)
    monkeypatch.setattr(optimizers.shutil, "which", lambda name: compiler)
    compiled: list[str] = []
    monkeypatch.setattr(optimizers, "load_op", lambda builder, why: compiled.append(type(builder).__name__))
    config = TrainConfig(output_dir="", adam_beta2=0.95, adam_epsilon=1e-6)
    make, arguments = optimizers._choose(config, offload=True)
    assert (arguments["betas"], arguments["eps"]) == ((0.9, 0.95), 1e-6)
    assert make.__name__ == ("DeepSpeedCPUAdam" if compiler else "AdamW")
    assert compiled == (["CPUAdamBuilder"] if compiler else [])
    assert ("no C++ compiler" in capsys.readouterr().err) is (compiler is None)
    assert optimizers._choose(config, offload=False)[0] is torch.optim.AdamW
