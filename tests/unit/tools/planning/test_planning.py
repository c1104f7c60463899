"""A plan says what a run takes on which GPUs, with which engine, and what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from deepspeed.runtime.config import DeepSpeedConfig
from planned_models import FACTS, SMALL, recipe_file, run_plan, twin
from repository import ROOT

from cloze.cli.commands import plan as command
from cloze.config import PlanConfig, TrainConfig
from cloze.config.parser import parse
from cloze.errors import ConfigError, ModelError
from cloze.tools.planning import choose, model_shapes
from cloze.tools.planning.activations import trace_pass
from cloze.tools.planning.gpus import GPUS, parse_gpus
from cloze.tools.planning.memory.parts import World
from cloze.tools.planning.memory.per_rank import Memory, memory_of, parts_of
from cloze.tools.planning.recipe import read_recipe
from cloze.tools.planning.settings import Choice, all_choices, bucket_sizes, ds_config
from cloze.tools.planning.speed import Load, SpeedEstimate, pace_of
from cloze.tools.planning.write_configs import write_configs
from cloze.training.optim.optimizers import moments_of

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
        return moments_of(model_shapes.make_twin(recipe, torch.float32), recipe.train)

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
