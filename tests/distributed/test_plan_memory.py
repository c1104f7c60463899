"""What `cloze plan` says of parameters, gradients and optimizer is what real engines hold on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from corpus import TINY_MODEL
from ranks import compile_async_io, run_ranks, succeed
from repository import ROOT

from cloze.tools.bench.memory import FSDP, predict, recipe_of
from cloze.tools.planning.settings import Choice, ds_config
from cloze.utils.atomic_files import write_json

SIZES = "hidden_size=128,num_hidden_layers=2,num_attention_heads=4,intermediate_size=512,vocab_size=6000"
FSDP2 = Choice(None, fully_sharded=True)
slow = pytest.mark.slow


def _measure(settings: dict[str, Any], unused: list[str], deepspeed: str | None, folder: str) -> None:
    from cloze.cli.command_line import leave
    from cloze.tools.bench.engine_memory import measure

    os.environ |= FSDP if settings["fsdp2"] else {}
    recipe = recipe_of(settings)
    found = measure(recipe, unused, settings["checkpointing"], deepspeed, settings["precision"])
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave(0)


@pytest.mark.parametrize(
    ("choice", "precision", "accumulation", "ema_decay", "model_type"),
    [
        (Choice(2), "bf16", 2, 0.9, "roberta"),
        pytest.param(Choice(None), "no", 1, None, "bert", marks=slow),
        pytest.param(Choice(None), "bf16", 2, 0.9, "roberta", marks=slow),
        pytest.param(Choice(0), "no", 1, None, "roberta", marks=slow),
        pytest.param(Choice(0), "bf16", 2, 0.9, "roberta", marks=slow),
        pytest.param(Choice(1), "no", 1, None, "esm", marks=slow),
        pytest.param(Choice(1), "bf16", 2, 0.9, "roberta", marks=slow),
        pytest.param(Choice(2), "no", 1, None, "electra", marks=slow),
        pytest.param(Choice(3), "no", 1, None, "bert", marks=slow),
        pytest.param(Choice(3), "bf16", 2, 0.9, "roberta", marks=slow),
        pytest.param(FSDP2, "no", 1, None, "esm", marks=slow),
        pytest.param(FSDP2, "bf16", 2, 0.9, "roberta", marks=slow),
        pytest.param(Choice(1, "optimizer"), "bf16", 2, None, "roberta", marks=slow),
        pytest.param(Choice(2, "optimizer"), "bf16", 2, 0.9, "roberta", marks=slow),
        pytest.param(Choice(2, "optimizer"), "no", 1, None, "bert", marks=slow),
        pytest.param(Choice(3, "optimizer"), "bf16", 2, None, "roberta", marks=slow),
        pytest.param(Choice(3, "all"), "no", 1, None, "electra", marks=slow),
        pytest.param(Choice(3, "nvme"), "bf16", 2, None, "roberta", marks=slow),
    ],
    ids=lambda value: value.name if isinstance(value, Choice) else None,
)
def test_two_ranks_hold_what_the_plan_says(
    choice: Choice, precision: str, accumulation: int, ema_decay: float | None, model_type: str, tmp_path: Path
):
    overrides = SIZES + (",pad_token_id=1,mask_token_id=3" if model_type == "esm" else "")
    settings = {"model_type": model_type, "overrides": overrides, "precision": precision, "ema_decay": ema_decay}
    settings |= {"blocks": 2, "block_size": 32, "accumulation": accumulation, "checkpointing": False}
    settings["fsdp2"] = choice.fully_sharded
    deepspeed = None
    if choice.stage is not None:
        deepspeed = str(tmp_path / "ds_config.json")
        text = json.dumps(ds_config(choice)).replace("/local_nvme", str(tmp_path / "disk"))
        write_json(deepspeed, json.loads(text))
        if choice.offload == "nvme":
            compile_async_io()
    predicted, unused = predict(recipe_of(settings), choice)
    work = {"settings": settings, "unused": unused, "deepspeed": deepspeed, "folder": str(tmp_path)}
    succeed(run_ranks(_measure, 2, tmp_path / "log", **work))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for part in ("parameters", "gradients", "optimizer", "host"):  # the plan is for the rank that holds the most
        assert getattr(predicted, part) == pytest.approx(max(one[part] for one in found), rel=0.02), part
    files = sum(file.stat().st_size for file in tmp_path.glob("disk/**/rank0/*.swp"))
    assert predicted.nvme == pytest.approx(files, rel=0.02)


@slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what the files do without a GPU")
@pytest.mark.parametrize("choice", ["ddp", "zero3+checkpointing", "fsdp2"])
def test_training_starts_from_the_files_of_a_plan(choice: str, prepared: Path, tmp_path: Path):
    """`cloze plan --write`, and then the very command that it shows."""
    recipe = {"dataset_name": str(prepared), "output_dir": str(tmp_path / "run"), "max_steps": 2}
    recipe |= {name.lstrip("-"): value for name, value in zip(TINY_MODEL[::2], TINY_MODEL[1::2], strict=True)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [sys.executable, "-m", "cloze", "plan", "recipe.yaml", "--gpus", "2xA10G", "--choose", choice]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env["PYTHONPATH"] = str(ROOT / "src")
    run = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*words, "--write", "made"], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    shown = next(line for line in done.stdout.splitlines() if line.startswith("written"))
    trained = subprocess.run(shown.split("; ")[1].split(), **run)  # type: ignore[call-overload]
    assert trained.returncode == 0, trained.stdout + trained.stderr
    engine = {"ddp": "DDP", "zero3+checkpointing": "DeepSpeed ZeRO-3", "fsdp2": "FSDP2"}[choice]
    assert engine in trained.stdout
    assert "2 ranks" in trained.stdout
