"""What each engine holds, by its own arithmetic: parameters, gradients, buffers, and what is offloaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from planned_models import FACTS, FSDP2, run_plan, twin
from repository import ROOT

from cloze.tools.planning.activations import trace_pass
from cloze.tools.planning.memory.fsdp2 import fsdp_wire
from cloze.tools.planning.memory.parts import World
from cloze.tools.planning.memory.per_rank import host_at_start, memory_of, overlapping, partition, parts_of
from cloze.tools.planning.memory.zero_offload import pinned
from cloze.tools.planning.model_shapes import Weight
from cloze.tools.planning.settings import Choice, bucket_sizes, ds_config

SHIPPED = {
    "zero0": Choice(0), "zero1": Choice(1), "zero2": Choice(2), "zero3": Choice(3),
    "zero2_offload": Choice(2, "optimizer"), "zero3_offload": Choice(3, "all"), "zero3_nvme": Choice(3, "nvme"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_is_told_what_the_shipped_files_tell_it(name: str):
    assert ds_config(SHIPPED[name]) == json.loads((ROOT / f"ds_configs/{name}.json").read_text())


def test_automatic_buckets_follow_the_width_as_in_accelerate():
    sizes = bucket_sizes(ds_config(Choice(3)), 768)
    assert (sizes.reduce_bucket, sizes.prefetch_bucket, sizes.persistence) == (589824, 530841, 7680)
    assert bucket_sizes(ds_config(Choice(3)), None).reduce_bucket == 5 * 10**8


def test_a_flat_tensor_is_padded_and_cut_as_deepspeed_does_it():
    assert partition([5, 4], 4) == 4  # 9 elements: 16 are the next multiple of 2 * 4
    assert [overlapping([10, 3, 3], 4, rank) for rank in range(4)] == [[10], [10], [10, 3], [3, 3]]


@pytest.mark.parametrize(
    ("stage", "precision", "parameters", "gradients", "optimizer"),
    [
        (None, "no", 4 * 691, 4 * 681, 8 * 681),
        (None, "bf16", 4 * 691, 4 * 681, 8 * 681),
        (0, "no", 4 * 691, 4 * 681, 8 * 681),
        (0, "bf16", 2 * 691, 2 * 681, 12 * 681),
        (2, "bf16", 2 * (672 + 12 + 10), 2 * (672 + 9), 12 * (336 + 6)),
        (2, "no", 4 * (672 + 12 + 10), 4 * (672 + 9), 12 * (336 + 6)),
        (3, "bf16", 2 * (300 + 32 + 4 + 5 + 5 + 8 + 9 + 64), 2 * (300 + 32 + 4 + 5 + 5), 12 * (300 + 32 + 4 + 5 + 5)),
    ],
)
def test_two_ranks_hold_what_each_engine_allocates(
    stage: int | None, precision: str, parameters: int, gradients: int, optimizer: int
):
    """A group of 600 + 64 + 8 elements and one of 9, and 10 that are not trained; small ones stay whole in ZeRO-3."""
    parts = parts_of(Choice(stage), FACTS, World(2, 2, 1, precision), bucket_sizes(ds_config(Choice(3)), 8), None)
    assert (parts.parameters, parts.gradients, parts.optimizer) == (parameters, gradients, optimizer)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp2_divides_parameters_by_their_rows_and_keeps_them_in_fp32(precision: str):
    """Of 75 rows of 8 the first rank of two has 38, of one row it has all, of 9 it has 5; frozen: 3 of 5 rows of 2."""
    trained, frozen, whole = 38 * 8 + 32 + 8 + 5, 3 * 2, 38 * 8 * 2 + 64 + 16 + 10
    once, often = (
        parts_of(FSDP2, FACTS, World(2, 2, n, precision), bucket_sizes(ds_config(FSDP2), 8)) for n in (1, 4)
    )
    assert once.parameters == 4 * (trained + frozen)
    assert once.gradients == 4 * trained
    assert once.optimizer == 8 * trained
    assert (once.waiting, often.waiting) == (0, 4 * FACTS.trained)  # no_sync keeps them whole, in fp32
    width = 4 if precision == "no" else 2
    layer = whole - 38 * 8 * 2
    assert once.buffers == width * (38 * 8 * 2 + 6 * 2) + (3 * width + 4) * layer
    # The embedding's gradient stays whole to the end of the pass; of a layer's, this rank's half in fp32.
    assert once.kept.tolist() == [1, 4 / width / 2, 4 / width / 2, 4 / width / 2, 1]


def test_fsdp2_gathers_frozen_weights_too_and_reduces_no_gradients_of_theirs():
    for precision, width in (("no", 4), ("bf16", 2)):  # two passes; layers are gathered for the backward pass again
        assert fsdp_wire(FACTS, World(2, 2, 2, precision)) == (width * 2 * (691 + 81) + 4 * 681) / 2


def test_gradients_of_a_layer_are_let_go_of_and_those_of_the_rest_are_not():
    found = trace_pass(twin(), 16, 2, None, on_gpu=True)
    number = len(list(twin().parameters()))
    assert sorted(set(found.which)) == list(range(-1, number))
    assert found.peak(1, 2, kept=np.ones(number)) == found.peak(1, 2, kept=1.0)
    assert found.peak(1, 2, kept=np.zeros(number)) == found.peak(1, 2, kept=0.0)
    for place, parameter in enumerate(twin().parameters()):  # so much of one that nothing else counts
        expected = 1e6 * 4 * parameter.numel()
        assert found.peak(1, 2, kept=1e6 * np.eye(number)[place]) == pytest.approx(expected, abs=1e6)


def test_a_whole_model_counts_where_ranks_have_no_memory_but_the_hosts():
    small = trace_pass(twin(), 16, 2, None, on_gpu=True)
    facts = dataclasses.replace(FACTS, frozen=10**9, weights=[Weight(1, 1, True, 1)] * len(list(twin().parameters())))
    sizes = bucket_sizes(ds_config(Choice(3)), 8)
    cpu, gpu = (memory_of(FSDP2, facts, World(2, 2, 1, "no", on), sizes, small, 1, 2, 16).peak for on in (False, True))
    assert cpu == 4 * facts.elements > gpu


def test_fsdp2_is_no_choice_for_one_rank_or_in_fp16(tmp_path: Path):
    for flags in ({"gpus": "T4", "nodes": 2}, {"gpus": "A10G"}):
        names = [one["name"] for one in run_plan(tmp_path, **flags)["choices"]]
        assert "zero3" in names
        assert "fsdp2" not in names


def test_what_is_offloaded_is_counted_tensor_by_tensor():
    """Parts of 336 and 6 elements. Stage 2 keeps the second rank's gradients, of 600, 64, 8 and 9 elements, whole
    between passes, stage 1 none; both have a buffer for the largest parameter."""
    sizes = bucket_sizes(ds_config(Choice(3)), 8)

    def host(stage: int, offload: str, passes: int) -> float:
        return parts_of(Choice(stage, offload), FACTS, World(2, 2, passes, "bf16", False), sizes).host

    held = (336 + 6) * (4 + 4 + 2 + 8) + 2 * 600
    assert (host(1, "optimizer", 1), host(1, "optimizer", 2), host(2, "optimizer", 1)) == (held, held, held)
    assert host(2, "optimizer", 2) == held + 2 * (600 + 64 + 8 + 9)
    part = 300 + 32 + 4 + 5
    assert host(3, "optimizer", 2) == part * (4 + 4 + 2 + 8)
    assert host(3, "all", 2) == part * (4 + 4 + 2 + 8 + 2)


def test_what_is_locked_takes_the_next_power_of_two_on_a_machine_with_gpus():
    assert (pinned([1000, 1024, 1025], on_gpu=True), pinned([1000, 1025], on_gpu=False)) == (1024 + 1024 + 2048, 2025)


def test_files_of_nvme_offload_hold_gradients_of_a_mib_and_smaller_ones_stay_on_the_gpu():
    """Pieces of 10^6 and of 10^5 elements in a sub-group that goes to the disk; vectors in one that does not."""
    facts = dataclasses.replace(FACTS, groups=[[2 * 10**6, 2 * 10**5], [2000]], weights=[])
    found = parts_of(Choice(3, "nvme"), facts, World(2, 2, 1, "bf16", False), bucket_sizes(ds_config(Choice(3)), 8))
    assert found.gradients == 4 * 10**5
    assert found.nvme == 12 * 1.1e6 + 4 * 1e6
    assert found.host == 16 * 1.1e6 + 2 * 5e8 + 16 * 1000 + 2 * 2 * (1.1e6 + 1000)


def test_what_is_offloaded_is_on_the_host_and_not_on_the_gpu():
    world, sizes = World(2, 2, 1, "bf16"), bucket_sizes(ds_config(Choice(3)), 8)
    for stage in (1, 2, 3):
        here, away = (parts_of(Choice(stage, offload), FACTS, world, sizes) for offload in ("none", "optimizer"))
        assert here.host == away.optimizer == away.gradients == 0
        assert away.host >= here.optimizer
    weights = parts_of(Choice(3, "all"), FACTS, world, sizes)
    assert weights.parameters < parts_of(Choice(3, "optimizer"), FACTS, world, sizes).parameters


def test_a_model_is_made_in_host_memory_by_every_rank_and_under_zero3_in_files():
    for stage in (None, 0, 1, 2):
        assert host_at_start(Choice(stage), FACTS) == 4 * FACTS.elements
    largest = max(size for group in FACTS.groups for size in group)
    assert host_at_start(Choice(3), FACTS) == 4 * largest < 4 * FACTS.elements


def test_several_passes_keep_gradients_while_the_next_one_runs():
    sizes = bucket_sizes(ds_config(Choice(3)), 8)
    for stage in (None, 0, 1, 2):
        one, four = (parts_of(Choice(stage), FACTS, World(2, 2, n, "bf16"), sizes).waiting for n in (1, 4))
        assert four > one
