"""Started by `accelerate launch` in the tests: prints the world that plain accelerate makes of a configuration."""

from __future__ import annotations

import json
import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

deepspeed_asked = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
if deepspeed_asked:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 37 s of compiling

accelerator = Accelerator(cpu=not deepspeed_asked, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = torch.nn.Linear(4, 4)
if deepspeed_asked:
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 1
    config["zero_optimization"]["reduce_bucket_size"] = 1000  # accelerate fills these in from a model's config,
    config["zero_optimization"]["stage3_prefetch_bucket_size"] = 1000  # and this model has none
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
engine, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
world = {
    "ranks": sorted(ranks),
    "engine": type(engine).__name__,
    "stage": engine.zero_optimization_stage() if deepspeed_asked else None,
    "device": accelerator.device.type,
}
sys.stdout.write(f"WORLD {json.dumps(world)}\n")  # one write, so that lines of two ranks stay apart
sys.stdout.flush()
torch.distributed.destroy_process_group()
os._exit(0)
