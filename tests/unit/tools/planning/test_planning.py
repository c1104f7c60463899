"""A plan predicts what a run takes: traced without weights, from the engines' own arithmetic, and says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from deepspeed.runtime.config import DeepSpeedConfig
from repository import ROOT
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.cli.commands import plan as command
from cloze.config import PlanConfig, TrainConfig
from cloze.config.parser import parse
from cloze.errors import ConfigError, ModelError
from cloze.model.sparse_head import MaskedHead
from cloze.tools.planning import activations, choose, model_shapes
from cloze.tools.planning.activations import Untraceable, trace_pass, untrained
from cloze.tools.planning.gpus import GPUS, parse_gpus
from cloze.tools.planning.memory.fsdp2 import fsdp_wire
from cloze.tools.planning.memory.parts import World
from cloze.tools.planning.memory.per_rank import Memory, host_at_start, memory_of, overlapping, partition, parts_of
from cloze.tools.planning.memory.zero_offload import pinned
from cloze.tools.planning.meta_op_cache import Repeats
from cloze.tools.planning.model_shapes import ModelFacts, Weight
from cloze.tools.planning.recipe import read_recipe
from cloze.tools.planning.settings import Choice, all_choices, bucket_sizes, ds_config
from cloze.tools.planning.speed import Load, SpeedEstimate, pace_of
from cloze.tools.planning.write_configs import write_configs
from cloze.training.loss import masked_loss_sum

SMALL = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
SHIPPED = {
    "zero0": Choice(0), "zero1": Choice(1), "zero2": Choice(2), "zero3": Choice(3),
    "zero2_offload": Choice(2, "optimizer"), "zero3_offload": Choice(3, "all"), "zero3_nvme": Choice(3, "nvme"),
}  # fmt: skip
# The first is an embedding, in no layer; the next three are a layer; the last is frozen.
WEIGHTS = [Weight(75, 600, True, 0), Weight(8, 64, True, 1), Weight(1, 8, True, 1), Weight(9, 9, True, 1)]
FACTS = ModelFacts("M", [[600, 64, 8], [9]], 10, 2, [], 8, 2, (1e6, 1e5), True, [*WEIGHTS, Weight(5, 10, False, 0)])
FSDP2 = Choice(None, fully_sharded=True)


def twin(model_type: str = "roberta", dtype: torch.dtype = torch.float32, checkpointing: bool = False, **more) -> Any:
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **(SMALL | more))
        model = AutoModelForMaskedLM.from_config(config, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# The trace.


slow = pytest.mark.slow
SPARSE = {"attention_type": "block_sparse", "block_size": 16, "max_position_embeddings": 192}  # of more than 11 blocks


@pytest.mark.parametrize(
    ("model_type", "size", "more", "rel"),  # of BigBird one mask is not seen
    [("roberta", 24, {}, 1e-3), ("bert", 24, {}, 1e-3), pytest.param("big_bird", 192, SPARSE, 0.03, marks=slow)],
)
def test_what_a_trace_keeps_is_what_autograd_keeps_on_real_tensors(model_type: str, size: int, more: Any, rel: float):
    """Saved tensors of a real forward pass, each storage once, weights and inputs left out."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **(SMALL | more))).train()
    blocks, rows = 5, 15
    ids, positions = torch.randint(5, 500, (blocks, size)), torch.arange(rows)
    head, ours = MaskedHead(model), {p.untyped_storage().data_ptr() for p in [*model.parameters(), ids, positions]}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = {b.untyped_storage().data_ptr() for b in model.buffers()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = masked_loss_sum(head.logits(model, {"input_ids": ids}, positions), positions)
    real = sum(size for pointer, size in saved.items() if pointer not in buffers)
    assert loss.requires_grad
    found = trace_pass(twin(model_type, **more), size, 3, None, on_gpu=False)
    predicted = found.activations(blocks) + found.logits(rows)
    scores = rows * SMALL["vocab_size"] * 4  # which the training loop holds beside what the loss keeps
    assert predicted == pytest.approx(real + scores, rel=rel)


def test_a_pass_of_any_size_is_a_plane_through_three_small_ones(monkeypatch: pytest.MonkeyPatch):
    model = twin()
    small = trace_pass(model, 16, 2, None, on_gpu=True)
    monkeypatch.setattr(activations, "_SHAPES", ((9, 4), (11, 4), (9, 7)))
    large = trace_pass(model, 16, 2, None, on_gpu=True)
    for blocks, rows in ((1, 2), (9, 8), (40, 100)):
        assert small.peak(blocks, rows) == pytest.approx(large.peak(blocks, rows))
        assert small.activations(blocks) == pytest.approx(large.activations(blocks))


def test_attention_keeps_its_weights_only_where_no_kernel_is_fused():
    """Between blocks of 64 and of 256 tokens, activations of a token grow by what attention keeps of it."""

    def a_token(on_gpu: bool, **more: Any) -> float:
        long, short = (trace_pass(twin(**more), size, 2, None, on_gpu).activations(1) / size for size in (256, 64))
        return long - short

    assert a_token(on_gpu=True) == pytest.approx(0, abs=1)
    assert a_token(on_gpu=False) > 2 * 192 * 4  # heads, more tokens to look at, bytes
    assert a_token(on_gpu=False, attention_probs_dropout_prob=0.0) == pytest.approx(0, abs=1)
    assert a_token(on_gpu=True, attn_implementation="eager") > 2 * 192 * 4


def test_half_precision_halves_what_is_kept_and_recomputation_keeps_little():
    def traced(dtype: torch.dtype, cast: torch.dtype | None, checkpointing: bool = False) -> activations.Trace:
        return trace_pass(twin(dtype=dtype, checkpointing=checkpointing, num_hidden_layers=2), 64, 8, cast, True)

    whole, half = traced(torch.float32, None).activations(8), traced(torch.bfloat16, None).activations(8)
    assert 0.4 * whole < half < 0.65 * whole  # masks of dropout are as large in both
    autocast, again = (traced(torch.float32, torch.bfloat16, one) for one in (False, True))
    assert half < autocast.activations(8) < whole
    assert again.activations(8) < 0.35 * autocast.activations(8)
    assert again.logits(64) == autocast.logits(64) > 64 * SMALL["vocab_size"] * 4
    assert again.peak(32, 256) < 0.75 * autocast.peak(32, 256)


def test_gradients_that_travel_at_once_take_no_room_until_the_end():
    found = trace_pass(twin(), 16, 2, None, on_gpu=True)
    elements = sum(p.numel() for p in twin().parameters())
    assert found.finished[-1] == 4 * elements
    assert found.peak(1, 2, kept=1.0) >= max(4 * elements, found.peak(1, 2, kept=0.0) + elements)
    assert found.peak(1, 2, kept=0.0, copies=4.0) > found.peak(1, 2, kept=0.0)


def test_repeated_operations_give_what_they_gave_before_and_views_stay_views(monkeypatch: pytest.MonkeyPatch):
    again, aten = Repeats(), torch.ops.aten
    one, two = (torch.empty((6, 4), device="meta") for _ in range(2))
    for _ in range(2):
        for view in (
            again.call(aten.view.default, (one, [24]), {}),
            again.call(aten._unsafe_view.default, (one, [24]), {}),
        ):
            assert view.untyped_storage()._cdata == one.untyped_storage()._cdata
        assert again.call(aten.add_.Tensor, (one, two), {}) is one
    outs = [again.call(aten.native_dropout.default, (one, 0.1, True), {}) for _ in range(2)]
    assert [(o.shape, o.dtype) for o in outs[0]] == [(o.shape, o.dtype) for o in outs[1]]
    assert outs[1][1].dtype is torch.bool
    assert len({o.untyped_storage()._cdata for pair in outs for o in pair}) == 4
    remembered = [trace_pass(twin(checkpointing=one), 16, 2, None, on_gpu=True) for one in (False, True)]
    monkeypatch.setattr(Repeats, "call", lambda self, func, args, kwargs: func(*args, **kwargs))
    for fast, one in zip(remembered, (False, True), strict=True):
        slow = trace_pass(twin(checkpointing=one), 16, 2, None, on_gpu=True)
        assert np.array_equal(fast.plane, slow.plane)


def test_a_trace_leaves_the_model_as_it_was():
    model = twin()
    first, second = (trace_pass(model, 16, 2, None, on_gpu=True) for _ in range(2))
    assert not model.roberta._forward_hooks
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert first.peak(4, 8) == second.peak(4, 8)


def test_a_model_that_looks_at_its_data_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def forward(self: Any, input_ids: Any, **_: Any) -> Any:
        return input_ids.tolist()

    monkeypatch.setattr("transformers.models.roberta.modeling_roberta.RobertaModel.forward", forward)
    with pytest.raises(Untraceable, match="meta"):
        trace_pass(twin(), 16, 2, None, on_gpu=True)
    found = run_plan(tmp_path, gpus="A10G")
    assert "cannot be traced without data" in " ".join(found["notes"])
    for one in found["choices"]:
        assert (
            one["memory"]["activations"] is one["memory"]["peak"] is one["largest_micro_batch"] is one["fits"] is None
        )
        assert one["memory"]["parameters"] > 0
    assert found["recommended"] is None


def test_parameters_without_a_part_in_the_output_are_found():
    assert untrained(twin(), 16) == []
    assert all("contact_head" in name for name in untrained(twin("esm", pad_token_id=1, mask_token_id=3), 16))
    assert untrained(twin("esm", pad_token_id=1, mask_token_id=3), 16)


# The engines.


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


# GPUs.


def test_gpus_are_known_by_the_names_people_use():
    assert parse_gpus("8xH100-80GB") == (GPUS["H100-80GB"], 8)
    assert parse_gpus("h100") == (GPUS["H100-80GB"], 1)
    assert parse_gpus("2 x NVIDIA A100 40GB")[0] is GPUS["A100-40GB"]
    assert (parse_gpus("4xT4")[0].half, parse_gpus("V100-32GB")[0].half, parse_gpus("L4")[0].half) == (
        "fp16", "fp16", "bf16",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"no GPU H1000 is known here; near to it: .*H100-80GB"):
        parse_gpus("8xH1000")
    with pytest.raises(ConfigError, match="not a number of GPUs"):
        parse_gpus("0xH100")


def test_every_gpu_has_whole_figures():
    for gpu in GPUS.values():
        assert 1e10 < gpu.memory < 2e11
        assert gpu.peak
        assert 1e13 < gpu.peak < 3e15
        assert gpu.pcie <= gpu.link < gpu.hbm


# The choice.


def row(choice: Choice, speed: float | None, problem: str | None = None) -> choose.Row:
    pace = None if speed is None else SpeedEstimate((1, 1), (speed, speed), (0.3, 0.3), 0)
    memory = Memory(1, 1, 1, 1, 1, 1, 1, 2**30, 1, 1, 0)
    return choose.Row(choice, 8, 1, 0 if problem else 8, memory, 0, 0, pace, problem, [])


def test_the_fastest_that_fits_is_taken_and_among_equals_the_least_divided():
    def best(**speeds: float | None) -> str:
        rows = [row(c, speeds.get(c.name), None if c.name in speeds else "too large") for c in all_choices(True, True)]
        found, reason = choose.recommend(rows, GPUS["T4"])
        assert reason
        return found.choice.name if found else "none"

    assert best(ddp=97.0, zero2=100.0, zero3=99.0) == "ddp"
    assert best(ddp=90.0, zero2=100.0, zero3=99.0) == "zero2"
    assert best(zero3=96.0, **{"zero1+offload": 100.0, "ddp+checkpointing": 98.0}) == "zero3"
    assert best(zero3=50.0, **{"ddp+checkpointing": 98.0}) == "ddp+checkpointing"
    assert best() == "none"


def test_a_choice_that_could_not_be_traced_is_not_recommended():
    unknown = dataclasses.replace(row(Choice(None), None), largest=None, blocks=100)
    found, _ = choose.recommend([unknown, row(Choice(2), 10.0)], GPUS["T4"])
    assert found
    assert found.choice.name == "zero2"


def test_a_plan_says_why():
    rows = [row(Choice(None), None, "not even one block fits: 90.0 GiB"), row(Choice(2), 10.0)]
    assert choose.recommend(rows, GPUS["T4"])[1].startswith("ddp cannot be taken (not even one block fits: 90.0 GiB)")
    nothing = choose.recommend([row(Choice(None), None, "x")], GPUS["T4"])
    assert nothing[0] is None
    assert "nothing fits into 15 GiB" in nothing[1]


def test_speed_is_a_range_below_the_peak_and_falls_with_messages_recomputation_and_offload():
    facts = dataclasses.replace(FACTS, groups=[[10**8]], flops=(1e11, 1e10), hidden_size=768)
    gpu, load = GPUS["A100-80GB"], Load(32, 32 * 512, 0.15, 1e9)

    def middle(choice: Choice, ranks: int = 8, network: float = 12.5e9) -> float:
        found = pace_of(choice, facts, World(ranks, 8, 1, "bf16"), gpu, load, network, 32 * 512 * ranks)
        assert found
        assert 0 < found.mfu[0] < found.mfu[1] < 0.6
        return sum(found.tokens_per_second)

    assert middle(Choice(2)) > middle(Choice(2, checkpointing=True))
    assert middle(Choice(2)) > middle(Choice(2, "optimizer")) > middle(Choice(3, "nvme"))
    assert middle(Choice(3), ranks=16) < 2 * middle(Choice(3))
    assert middle(Choice(3), ranks=16, network=1e9) < middle(Choice(3), ranks=16)


# The command.


def recipe_file(folder: Path, **more: Any) -> str:
    overrides = ",".join(f"{name}={value}" for name, value in SMALL.items())
    values = {"model_type": "roberta", "dataset_name": str(folder / "nowhere"), "output_dir": "out", "block_size": 64}
    values |= {"config_overrides": overrides, "max_steps": 10}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, **more}))
    return str(file)


