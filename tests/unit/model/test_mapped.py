"""Weights in mapped files are the same bits as weights in memory, and leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, set_seed

from cloze.errors import ConfigError, DiskError
from cloze.model import mapped
from cloze.model.mapped import folder_for_weights, is_mapped, move_to_file, weights_in_files, zeros_in_file
from cloze.model.trained import freeze_unused
from cloze.training.engines.choose_engine import requested_engine
from cloze.training.engines.zero3 import check_zero

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def make(model_type: str = "roberta"):
    set_seed(5)
    config = AutoConfig.for_model(model_type, vocab_size=60, **SMALL)
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)


def same_bits(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    here, there = (model.state_dict() for model in (one, other))
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("model_type", ["roberta", "deberta-v2", "electra"])
def test_weights_drawn_into_files_are_those_drawn_into_memory(tmp_path: Path, model_type: str):
    with weights_in_files(tmp_path):
        inside = make(model_type)
    assert same_bits(inside, make(model_type))
    large = [parameter for parameter in inside.parameters() if parameter.dim() > 1]
    assert large
    assert all(is_mapped(parameter) for parameter in large)
    assert not any(is_mapped(parameter) for parameter in make(model_type).parameters())  # the hook is gone


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_pretrained_weights_in_files_are_those_in_memory_also_in_shards_and_half_precision(tmp_path: Path, stored):
    make().to(stored).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with weights_in_files(tmp_path):
        inside = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert same_bits(inside, plain)
    assert all(is_mapped(parameter) for parameter in inside.parameters() if parameter.dim() > 1)
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_files_of_weights_have_no_names_so_that_nothing_is_left_behind(tmp_path: Path):
    with weights_in_files(tmp_path):
        inside = make()
    assert list(tmp_path.iterdir()) == []
    assert inside is not None


def test_a_parameter_keeps_its_strides_in_a_file(tmp_path: Path):
    parameter = torch.nn.Parameter(torch.arange(12.0).view(3, 4).t())
    move_to_file(parameter, tmp_path)
    assert parameter.stride() == (1, 4)
    assert torch.equal(parameter, torch.arange(12.0).view(3, 4).t())


def test_zeros_in_a_file_are_zeros(tmp_path: Path):
    zeros = zeros_in_file(5000, torch.float32, tmp_path)
    assert is_mapped(zeros)
    assert torch.equal(zeros, torch.zeros(5000))


def test_a_full_disk_is_one_line_before_anything_is_written(tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError), weights_in_files(tmp_path):
        make()
    assert list(tmp_path.iterdir()) == []


def test_files_of_weights_go_to_the_runs_folder_where_temporary_files_are_in_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(mapped.tempfile, "tempdir", None)
    monkeypatch.setattr(mapped, "file_system", lambda path: "ext4")
    assert folder_for_weights(Path("run")) == tmp_path.resolve()
    monkeypatch.setattr(mapped, "file_system", lambda path: "tmpfs")
    assert folder_for_weights(Path("run")) == Path("run/.weights")


def test_the_file_system_of_a_path_is_that_of_its_nearest_mount():
    assert mapped.file_system(Path("/proc/self")) == "proc"


def requested(deepspeed: str | None) -> str:
    return requested_engine(deepspeed).requested_support(deepspeed, "no").name


def test_the_stage_is_known_before_the_processes_join(tmp_path: Path, monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert requested(None) == "single process"
    assert requested(str(settings)) == "DeepSpeed ZeRO-3"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert requested(None) == "DeepSpeed ZeRO-2"  # accelerate's own
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    assert requested(None) == "DeepSpeed ZeRO-1"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(settings))
    assert requested(None) == "DeepSpeed ZeRO-3"


def test_finding_unused_parameters_keeps_one_gradient_at_a_time():
    model = make()
    most = 0

    def count(_: object) -> None:
        nonlocal most
        most = max(most, sum(parameter.grad is not None for parameter in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    assert freeze_unused(model, np.arange(5, 17).reshape(1, 12)) == []
    assert most == 1
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights needs CUDA kernels"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "nontrainable_weights needs CUDA kernels"),
        ({"stage": 3, "zero_quantized_gradients": True}, "zero_quantized_gradients needs CUDA kernels"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "a part of ZeRO-3, not of stage 2"),
        ({"stage": 3, "zero_hpz_partition_size": 4}, "6 processes are no multiple of zero_hpz_partition_size=4"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload to a disk needs a nvme_path"),
    ],
)
def test_what_zero_cannot_do_here_is_one_line(tmp_path: Path, monkeypatch, zero: dict, expected: str):
    monkeypatch.setenv("WORLD_SIZE", "6")
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ConfigError, match=expected):
        check_zero(str(settings), on_gpu=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}))
    check_zero(str(settings), on_gpu=False)


def test_offload_to_a_disk_without_libaio_says_what_to_install(tmp_path: Path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    settings = tmp_path / "settings.json"
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "disk")}
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": offload}}))
    with pytest.raises(ConfigError, match="libaio-dev"):
        check_zero(str(settings), on_gpu=False)


def test_a_rank_that_has_finished_may_remove_the_folder_at_any_moment(tmp_path: Path, monkeypatch):
    folder, plain, removed = tmp_path / "run" / ".weights", tempfile.mkstemp, []

    def mkstemp(*arguments, **named):
        if len(removed) < 3:
            removed.append(1)
            folder.rmdir()
        return plain(*arguments, **named)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    assert zeros_in_file(3, torch.float32, folder).tolist() == [0, 0, 0]
    assert len(removed) == 3
