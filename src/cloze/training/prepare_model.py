"""Steps that prepare the model of a run before the first step.

check_start(config)                             # before any process has joined
head = prepare_model(model, config, data)      # before the engine wraps the model
choose_kernels(model, config, engine)
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from transformers.modeling_layers import GradientCheckpointingLayer

from cloze.config import TrainConfig
from cloze.data.batches.make_batch import fixed_capacity
from cloze.data.batches.masking import Masking
from cloze.data.train_data import TrainData
from cloze.distributed.collectives import gather
from cloze.errors import ConfigError
from cloze.model.aligned import align_output_layer
from cloze.model.archs import check_kernels, check_precision
from cloze.model.attention import as_usual, attention_names, check_attention, check_half
from cloze.model.compiled import choose_compile
from cloze.model.flops import peak_flops, step_flops
from cloze.model.overrides import first_forward, parse_overrides
from cloze.model.packed import settle_attention
from cloze.model.sparse_head import MaskedHead, check_head
from cloze.model.trained import compile_pattern, freeze_matching, freeze_unused
from cloze.training.checkpointing.engine_probe import make_probe
from cloze.training.determinism import use_same_bits, wants_same_bits
from cloze.training.engines.base import Engine, Support
from cloze.training.engines.choose_engine import requested_engine
from cloze.training.engines.precision import precision_here, precision_of_any_model
from cloze.training.logging.metrics import Throughput
from cloze.training.logging.trackers import check_trackers
from cloze.training.optim.lr_schedule import check_schedule
from cloze.training.optim.optimizers import check_optimizer, check_update
from cloze.training.run_schedule import Plan
from cloze.utils.environment import processes
from cloze.utils.system import set_tf32
from cloze.utils.terminal.console import say, warn


def check_start(config: TrainConfig) -> None:
    """Raise ConfigError for options that this machine cannot support."""
    if config.save_before_time_limit is not None and processes.slurm_job_end() is None:
        warn(f"ignored: --save_before_time_limit {config.save_before_time_limit} (SLURM sets no end time here)")
    check_optimizer(config)
    check_schedule(config)
    parse_overrides(config.config_overrides)
    if config.freeze is not None:
        compile_pattern(config.freeze)
    check_attention(config.attn_implementation, on_gpu(config))
    engine = requested_engine(config.deepspeed)
    engine.check_request(config, on_gpu(config))
    precision_here(config, model_type="")
    precision = precision_of_any_model(config)
    support = engine.requested_support(config.deepspeed, precision)
    check_together(config, support, precision, "", "cuda" if on_gpu(config) else "cpu")
    check_trackers(config)
    if config.tf32 is not None:
        set_tf32(config.tf32)
    if wants_same_bits(config, on_gpu(config)):
        use_same_bits(strict=False)  # see `settle_determinism`


def on_gpu(config: TrainConfig) -> bool:
    """Return whether this run trains on a GPU."""
    return not config.use_cpu and torch.cuda.is_available()


def prepare_model(model: Any, config: TrainConfig, data: TrainData) -> MaskedHead:
    """Set up document attention, trained parameters and activation checkpointing, before the engine wraps the model;
    return its masked-only head."""
    check_kernels(model.config)
    packed, half = data.has_documents, precision_here(config, model.config.model_type)[0] != "no"
    length = data.block_size if packed else 0
    names = attention_names(model, config.attn_implementation, length, on_gpu(config), half)
    with first_forward(config):
        documents = settle_attention(model, names, data.block_size, packed)
        with as_usual(model):
            choose_trained(model, config, data)
    if config.gradient_checkpointing:
        enable_checkpointing(model, config.gradient_checkpointing_every_n_layers)
    if half and on_gpu(config):
        align_output_layer(model)
    return MaskedHead(model, config.sparse_head, documents)


def choose_trained(model: Any, config: TrainConfig, data: TrainData) -> None:
    """Select the trained parameters, and report the frozen ones."""
    if config.freeze is not None:
        say("model", f"{freeze_matching(model, config.freeze)} parameters are not trained (--freeze)")
    unused = freeze_unused(model, data.first_blocks(config.seed))
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        say("model", f"{unused[0]}{more} have no part in the output, and are not trained")


def enable_checkpointing(model: Any, every: int = 1) -> None:
    """Recompute the activations of every `every`-th layer in the backward pass. Raises ConfigError if the architecture
    does not support it, or not for single layers."""
    where = "--gradient_checkpointing"
    if not model.supports_gradient_checkpointing:
        hint = (
            "save memory with a smaller --per_device_train_batch_size and more --gradient_accumulation_steps, or ZeRO"
        )
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing", where=where, hint=hint)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if every == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(layers) < 2:
        hint = "leave it out: all layers are recomputed then"
        what = f"{type(model).__name__} recomputes all of its layers or none"
        raise ConfigError(what, where=f"{where}_every_n_layers", hint=hint)
    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = place % every == 0


def check_together(
    config: TrainConfig, support: Support, precision: str, model_type: str, device_type: str
) -> str | None:
    """Return the mode of `choose_compile`. Raises ConfigError for options that the engine does not support. Called for
    the requested engine before data are read, and later for the actual one."""
    check_update(config, support, precision)
    support.check_precision(precision)
    return choose_compile(config, model_type, device_type, support.compiles, support.name)


def choose_kernels(model: Any, config: TrainConfig, engine: Engine) -> None:
    """Compile the backbone if that pays, before the engine wraps the model; every rank calls it.

    Raises ConfigError if model or optimizer do not work in this setup, and for GPUs of several kinds, which would
    choose different precisions.
    """
    precision, device_type = engine.accelerator.mixed_precision, engine.accelerator.device.type
    check_precision(model.config, precision)
    check_half(model.config._attn_implementation, precision)
    mode = check_together(config, engine.support, precision, model.config.model_type, device_type)
    found = sorted(set(gather(precision)))
    if len(found) > 1:
        hint = "choose one with --precision"
        raise ConfigError(f"the GPUs of this run differ ({', '.join(found)})", where="--precision", hint=hint)
    if mode is not None:
        say("model", f"{engine.compile(model, mode)} is compiled ({mode})")


def check_on_probe(
    head: MaskedHead, engine: Engine, data: TrainData, masking: Masking, seed: int
) -> dict[str, torch.Tensor]:
    """Return the batch stored with checkpoints (see `make_probe`), after checking the masked-only head on it."""
    probe, accelerator = make_probe(data.first_blocks(seed), masking), engine.accelerator
    ids = probe["input_ids"].to(accelerator.device)
    check_head(head, engine.model, {"input_ids": ids}, accelerator.mixed_precision)
    return probe


def head_capacity(plan: Plan, config: TrainConfig, accelerator: Accelerator) -> int:
    """Return the places to predict in a micro-batch: on a GPU a constant, because new shapes cost time; else 0, as
    needed."""
    if accelerator.device.type != "cuda":
        return 0
    rates = config.mlm_probability, config.mlm_probability_end or config.mlm_probability
    return max(fixed_capacity(plan.layout.per_device * plan.block_size, rate, config.mask_unit) for rate in rates)


def measure_pace(engine: Engine, config: TrainConfig, data: TrainData, plan: Plan, sparse: bool) -> Throughput:
    """Return the constants for throughput on one device."""
    tokens = plan.layout.per_device * plan.block_size
    rates = [rate for rate in (config.mlm_probability, config.mlm_probability_end) if rate is not None]
    flops = step_flops(engine.module, tokens, plan.block_size, sum(rates) / len(rates), sparse)
    return Throughput(
        token_flops=None if flops is None else flops / tokens / plan.layout.world_size,
        peak_flops=peak_flops(engine.accelerator.mixed_precision),
        filled=data.filled,
    )


def configure_async_steps(engine: Engine, config: TrainConfig) -> int:
    """Return how many steps the host may run ahead of the device: one on a GPU if the engine skips steps by itself.

    To stop at a step that is not finite, later steps in flight must not change the weights.
    """
    engine.hold_after_refusal = config.on_nonfinite == "stop"
    return int(engine.deferred and engine.accelerator.device.type == "cuda")
