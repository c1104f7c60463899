"""One rank of a measurement of memory: what an engine really holds, and its peak. Started by `cloze bench memory`.

python -m cloze.tools.bench.held '{"model_type": "roberta", ...}'        # RANK, WORLD_SIZE, ... say which rank it is

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

from cloze.data.batches.layout import Layout
from cloze.distributed.world import RunShape, start
from cloze.model.flops import undivided
from cloze.model.sparse_head import MaskedHead
from cloze.tools.planning.model_shapes import freeze
from cloze.tools.planning.recipe import Recipe
from cloze.training.engines.deepspeed_file import engine_settings
from cloze.training.engines.engine import Engine, prepare_engine
from cloze.training.engines.sharded_state import inner_optimizer, local, zero_optimizer
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
        engine = prepare_engine(accelerator, model, optimizer, layout, train.max_grad_norm)
        del model, optimizer
        found: dict[str, int] = {}
        for _ in range(STEPS):
            backward(engine, head, recipe, layout)
            found = held_by(engine)
            engine.step(1e-4, train.ema_decay)
        found |= {"optimizer": held_by(engine)["optimizer"]}
    return found | {"peak": peak.grown if train.use_cpu else torch.cuda.max_memory_allocated()}


def backward(engine: Engine, head: MaskedHead, recipe: Recipe, layout: Layout) -> None:
    """The passes of a step, on made-up tokens."""
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


def held_by(engine: Engine) -> dict[str, int]:
    """Bytes of `parameters`, `gradients` and `optimizer` (fp32 weights that are no parameters, moments, EMA) where the
    model computes, and of `host`, what DeepSpeed would keep in host memory; each storage counted once."""
    zero, inner = zero_optimizer(engine.optimizer), inner_optimizer(engine.optimizer)
    module = list(engine.module.parameters())
    gradients = [p.grad for p in module if p.grad is not None]
    for averaged in (getattr(zero, "averaged_gradients", None) or {}).values():
        gradients += averaged or []
    swapper = getattr(zero, "optimizer_swapper", None)
    for info in swapper.swap_params_info.values() if swapper is not None else []:
        gradients += info.unswapped_gradients.values()  # small ones: where there is a GPU they are on it
    owners = [p for group in inner.param_groups for p in group["params"]]
    owners += getattr(zero, "fp32_partitioned_groups_flat", [])
    state = [value for entries in inner.state.values() for value in entries.values() if torch.is_tensor(value)]
    flat = getattr(zero, "grad_partitions_flat_buffer", None)
    flat = [] if flat is None else [flat]
    seen: set[int] = set()
    host = 0
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        sums = [p.grad for p in owners if p.grad is not None]
        host = _bytes([*owners, *sums, *state, *flat, *_in_host(zero, module)], seen)
    parts = [p.ds_tensor for p in module if hasattr(p, "ds_tensor")] + [p.data for p in module]
    return {
        "parameters": _bytes(parts, seen),
        "gradients": _bytes([*gradients, *flat], seen),
        "optimizer": _bytes([*owners, *state], seen),
        "host": host,
    }


def _in_host(zero: Any, module: list[Any]) -> list[torch.Tensor]:
    """Buffers of ZeRO-Offload beside weights, gradients and moments of the optimizer, and weights that are not on the
    GPU. The optimizer's swap buffers are there with NVMe only."""
    found = list(getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", []))
    found += [getattr(zero, name) for name in ("temp_grad_buffer_for_cpu_offload",) if hasattr(zero, name)]
    found += list(getattr(zero, "accumulated_grads_in_cpu", {}).values())
    if getattr(zero, "offload_param", False):
        found += [p.ds_tensor for p in module if not p.ds_persist]
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is not None:
        found += swapper.swap_buffer_manager.all_buffers
        found.append(module[0].nvme_swapper.buffers)
    return found


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
