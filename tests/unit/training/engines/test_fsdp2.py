"""FSDP2: what is asked for is what is trained with, and what it cannot do is said in one line."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.distributed import launch_check
from cloze.distributed.fsdp_plugin import fsdp_plugin
from cloze.distributed.launch_check import Launched, check_world, read_launcher
from cloze.errors import ConfigError, LaunchError
from cloze.training.engines.fsdp2 import SUPPORT, units
from cloze.utils.environment.settle import settle

SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: FSDP of version 1 was asked for, .*; use fsdp_version: 2"),
        (
            {"FSDP_OFFLOAD_PARAMS": "true"},
            "FSDP_OFFLOAD_PARAMS=true: cannot be used with Cloze; use ZeRO with offload",
        ),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use the option --gradient_checkpointing"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "leave parallelism_config out"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "fsdp_config: accelerate's FSDP settings: "),
    ],
)
def test_settings_under_which_it_does_not_train_are_refused(monkeypatch: pytest.MonkeyPatch, setting, message: str):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    plugin = fsdp_plugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message) as caught:
        settle_and_read()
    assert "\n" not in str(caught.value)


def settle_and_read() -> None:
    """What a start does with the environment."""
    settle(os.environ)
    fsdp_plugin()


def world(kind: DistributedType) -> SimpleNamespace:
    return SimpleNamespace(num_processes=1, distributed_type=kind, mixed_precision="no")


def test_fsdp_that_was_dropped_is_noticed():
    check_world(world(DistributedType.FSDP), Launched(fsdp=True))
    check_world(world(DistributedType.MULTI_CPU), Launched())
    with pytest.raises(LaunchError, match="accelerate dropped it"):
        check_world(world(DistributedType.MULTI_CPU), Launched(fsdp=True))


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--config_file", "launch/accelerate/fsdp2.yaml"], (False, True)),
        (["--use_fsdp", "--fsdp_version", "2"], (False, True)),
        (["--config_file", "launch/accelerate/zero2.yaml", "--use_fsdp"], (False, True)),
        (["--config_file", "launch/accelerate/fsdp2.yaml", "--use_deepspeed"], (True, False)),
        (["--config_file", "launch/accelerate/fsdp2.yaml", "--multi_gpu"], (False, False)),
    ],
)
def test_what_the_launcher_was_asked_for_is_read(monkeypatch: pytest.MonkeyPatch, words: list[str], asked):
    line = ["python", "-m", "accelerate.commands.launch", *words, "--num_processes", "2", "-m", "cloze", "train"]
    monkeypatch.setattr(launch_check, "_ancestors", lambda: [line])
    launched = read_launcher()
    assert (launched.deepspeed, launched.fsdp) == asked


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_precisions_that_do_not_go_together_with_it_are_refused(precision: str):
    SUPPORT.check_precision("bf16")
    with pytest.raises(ConfigError, match=f"--precision: FSDP2 does not support {precision}; use bf16"):
        SUPPORT.check_precision(precision)


@pytest.mark.parametrize(("model_type", "count"), [("roberta", 3), ("modernbert", 3), ("albert", 1)])
def test_each_layer_is_a_unit_and_what_is_tied_stays_together(model_type: str, count: int):
    special = {f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "cls", "sep")}
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **special, **SIZES))
    found = units(model)
    assert len(found) == count
    inside = {id(parameter) for layer in found for parameter in layer.parameters()}
    assert id(model.get_input_embeddings().weight) not in inside
    found[0].borrowed = model.get_input_embeddings()
    assert units(model) == found[1:], "a layer that holds a weight of others is gathered with them"
