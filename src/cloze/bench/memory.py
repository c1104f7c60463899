"""`cloze bench memory`: what `cloze plan` predicts beside what real processes take, for several architectures.

Two ranks on this machine's CPU (gloo, real DeepSpeed), made-up tokens, fresh processes for each measurement. Parts are
counted by walking through the engine's objects; the peak is that of anonymous memory since before the model was made.
The C library is told to give large blocks back at once, as else what it keeps for itself would be measured.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from cloze.bench.folder import work_folder
from cloze.bench.table import Table
from cloze.config import BenchConfig, TrainConfig
from cloze.console import say
from cloze.errors import ConfigError
from cloze.files import write_json
from cloze.model.overrides import apply_overrides, parse_overrides
from cloze.planning.activations import quiet
from cloze.planning.choose import Weighing
from cloze.planning.gpus import Gpu
from cloze.planning.memory import Memory, memory_of
from cloze.planning.recipe import Recipe
from cloze.planning.settings import Choice, ds_config

RANKS = 2
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
_USUAL = "hidden_size=512,num_hidden_layers=6,num_attention_heads=8,intermediate_size=2048"
_SPECIAL = "pad_token_id=1,bos_token_id=0,eos_token_id=2,cls_token_id=0,sep_token_id=2"  # within the vocabulary
MODELS = {
    "roberta": f"{_USUAL},vocab_size=30000",
    "bert": f"{_USUAL},vocab_size=30000",
    "modernbert": f"{_USUAL},vocab_size=30000,{_SPECIAL}",
    "deberta-v2": f"{_USUAL},vocab_size=30000",
    "electra": f"{_USUAL},vocab_size=30000,embedding_size=512",
    "xlm-roberta-xl": f"{_USUAL},vocab_size=30000",
}
ENGINES = (Choice(None), *map(Choice, range(4)), Choice(None, fully_sharded=True))
_CPU = Gpu("this CPU", 2**40, None, 0.0, 0.0, 0.0, "no")
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def bench_memory(config: BenchConfig) -> Table:
    """Measure, and return the table: GB predicted and measured, and their ratio."""
    names = [name.strip() for name in config.sizes.split(",")] if config.sizes else list(MODELS)
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"no model {name} here", where="--sizes", hint=f"there are: {', '.join(MODELS)}")
    columns = ["model", "engine", "parameters", "gradients", "optimizer", "peak, predicted MB", "measured MB", "ratio"]
    table = Table(f"{RANKS} ranks on the CPU; the parts are predicted / measured", columns)
    for name in names:
        for choice in ENGINES:
            settings = settings_of(name, config)
            predicted, unused = predict(recipe_of(settings), choice)
            with work_folder(config.work_dir) as folder:
                found = run_ranks({**settings, "unused": unused}, choice, folder)
            worst = {key: max(one[key] for one in found) for key in found[0]}
            parts = [getattr(predicted, key) / worst[key] for key in ("parameters", "gradients", "optimizer")]
            peak = predicted.peak or 0.0
            row = (*parts, peak / 1e6, worst["peak"] / 1e6, peak / worst["peak"])
            table.add(name, choice.name, *row)
            say("bench", f"{name:<15} {choice.name:<6} " + "  ".join(f"{value:,.3f}" for value in row))
    return table


def settings_of(name: str, config: BenchConfig) -> dict[str, Any]:
    """What a rank is told, but for the engine."""
    blocks = config.per_device_train_batch_size or 8
    return {"model_type": name, "blocks": blocks, "block_size": config.block_size, "precision": "no",
            "accumulation": 1, "checkpointing": False}  # fmt: skip


def recipe_of(settings: dict[str, Any]) -> Recipe:
    """The recipe that is planned and run."""
    model_config = AutoConfig.for_model(settings["model_type"])
    apply_overrides(model_config, parse_overrides(settings.get("overrides") or MODELS[settings["model_type"]]))
    train = TrainConfig(
        output_dir="",
        per_device_train_batch_size=settings["blocks"],
        gradient_accumulation_steps=settings["accumulation"],
        precision={"no": "fp32"}.get(settings["precision"], settings["precision"]),
        ema_decay=settings.get("ema_decay"),
        weight_decay=0.01,
        use_cpu=True,
    )
    return Recipe(train, model_config, settings["block_size"], None, None, [])


def predict(recipe: Recipe, choice: Choice) -> tuple[Memory, list[str]]:
    """What the plan says of `RANKS` ranks on this CPU, and which parameters it takes to be unused."""
    blocks = recipe.train.per_device_train_batch_size
    with quiet():
        weighing = Weighing(recipe, _CPU, RANKS, 1)
        trace, sizes, world = weighing.trace(choice), weighing.sizes(choice), weighing.world(blocks)
    rows = recipe.rows(blocks, on_gpu=False)
    facts = weighing.facts
    memory = memory_of(choice, facts, world, sizes, trace, blocks, rows, blocks * recipe.block_size)
    return memory, facts.unused


def run_ranks(settings: dict[str, Any], choice: Choice, folder: Path) -> list[dict[str, int]]:
    """Start the ranks in fresh processes; what each of them found."""
    settings = {**settings, "checkpointing": choice.checkpointing, "folder": str(folder), "deepspeed": None}
    if choice.stage is not None:
        settings["deepspeed"] = str(folder / "ds_config.json")
        write_json(settings["deepspeed"], ds_config(choice))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if choice.fully_sharded:
        world |= FSDP
    words = [sys.executable, "-m", "cloze.bench.held", json.dumps(settings)]
    logs = [folder / f"rank-{rank}.log" for rank in range(RANKS)]
    running = []
    for rank, log in enumerate(logs):
        env = {**os.environ, **_MALLOC, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with open(log, "w") as out:
            running.append(subprocess.Popen(words, env=env, stdout=out, stderr=subprocess.STDOUT))
    for process, log in zip(running, logs, strict=True):
        if process.wait():
            raise RuntimeError(log.read_text()[-3000:])
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