def run_plan(folder: Path, recipe: dict[str, Any] | None = None, **flags: Any) -> dict[str, Any]:
    target = folder / "plan.json"
    command.run(PlanConfig(recipe=recipe_file(folder, **(recipe or {})), json=str(target), **flags))
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[choose.Plan, PlanConfig, dict[str, Any], str]:
    """A plan for 2 nodes of 2 A10G, as the command makes it: the plan, its command, its JSON, what was shown."""
    folder, made, shown = tmp_path_factory.mktemp("plan"), [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(command, "make_plan", lambda *arguments: made.append(choose.make_plan(*arguments)) or made[0])
        found = run_plan(folder, gpus="2xA10G", nodes=2)
    return made[0], PlanConfig(recipe=str(folder / "recipe.yaml"), nodes=2), found, shown.getvalue()


def test_a_plan_of_a_recipe_has_every_choice_and_one_to_take(planned: Any):
    _, _, found, shown = planned
    names = [one["name"] for one in found["choices"]]
    assert names == [one.name for one in all_choices(True, True)]
    assert (found["ranks"], found["precision"]) == (4, "bf16")
    assert found["recommended"] in names
    assert found["tokens"] == 10 * 4 * 8 * 64
    elements = found["parameters"]
    assert found["checkpoint_bytes"] == 12 * elements
    memory = found["choices"][0]["memory"]
    assert (memory["parameters"], memory["optimizer"]) == (4 * elements, 8 * elements)
    assert memory["logits"] < memory["logits_dense"]
    assert found["choices"][0]["bytes_sent_a_step"] == 2 * 3 / 4 * 4 * elements
    assert f"recommended  {found['recommended']}: " in shown
    assert "an estimate from data sheets" in shown


def test_a_choice_that_is_none_is_one_line_with_those_there_are(planned: Any):
    with pytest.raises(ConfigError, match=r"--choose zero9: no such choice here; they are: ddp, ddp[+]checkpointing"):
        choose.choose(planned[0], "zero9")


def test_a_batch_that_does_not_fit_is_split_into_passes_and_stays_the_same(tmp_path: Path):
    recipe = read_recipe(PlanConfig(recipe=recipe_file(tmp_path, per_device_train_batch_size=2**18)))
    weighing = choose.Weighing(recipe, GPUS["T4"], 1, 1)
    found = choose.weigh(weighing, Choice(3), 1e9, None)
    assert weighing.precision == "fp16"
    assert found.largest
    assert 0 < found.blocks <= found.largest < 2**18
    assert found.memory.peak
    assert found.memory.peak <= 0.9 * 16e9
    assert weighing.peak(Choice(3), found.largest + 1) > 0.9 * 16e9
    flags = parse(["train", "--output_dir", "x", *found.flags])[1]
    split = flags.per_device_train_batch_size * flags.gradient_accumulation_steps
    assert flags.global_batch_size == 2**18 or split == 2**18


def test_a_node_with_too_little_host_memory_is_left_out(tmp_path: Path):
    recipe = read_recipe(PlanConfig(recipe=recipe_file(tmp_path)))
    weighing = choose.Weighing(recipe, GPUS["A10G"], 8, 1)
    assert choose.weigh(weighing, Choice(None), 1e9, 1e4).problem == "a node needs 0 GiB of host memory"
    assert choose.weigh(weighing, Choice(None), 1e9, 1e9).problem is None


def test_this_machine_is_planned_for_where_no_gpus_are_named(tmp_path: Path):
    found = run_plan(tmp_path)
    assert found["precision"] in ("no", "bf16", "fp16")
    assert found["recommended"] == "ddp"


def test_a_model_whose_special_tokens_nobody_names_is_traced_all_the_same(tmp_path: Path):
    """ESM compares its input with the padding id, which its configuration leaves open."""
    more = "token_dropout=true,position_embedding_type=rotary,max_position_embeddings=66"
    overrides = ",".join(f"{name}={value}" for name, value in SMALL.items()) + f",{more}"
    found = run_plan(tmp_path, {"model_type": "esm", "config_overrides": overrides}, gpus="A10G")
    assert found["untraced"] is None
    assert found["choices"][0]["memory"]["peak"] > 0


def test_blocks_and_vocabulary_come_from_what_is_there(prepared: Path, tmp_path: Path):
    config = PlanConfig(recipe=recipe_file(tmp_path, dataset_name=str(prepared), config_overrides=None))
    found = read_recipe(config)
    assert (found.block_size, found.model_config.vocab_size, found.num_blocks is not None) == (32, 600, True)
    with pytest.raises(ModelError, match="the tokenizer has 1000 tokens, but the model has embeddings for 600"):
        read_recipe(PlanConfig(recipe=recipe_file(tmp_path), vocab_size=1000))
    (tmp_path / "recipe.prepare.yaml").write_text(
        "dataset_name: x\ntokenizer_name: nowhere\noutput: y\nblock_size: 48\n"
    )
    again = read_recipe(PlanConfig(recipe=recipe_file(tmp_path, config_overrides=None), vocab_size=1000))
    assert (again.block_size, again.model_config.vocab_size) == (48, 1000)
    assert read_recipe(PlanConfig(recipe=recipe_file(tmp_path), block_size=16)).block_size == 16


@pytest.mark.parametrize(
    ("recipe", "flags", "line"),
    [
        (
            {"model_type": None, "model_name_or_path": "no/where"},
            {},
            "no/where: its configuration is not on this machine",
        ),
        ({"model_type": "rowberta"}, {}, "--model_type: no masked language model of type rowberta"),
        ({"model_type": None}, {}, "which model?"),
        ({}, {"gpus": "H1000"}, "no GPU H1000 is known here"),
        ({}, {"nodes": 0}, "--nodes: must be at least 1"),
        ({"bf16": True}, {"gpus": "T4"}, "--precision: T4 has no bf16"),
        ({"global_batch_size": 3}, {"gpus": "8xT4"}, "a step has 3 blocks, too few for 8 GPUs"),
        ({"learning_rat": 1}, {}, "unknown option learning_rat"),
        ({}, {"write": "."}, "--write .: is there already"),
    ],
)
def test_what_cannot_be_planned_is_one_line(recipe: Any, flags: Any, line: str, tmp_path: Path):
    with pytest.raises(Exception) as caught:  # a ClozeError of one kind or the other
        command.run(PlanConfig(recipe=recipe_file(tmp_path, **recipe), **flags))
    assert getattr(caught.value, "exit_code", None) == 2, caught.value
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such recipe; give a YAML file"):
        command.run(PlanConfig(recipe=str(tmp_path / "no.yaml")))


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2+offload", "zero3+nvme+checkpointing", "fsdp2+checkpointing"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_files_that_are_written_are_read_by_accelerate_and_deepspeed(
    name: str, nodes: int, planned: Any, tmp_path: Path
):
    folder, plan = tmp_path / "made", dataclasses.replace(planned[0], nodes=nodes)
    write_configs(str(folder), choose.choose(plan, name), plan, planned[1])
    read = load_config_from_file(str(folder / "accelerate.yaml"))
    assert (read.num_processes, read.num_machines) == (4, nodes)
    if name == "ddp":
        assert (read.distributed_type, sorted(p.name for p in folder.iterdir())) == ("MULTI_GPU", ["accelerate.yaml"])
        return
    text = (folder / "accelerate.yaml").read_text()
    assert ("--gradient_checkpointing true" in text) == ("checkpointing" in name)
    if name.startswith("fsdp2"):
        shipped = load_config_from_file(str(ROOT / "launch/accelerate/fsdp2.yaml"))
        assert (read.distributed_type, [p.name for p in folder.iterdir()]) == ("FSDP", ["accelerate.yaml"])
        assert (read.fsdp_config, read.mixed_precision) == (shipped.fsdp_config, shipped.mixed_precision)
        return
    assert read.deepspeed_config["deepspeed_config_file"] == str(folder / "ds_config.json")
    assert ("deepspeed_multinode_launcher" in read.deepspeed_config) == (nodes > 1)
    plugin = DeepSpeedPlugin(hf_ds_config=str(folder / "ds_config.json"))
    assert plugin.zero_stage == int(name[4])
    filled = json.loads((folder / "ds_config.json").read_text().replace('"auto"', "1"))
    filled["bf16"], filled["fp16"] = {"enabled": True}, {"enabled": False}
    assert DeepSpeedConfig(filled).zero_optimization_stage == int(name[4])


