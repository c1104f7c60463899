"""From a configuration to a run that is ready to take its next step.

Everything that can be checked is checked here, before the first step and, where it can be, before any process group.

    run = set_up(config)
    first_step = resume(run)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers

from cloze.config import TrainConfig
from cloze.console import say
from cloze.data.masking import Masking
from cloze.distributed import RunShape, decide, describe, start
from cloze.errors import ConfigError
from cloze.model.load import build_model
from cloze.model.packed import DocumentAttention, document_attention
from cloze.train.checkpoint import Training
from cloze.train.data import TrainData, open_data
from cloze.train.engine import Engine, prepare_engine, restore_loss_scale, uses_offload
from cloze.train.optim import build_optimizer, learning_rate_schedule
from cloze.train.plan import Plan, check_values, plan_run
from cloze.train.probe import make_probe
from cloze.train.restore import PieceReader, find_checkpoint, load_state, read_manifest
from cloze.train.run_folder import check_same_run, open_run_folder, run_identity


@dataclass
class Run:
    """Everything one run works with."""

    config: TrainConfig
    output_dir: Path
    data: TrainData
    masking: Masking
    plan: Plan
    engine: Engine
    training: Training
    identity: dict[str, Any]
    checkpoint: Path | None
    save_model_files: Callable[[Path], None]
    schedule: Callable[[int], float]
    probe: dict[str, torch.Tensor]
    documents: DocumentAttention | None


def set_up(config: TrainConfig) -> Run:
    """Check everything that can be checked, join the processes, build model, optimizer and engine."""
    data = open_data(config)
    check_values(config, has_validation=data.validation is not None)
    check_machine(config)
    model, tokenizer = build_model(config, data.tokenizer, data.block_size, config.seed)
    documents = document_attention(model, data.block_size, len(tokenizer)) if data.has_documents else None
    if config.gradient_checkpointing:
        _enable_checkpointing(model)
    accelerator = start(_run_shape(config))
    say("world", describe(accelerator))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    plan = plan_run(config, data.num_blocks, data.block_size, rank, world_size)
    schedule = learning_rate_schedule(config, plan.total_steps)
    identity = run_identity(config, plan.layout.global_batch, data.manifest["checksum"])
    if data.streamed is not None:  # each rank has a stream of its own
        identity["world_size"] = world_size
    checkpoint = decide(lambda: choose_checkpoint(config, identity))
    output_dir = decide(lambda: open_run_folder(config, data.manifest))
    optimizer, group_names = build_optimizer(model, config, uses_offload(accelerator))
    say("model", f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    engine = prepare_engine(accelerator, model, optimizer, config)
    if accelerator.log_with:
        accelerator.init_trackers(config.run_name or output_dir.name, config=_plain_values(config))
    masking = Masking.from_manifest(
        data.manifest, config.seed, config.mlm_probability, config.mask_replace_prob, config.random_replace_prob
    )
    return Run(
        config=config,
        output_dir=output_dir,
        data=data,
        masking=masking,
        plan=plan,
        engine=engine,
        training=Training(engine.module, engine.optimizer, group_names, rank, world_size),
        identity=identity,
        checkpoint=checkpoint,
        save_model_files=partial(_save_model_files, engine.module, tokenizer),
        schedule=schedule,
        probe=make_probe(data.first_blocks(config.seed), masking),
        documents=documents,
    )


def check_machine(config: TrainConfig) -> None:
    """Raise ConfigError for what this machine cannot do."""
    precision = "fp16" if config.fp16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16" and not config.bf16 and (config.use_cpu or not torch.cuda.is_available()):
        raise ConfigError("fp16 needs a GPU", where="--fp16", hint="use --bf16, or neither")
    if config.deepspeed is not None:
        try:
            json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read it ({error})", where=config.deepspeed, hint="give a file such as ds_configs/zero2.json"
            ) from None
    installed = {str(tracker.value) for tracker in get_available_trackers()}
    for name in _trackers(config):
        if name not in installed:
            hint = f"installed here: {', '.join(sorted(installed)) or 'none'}; `pip install {name}` for it"
            raise ConfigError(f"no tracker {name}", where="--report_to", hint=hint)
    if config.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32


def choose_checkpoint(config: TrainConfig, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, if any. Raises CheckpointError if it is damaged or another run's."""
    if config.resume_from_checkpoint is None:
        return None
    folder = find_checkpoint(Path(config.output_dir), config.resume_from_checkpoint)
    if folder is not None:
        check_same_run(folder, read_manifest(folder)["run"], identity)
    return folder


def resume(run: Run) -> tuple[int, dict[str, int] | None]:
    """Put the chosen checkpoint's state into the engine; return the step to go on with, and of streamed data the
    rank's place in them."""
    if run.checkpoint is None:
        return 0, None
    manifest = read_manifest(run.checkpoint)
    with PieceReader(run.checkpoint, manifest) as pieces:
        position = load_state(run.training, pieces)
    restore_loss_scale(run.engine, manifest["loss_scale"])
    say("resume", f"from {run.checkpoint} at step {position.global_step:,}")
    places = manifest.get("stream")
    return position.global_step, places[run.plan.layout.rank] if places else None


def _run_shape(config: TrainConfig) -> RunShape:
    return RunShape(
        use_cpu=config.use_cpu,
        precision="bf16" if config.bf16 else "fp16" if config.fp16 else None,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        deepspeed=config.deepspeed,
        timeout_seconds=config.ddp_timeout,
        log_with=_trackers(config),
        project_dir=config.output_dir,
    )


def _trackers(config: TrainConfig) -> list[str]:
    return [] if config.report_to == "none" else [name.strip() for name in config.report_to.split(",")]


def _save_model_files(module: Any, tokenizer: Any, folder: Path) -> None:
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _enable_checkpointing(model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing", where="--gradient_checkpointing")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _plain_values(config: TrainConfig) -> dict[str, Any]:
    return {k: v for k, v in vars(config).items() if k != "token" and isinstance(v, bool | int | float | str)}
