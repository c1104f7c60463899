"""One rank of a measurement of memory: what an engine really holds, and its peak. Started by `cloze bench memory`.

python -m cloze.bench.held '{"model_type": "roberta", ...}'        # RANK, WORLD_SIZE, ... say which rank it is

held_by(engine)        # bytes of parameters, gradients and optimizer, found by walking through its objects
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from cloze.data.loader import Layout
from cloze.distributed import RunShape, start
from cloze.memory import PeakMemory, give_back
from cloze.model.flops import undivided
from cloze.model.sparse_head import MaskedHead
from cloze.planning.recipe import Recipe
from cloze.planning.shapes import freeze
from cloze.train.engine import Engine, prepare_engine
from cloze.train.equip import enable_checkpointing
from cloze.train.loss import masked_loss_sum
from cloze.train.optim import build_optimizer
from cloze.train.state import inner_optimizer, local, zero_optimizer

STEPS = 3  # ZeRO-3 knows the order of the modules from the second one on


def measure(recipe: Recipe, unused: list[str], checkpointing: bool, deepspeed: str | None, precision: str) -> Any:
    """Build the model and its engine, take steps on the CPU; bytes held between backward pass and step, and the peak
    of anonymous memory since before the model was made. Every rank calls it."""
    from transformers import AutoModelForMaskedLM

    torch.set_num_threads(1)
    train = recipe.train
    layout = Layout(train.per_device_train_batch_size, train.gradient_accumulation_steps, 0, 1)
    accelerator = start(RunShape(True, precision, layout.accumulation, deepspeed))
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
        engine = prepare_engine(accelerator, model, optimizer, layout, train.max_grad_norm)
        del model, optimizer
        found: dict[str, int] = {}
        for _ in range(STEPS):
            backward(engine, head, recipe, layout)
            found = held_by(engine)
            engine.step(1e-4, train.ema_decay)
        found |= {"optimizer": held_by(engine)["optimizer"]}
    return found | {"peak": peak.grown}


def backward(engine: Engine, head: MaskedHead, recipe: Recipe, layout: Layout) -> None:
    """The passes of a step, on made-up tokens."""
    blocks, size = layout.per_device, recipe.block_size
    rows = recipe.rows(blocks, on_gpu=False)
    for number in range(layout.accumulation):
        last = number == layout.accumulation - 1
        ids = torch.randint(5, 1000, (blocks, size))
        positions = torch.linspace(0, ids.numel() - 1, rows).long()
        with engine.forward_context(last):
            logits = head.logits(engine.model, {"input_ids": ids}, positions)  # stays, as in `train_step`
            loss = masked_loss_sum(logits, ids.reshape(-1)[positions]) / rows
            engine.backward(loss, last)


def held_by(engine: Engine) -> dict[str, int]:
    """Bytes of `parameters`, `gradients` and `optimizer` (fp32 weights that are no parameters, moments, EMA), each
    storage counted once, under the first of these names."""
    zero, inner = zero_optimizer(engine.optimizer), inner_optimizer(engine.optimizer)
    module = list(engine.module.parameters())
    parameters = [p.ds_tensor for p in module if hasattr(p, "ds_tensor")] + [p.data for p in module]
    gradients = [p.grad for p in module if p.grad is not None]
    flat = getattr(zero, "grad_partitions_flat_buffer", None)
    gradients += [flat] if flat is not None else []
    for averaged in (getattr(zero, "averaged_gradients", None) or {}).values():
        gradients += averaged or []
    owners = [p for group in inner.param_groups for p in group["params"]]
    owners += getattr(zero, "fp32_partitioned_groups_flat", [])
    state = [value for entries in inner.state.values() for value in entries.values() if torch.is_tensor(value)]
    seen: set[int] = set()
    return {
        "parameters": _bytes(parameters, seen),
        "gradients": _bytes(gradients, seen),
        "optimizer": _bytes([*owners, *state], seen),
    }


def _bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def main(settings: dict[str, Any]) -> None:
    """Measure what the settings say, and write it to a file for this rank."""
    from cloze.bench.memory import recipe_of

    recipe = recipe_of(settings)
    found = measure(
        recipe, settings["unused"], settings["checkpointing"], settings["deepspeed"], settings["precision"]
    )
    rank = int(os.environ["RANK"])
    Path(settings["folder"], f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # a process group is alive, and taking it down can abort the interpreter
