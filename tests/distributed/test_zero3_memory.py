"""Under ZeRO-3 no process ever holds the model in memory of its own: measured, while it is drawn or loaded, checked,
cut, and handed to the engine; and the weights are to the bit those of every other engine."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import cloze_ranks, in_fresh_process, run_ranks, succeed
from small_models import build_plainly

M_MMAP_THRESHOLD = -3  # malloc.h
# 40 M parameters: 161 MB of fp32, 17 MB in the largest tensor.
WIDE = "hidden_size=1024,num_hidden_layers=3,num_attention_heads=16,intermediate_size=4096,vocab_size=600"
# 0.71 billion parameters: 2.9 GB of fp32.
HUGE = "hidden_size=2048,num_hidden_layers=12,num_attention_heads=16,intermediate_size=8192,vocab_size=50265"


def measured(folder: Path, to_the_end: bool) -> Callable[[], None]:
    """To be called in a rank: write down how much memory came on top from before the model is made until it is cut,
    and until the engine is ready; and whether the weights are those that a single process makes. `to_the_end`: train
    after that."""

    def install() -> None:
        from cloze.training import setup
        from cloze.training.engines import deepspeed
        from cloze.utils.memory import PeakMemory

        ctypes.CDLL(None).mallopt(
            M_MMAP_THRESHOLD, 1 << 20
        )  # what is freed goes back to the system, and is not counted
        engine = deepspeed.DeepSpeedEngine
        build, cut, prepare = setup.build_run_model, deepspeed.partition, engine.prepare
        peak, found = PeakMemory(), {}

        def watched_build(config, data):
            found["again"] = lambda: build_plainly(config, data)
            peak.__enter__()
            return build(config, data)

        def watched_cut(model, *arguments):
            found["bytes"] = 4 * sum(p.numel() for p in model.parameters())
            found["largest"] = 4 * max(p.numel() for p in model.parameters())
            cut(model, *arguments)
            found["cut"] = peak.grown

        def watched_prepare(*arguments):
            made = prepare(*arguments)
            peak.__exit__()
            found["ready"] = peak.grown
            again = dict(found.pop("again")().named_parameters())
            half = made.accelerator.mixed_precision != "no"
            found["same"] = all(
                torch.equal(made.whole(p).float(), (again[name].bfloat16() if half else again[name]).float())
                for name, p in made.module.named_parameters()
            )
            (folder / f"memory-{os.environ['RANK']}.json").write_text(json.dumps(found))
            if not to_the_end:
                torch.distributed.barrier()
                os._exit(0)
            return made

        setup.build_run_model, deepspeed.partition, engine.prepare = watched_build, watched_cut, watched_prepare

    return install


def train(
    model: list[str], prepared: Path, world_size: int, folder: Path, more: list[str], to_the_end: bool = True
) -> None:
    argv = ["train", *model, "--dataset_name", str(prepared), "--output_dir", str(folder / "run"), "--max_steps", "1"]
    argv += ["--per_device_train_batch_size", "1", "--save_strategy", "no", *more]
    succeed(cloze_ranks(argv, world_size, "zero3", folder / "log", measured(folder, to_the_end), timeout=1200))


def found(folder: Path, world_size: int) -> list[dict]:
    return [json.loads((folder / f"memory-{rank}.json").read_text()) for rank in range(world_size)]


def test_a_rank_takes_its_share_of_a_model_it_never_holds(prepared: Path, tmp_path: Path, figure):
    in_fresh_process(train, ["--model_type", "roberta", "--config_overrides", WIDE], prepared, 2, tmp_path, [])
    for rank in found(tmp_path, 2):
        assert rank["same"]
        figure("ZeRO-3 on 2 ranks, 160 MB of weights: MB of memory until they are cut", rank["cut"] / 1e6)
        assert rank["cut"] < 1.5 * rank["bytes"] / 2 + rank["largest"] < rank["bytes"]


def save(overrides: str, dtype: str, folder: str) -> None:
    """In a rank: a pretrained model in shards."""
    from synthetic import make_model

    make_model(overrides).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="1GB")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("most_memory")
@pytest.mark.parametrize("source", ["scratch", "float32", "bfloat16"])
@pytest.mark.parametrize("more", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_a_rank_of_three_holds_a_third_of_a_large_model(prepared: Path, tmp_path: Path, source, more, figure):
    """1.5 shares of the fp32 weights and 2 GB, in which the whole and its gradients have no room. When the engine is
    ready it holds the share four times: the model's, the optimizer's, and buffers for the gradients."""
    model = ["--model_type", "roberta", "--config_overrides", HUGE]
    if source != "scratch":
        succeed(run_ranks(save, 1, tmp_path / "save", overrides=HUGE, dtype=source, folder=str(tmp_path / "model")))
        model = ["--model_name_or_path", str(tmp_path / "model")]
    in_fresh_process(train, model, prepared, 3, tmp_path, more, False)  # a step of AdamW takes 8 GB in each rank
    for rank in found(tmp_path, 3):
        assert rank["same"]
        figure(f"0.7 billion parameters, {source}: GB of memory until cut", rank["cut"] / 1e9)
        figure(f"0.7 billion parameters, {source}: GB of memory until the engine is ready", rank["ready"] / 1e9)
        assert rank["cut"] < 1.5 * rank["bytes"] / 3 + 2e9 < 2 * rank["bytes"]
        assert rank["ready"] < 4.5 * rank["bytes"] / 3 + 1e9
