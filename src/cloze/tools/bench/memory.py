"""`cloze bench memory`: what `cloze plan` predicts beside what real processes take, for several architectures.

Two ranks on this machine's CPU (gloo, real DeepSpeed), made-up tokens, fresh processes for each measurement. Parts are
counted by walking through the engine's objects; the peak is that of anonymous memory since before the model was made.
The C library is set to return large blocks at once; otherwise the memory that it retains would be measured. With
`--gpu` it is one rank on a GPU, in bf16, with models of the width of BERT-base, and the peak of torch's allocator.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from cloze.config import BenchConfig, TrainConfig
from cloze.errors import ConfigError
from cloze.model.overrides import apply_overrides, parse_overrides
from cloze.tools.bench.folder import work_folder
from cloze.tools.bench.table import Table
from cloze.tools.planning.activations import quiet
from cloze.tools.planning.choose import Weighing
from cloze.tools.planning.gpus import Gpu, this_machine
from cloze.tools.planning.memory.per_rank import Memory, memory_of
from cloze.tools.planning.recipe import Recipe
from cloze.tools.planning.settings import Choice, ds_config
from cloze.utils.atomic_files import write_json
from cloze.utils.environment import processes, requests
from cloze.utils.terminal.console import say

RANKS = 2
FSDP = {requests.USE_FSDP: "true", requests.FSDP_VERSION: "2"}
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
_BASE = {
    "hidden_size=512": "hidden_size=768",
    "num_hidden_layers=6": "num_hidden_layers=12",
    "num_attention_heads=8": "num_attention_heads=12",
    "intermediate_size=2048": "intermediate_size=3072",
    "embedding_size=512": "embedding_size=768",
}
ENGINES = (Choice(None), *map(Choice, range(4)), Choice(None, fully_sharded=True))
_CPU = Gpu("this CPU", 2**40, None, 0.0, 0.0, 0.0, "no")
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def bench_memory(config: BenchConfig) -> Table:
    """Measure, and return the table: GB predicted and measured, and their ratio. Raises ConfigError for a model that
    is not known, and for `--gpu` without a GPU."""
    names = [name.strip() for name in config.sizes.split(",")] if config.sizes else list(MODELS)
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"no model {name} here", where="--sizes", hint=f"there are: {', '.join(MODELS)}")
    if config.gpu and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here", where="--gpu", hint="without --gpu it measures the CPU")
    columns = ["model", "engine", "parameters", "gradients", "optimizer", "peak, predicted MB", "measured MB", "ratio"]
    where = f"one rank on {torch.cuda.get_device_name()}, bf16" if config.gpu else f"{RANKS} ranks on the CPU"
    table = Table(f"{where}; the parts are predicted / measured", columns)
    for name in names:
        for choice in ENGINES[:-1] if config.gpu else ENGINES:  # FSDP2 is a choice for several ranks
            settings = settings_of(name, config)
            predicted, unused = predict(recipe_of(settings), choice)
            with work_folder(config.work_dir) as folder:
                found = run_ranks({**settings, "unused": unused}, choice, folder)
            worst = {key: max(one[key] for one in found) for key in found[0]}
            parts = [getattr(predicted, key) / worst[key] for key in ("parameters", "gradients", "optimizer")]
            peak = predicted.peak or 0.0
            row = (*parts, peak / 1e6, worst["peak"] / 1e6, peak / worst["peak"])
            table.add(name, choice.name, *row)
            table.write(Path(config.output) if config.output else None)
            say("bench", f"{name:<15} {choice.name:<6} " + "  ".join(f"{value:,.3f}" for value in row))
    return table


def settings_of(name: str, config: BenchConfig) -> dict[str, Any]:
    """Return the settings for a rank, without the engine."""
    blocks = config.per_device_train_batch_size or (32 if config.gpu else 8)
    overrides = MODELS[name]
    for narrow, wide in _BASE.items() if config.gpu else ():
        overrides = overrides.replace(narrow, wide)
    return {"model_type": name, "overrides": overrides, "blocks": blocks, "block_size": config.block_size,
            "precision": "bf16" if config.gpu else "no", "accumulation": 1, "checkpointing": False,
            "gpu": config.gpu}  # fmt: skip


def recipe_of(settings: dict[str, Any]) -> Recipe:
    """Return the recipe that is planned and run."""
    model_config = AutoConfig.for_model(settings["model_type"])
    apply_overrides(model_config, parse_overrides(settings.get("overrides") or MODELS[settings["model_type"]]))
    train = TrainConfig(
        output_dir="",
        per_device_train_batch_size=settings["blocks"],
        gradient_accumulation_steps=settings["accumulation"],
        precision={"no": "fp32"}.get(settings["precision"], settings["precision"]),
        ema_decay=settings.get("ema_decay"),
        weight_decay=0.01,
        use_cpu=not settings.get("gpu"),
    )
    return Recipe(train, model_config, settings["block_size"], None, None, [])


def predict(recipe: Recipe, choice: Choice) -> tuple[Memory, list[str]]:
    """Return what the plan says of `RANKS` ranks on this CPU, or of one on this GPU, and which parameters it takes to
    be unused."""
    blocks, on_gpu = recipe.train.per_device_train_batch_size, not recipe.train.use_cpu
    with quiet():
        weighing = Weighing(recipe, this_machine()[0] if on_gpu else _CPU, 1 if on_gpu else RANKS, 1)
        trace, sizes, world = weighing.trace(choice), weighing.sizes(choice), weighing.world(blocks)
    rows = recipe.rows(blocks, on_gpu)
    facts = weighing.facts
    memory = memory_of(choice, facts, world, sizes, trace, blocks, rows, blocks * recipe.block_size)
    return memory, facts.unused


def run_ranks(settings: dict[str, Any], choice: Choice, folder: Path) -> list[dict[str, int]]:
    """Start the ranks in new processes; return their results."""
    settings = {**settings, "checkpointing": choice.checkpointing, "folder": str(folder), "deepspeed": None}
    ranks = 1 if settings.get("gpu") else RANKS
    if choice.stage is not None:
        settings["deepspeed"] = str(folder / "ds_config.json")
        write_json(settings["deepspeed"], ds_config(choice))
    port = str(random.SystemRandom().randrange(20_000, 32_000))  # below Linux's ephemeral range
    world = {processes.WORLD_SIZE: str(ranks), processes.LOCAL_WORLD_SIZE: str(ranks)}
    world |= {processes.MASTER_ADDR: "127.0.0.1", processes.MASTER_PORT: port}
    if choice.fully_sharded:
        world |= FSDP
    words = [sys.executable, "-m", "cloze.tools.bench.engine_memory", json.dumps(settings)]
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    running = []
    for rank, log in enumerate(logs):
        place = (
            {**world, processes.RANK: str(rank), processes.LOCAL_RANK: str(rank)}
            if ranks > 1 or choice.stage is not None
            else {}
        )
        env = {**os.environ, **_MALLOC, **place, "OMP_NUM_THREADS": "1"}
        with open(log, "w") as out:
            running.append(subprocess.Popen(words, env=env, stdout=out, stderr=subprocess.STDOUT))
    for process, log in zip(running, logs, strict=True):
        if process.wait():
            raise RuntimeError(log.read_text()[-3000:])
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
