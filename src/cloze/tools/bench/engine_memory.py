"""One rank of a measurement of memory: what an engine really holds, and its peak. Started by `cloze bench memory`.

RANK=0 WORLD_SIZE=2 ... python -m cloze.tools.bench.engine_memory '{"model_type": "roberta", ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from cloze.data.batches.layout import Layout
from cloze.distributed.world import RunShape, start
from cloze.model.flops import undivided
from cloze.model.sparse_head import MaskedHead
from cloze.tools.planning.model_shapes import freeze
from cloze.tools.planning.recipe import Recipe
from cloze.training.engines.base import Engine
from cloze.training.engines.choose_engine import engine_for
from cloze.training.engines.deepspeed_file import engine_settings
from cloze.training.loss import masked_loss_sum
from cloze.training.optim.optimizers import build_optimizer
from cloze.training.prepare_model import enable_checkpointing
from cloze.utils.environment import processes
from cloze.utils.memory import PeakMemory, give_back

STEPS = 3  # ZeRO-3 knows the order of the modules from the second one on


def measure(recipe: Recipe, unused: list[str], checkpointing: bool, deepspeed: str | None, precision: str) -> Any:
    """Build the model and its engine, take steps; bytes held between backward pass and step, and the peak since before
    the model was made: of anonymous memory, or on a GPU of what torch's allocator gave out. Every rank calls it."""
    from transformers import AutoModelForMaskedLM

    torch.set_num_threads(1)
    train = recipe.train
    layout = Layout(train.per_device_train_batch_size, train.gradient_accumulation_steps, 0, 1)
    accelerator = start(RunShape(train.use_cpu, precision, layout.accumulation, engine_settings(deepspeed)))
    layout = Layout(layout.per_device, layout.accumulation, accelerator.process_index, accelerator.num_processes)
    give_back()
    with PeakMemory() as peak:
        torch.manual_seed(0)
        with undivided():  # whole on every rank, as `cloze train` makes it before the processes join
            model = AutoModelForMaskedLM.from_config(recipe.model_config, dtype=torch.float32)
        freeze(model, train.freeze, unused)
        if checkpointing:
            enable_checkpointing(model)
        head = MaskedHead(model, train.sparse_head)
        optimizer, _ = build_optimizer(model, train, offload=False)
        engine = engine_for(accelerator).prepare(model, optimizer, layout, train.max_grad_norm)
        del model, optimizer
        found: dict[str, int] = {}
        for _ in range(STEPS):
            backward(engine, head, recipe, layout)
            found = engine.bytes_held()
            engine.step(1e-4, train.ema_decay)
        found |= {"optimizer": engine.bytes_held()["optimizer"]}
    return found | {"peak": peak.grown if train.use_cpu else torch.cuda.max_memory_allocated()}


def backward(engine: Engine, head: MaskedHead, recipe: Recipe, layout: Layout) -> None:
    """Run the forward and backward passes of a step on random tokens."""
    blocks, size, device = layout.per_device, recipe.block_size, engine.accelerator.device
    rows = recipe.rows(blocks, on_gpu=device.type == "cuda")
    for number in range(layout.accumulation):
        last = number == layout.accumulation - 1
        ids = torch.randint(5, 1000, (blocks, size), device=device)
        positions = torch.linspace(0, ids.numel() - 1, rows, device=device).long()
        with engine.forward_context(last):
            logits = head.logits(engine.model, {"input_ids": ids}, positions)  # stays, as in `train_step`
            loss = masked_loss_sum(logits, ids.reshape(-1)[positions]) / rows
            engine.backward(loss, last)


def main(settings: dict[str, Any]) -> None:
    """Measure with the given settings, and write the result to a file for this rank."""
    from cloze.tools.bench.memory import recipe_of

    recipe = recipe_of(settings)
    found = measure(
        recipe, settings["unused"], settings["checkpointing"], settings["deepspeed"], settings["precision"]
    )
    rank = processes.rank()
    Path(settings["folder"], f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # a process group is alive, and taking it down can abort the interpreter
