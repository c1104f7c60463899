"""Parameters that ZeRO-3 has on a disk: DeepSpeed is never let run out of buffers for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from cloze.errors import ConfigError
from cloze.training.engines.nvme_offload import fit_buffers

UNCHANGED = {"stage3_max_reuse_distance": 10**9, "stage3_prefetch_bucket_size": "auto"}
READ_WHEN_NEEDED = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def fitted(model: torch.nn.Module, dtype: torch.dtype = torch.float32, world_size: int = 2, **offload: Any) -> dict:
    """The distances after `fit_buffers`."""
    offload = {"device": "nvme", "buffer_count": 3, "max_in_cpu": 0} | offload
    settings = {"zero_optimization": {**UNCHANGED, "offload_param": offload}}
    fit_buffers(settings, model, world_size, dtype)
    return {name: settings["zero_optimization"][name] for name in UNCHANGED}


def layers(count: int, width: int = 1024) -> torch.nn.Sequential:
    """Half of a matrix of 1024 * 1024 in fp32 is 2 MiB."""
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))


def test_more_matrices_than_buffers_are_read_when_they_are_needed():
    assert fitted(layers(3)) == UNCHANGED
    assert fitted(layers(4)) == READ_WHEN_NEEDED


def test_nothing_changes_where_no_parameter_is_on_a_disk():
    assert fitted(layers(4), device="cpu") == UNCHANGED
    assert fitted(layers(4), max_in_cpu=10**7) == UNCHANGED  # all of them stay in memory
    assert fitted(layers(4), world_size=8) == UNCHANGED  # parts below 1 MiB do
    assert fitted(layers(4), dtype=torch.bfloat16) == READ_WHEN_NEEDED  # and this is 1 MiB
    assert fitted(layers(4), dtype=torch.bfloat16, world_size=3) == UNCHANGED


def test_a_buffer_that_is_too_small_is_refused_by_the_name_of_the_parameter():
    with pytest.raises(ConfigError, match=r"part of 0\.weight has 524,288 elements, and a buffer 524,287"):
        fitted(layers(1), buffer_size=524_287)
    assert fitted(layers(1), buffer_size=524_288) == UNCHANGED


def test_fewer_buffers_than_a_module_needs_at_once_are_refused():
    with torch.device("meta"):
        lstm = torch.nn.LSTM(1024, 1024)  # two matrices
    assert fitted(lstm, buffer_count=2) == UNCHANGED
    model = torch.nn.Sequential(lstm, *layers(2))
    assert fitted(model, buffer_count=2) == READ_WHEN_NEEDED
    with pytest.raises(ConfigError, match=r"2 parameters .* buffers for them: 1"):
        fitted(model, buffer_count=1)


class Layer(GradientCheckpointingLayer):
    def __init__(self, frozen: int, trained: int, recomputed: bool):
        super().__init__()
        self.parts, self.gradient_checkpointing = layers(frozen + trained), recomputed
        self.parts[:frozen].requires_grad_(False)


def test_a_layer_that_is_recomputed_needs_all_its_frozen_matrices_at_once():
    assert fitted(Layer(3, 4, recomputed=False)) == READ_WHEN_NEEDED
    assert fitted(Layer(2, 4, recomputed=True)) == READ_WHEN_NEEDED
    assert fitted(torch.nn.Sequential(Layer(2, 1, recomputed=True), Layer(2, 1, recomputed=True))) == READ_WHEN_NEEDED
    with pytest.raises(ConfigError, match=r"4 parameters .* buffers for them: 3"):
        fitted(Layer(3, 4, recomputed=True))