def test_files_are_whole_or_not_there(planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("the machine stops here")

    plan, config = planned[:2]
    monkeypatch.setattr("cloze.tools.planning.write_configs.write_text", fail)
    with pytest.raises(RuntimeError):
        write_configs(str(tmp_path / "made"), choose.choose(plan, "zero2"), plan, config)
    assert not list(tmp_path.iterdir())
    (tmp_path / "made").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        write_configs(str(tmp_path / "made"), choose.choose(plan, "zero2"), plan, config)


def test_optimizers_keep_what_they_keep(tmp_path: Path):
    def moments(**train: Any) -> float:
        recipe = read_recipe(PlanConfig(recipe=recipe_file(tmp_path, **train)))
        return model_shapes.moments_of(recipe, model_shapes.make_twin(recipe, torch.float32))

    assert (moments(), moments(optim="sgd"), moments(optim="sgd", optim_args="momentum=0.9")) == (2, 0, 1)
    assert (moments(optim="rmsprop"), moments(optim="rmsprop", optim_args="centered=true")) == (1, 2)
    assert 1 < moments(optim="muon") < 2
    assert TrainConfig(output_dir="x").optim == "adamw_torch_fused"


def test_the_scores_of_the_batch_of_checkpoints_are_in_the_peak():
    small, sizes = trace_pass(twin(), 16, 2, None, on_gpu=True), bucket_sizes(ds_config(Choice(3)), 8)
    world = World(2, 2, 1, "no", True)
    peaks = [memory_of(Choice(None), FACTS, world, sizes, small, 1, 2, 16, n).peak for n in (0, 2, 10**6)]
    assert peaks[0] == peaks[1]
    assert peaks[2] is not None
    assert peaks[2] > small.logits(10**6)


def test_stage_3_keeps_what_is_needed_again_within_half_the_reuse_distance():
    """Gathered weights: all that passes for a small model, half the distance and what is fetched ahead for a large."""
    world = World(ranks=4, ranks_a_node=4, accumulation=1, precision="bf16")
    sizes = dataclasses.replace(bucket_sizes(ds_config(Choice(3)), 8), persistence=0, prefetch_bucket=10**6)
    matrix = 10**7
    for layers, expected in ((10, 10 * matrix), (200, 5 * 10**8 + matrix + 10**6)):
        facts = dataclasses.replace(FACTS, groups=[[matrix] * layers], frozen=0)
        for reuse in (10**9, 0):
            changed = dataclasses.replace(sizes, reuse_distance=reuse)
            gathered = expected if reuse else min(expected, matrix + 10**6)
            assert parts_of(Choice(3), facts, world, changed).buffers == 2 * (changed.reduce_bucket + gathered)
