"""The user's DeepSpeed configuration: the file that --deepspeed or the launcher names, read and checked in one place.

    settings = asked_settings(config.deepspeed)         # None without such a file
    check_settings(settings, where, config)             # before any process has joined

Every key is honoured, set by Cloze (a value of the user's own must agree), without effect here, or refused. Files for
transformers' Trainer have `optimizer` and `scheduler`, which are flags of Cloze.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from cloze.config import TrainConfig
from cloze.environment import requests
from cloze.environment.processes import world_size
from cloze.errors import ConfigError
from cloze.foreign.json_yaml import read_json

# DeepSpeed does what these say.
_HONOURED = """
    zero_optimization bf16 bfloat16 fp16 aio communication_data_type prescale_gradients gradient_predivide_factor
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown
    dump_state disable_allgather disable_python_gc log_level comms_logger flops_profiler timers data_types nebula
    tensorboard wandb comet csv_monitor monitor_config
"""
# Cloze sets these from its flags.
SET_BY_FLAGS = {
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
}
# Cloze does this itself: what to use instead.
REPLACED = {
    "optimizer": "--optim, --learning_rate, --weight_decay and --adam_beta1",
    "scheduler": "--lr_scheduler_type, --warmup_steps and --learning_rate",
    "amp": "--precision",
    "torch_autocast": "--precision",
    "elasticity": "--global_batch_size, which holds for any number of processes",
    "autotuning": "`cloze plan` and --auto_find_batch_size",
}
# They would change what is computed, or how the model is divided, and Cloze does not support them.
_UNSUPPORTED = """
    sparse_attention pipeline tensor_parallel expert_parallel sequence_parallel_size hybrid_engine
    compression_training curriculum_learning data_efficiency progressive_layer_drop eigenvalue quantize_training
    weight_quantization use_data_before_expert_parallelism seq_parallel_communication_data_type
    managed_gradient_accumulation
"""
# Only code that calls DeepSpeed's own functions for them would notice.
WITHOUT_EFFECT = {
    "activation_checkpointing": "use --gradient_checkpointing",
    "checkpoint": "Cloze writes its own checkpoints",
    "datastates_ckpt": "Cloze writes its own checkpoints",
    "compile": "use --torch_compile",
    "dataloader_drop_last": "Cloze draws its own batches",
}
_OTHERS = ("train_batch_size", "gradient_allreduce_op")
HONOURED, UNSUPPORTED = frozenset(_HONOURED.split()), frozenset(_UNSUPPORTED.split())
KNOWN = HONOURED | SET_BY_FLAGS.keys() | REPLACED.keys() | UNSUPPORTED | WITHOUT_EFFECT.keys() | set(_OTHERS)


def settings_file(deepspeed: str | None) -> str | None:
    """Return the path of the file that --deepspeed or else the launcher names, or None."""
    if deepspeed is None and not requests.wants_deepspeed():
        return None
    return deepspeed or requests.deepspeed_file()


def asked_settings(deepspeed: str | None) -> dict[str, Any] | None:
    """Return what that file says, None without one. Raises ConfigError if it cannot be read, or has no ZeRO stage."""
    file = settings_file(deepspeed)
    if file is None:
        return None
    settings: dict[str, Any] = read_json(file, typed=True, error=ConfigError)
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        hint = 'it is "zero_optimization": {"stage": 2}, with a stage from 0 to 3'
        raise ConfigError("no stage of ZeRO can be read in it", where=file, hint=hint)
    for name in ("bf16", "bfloat16", "fp16"):
        section = settings.get(name, {})
        enabled = section.get("enabled", "auto") if isinstance(section, dict) else None
        if enabled not in (True, False, "auto"):
            raise ConfigError(
                f"{name} cannot be read in it", where=file, hint=f'write "{name}": {{"enabled": "auto"}}'
            )
    return settings


def check_settings(settings: Mapping[str, Any], where: str, config: TrainConfig) -> list[str]:
    """Return the keys without effect, with the reason. Raises ConfigError for a key that is unknown, not supported,
    or contradicts a flag."""
    for key, value in settings.items():
        if key in REPLACED:
            hint = f"take it out, and use {REPLACED[key]}"
            raise ConfigError("is set by Cloze itself", where=f"{where}: {key}", hint=hint)
        if key in UNSUPPORTED:
            raise ConfigError("is not supported", where=f"{where}: {key}", hint="take it out")
        if key not in KNOWN:
            close = difflib.get_close_matches(key, sorted(KNOWN), n=1)
            hint = f"did you mean {close[0]}?" if close else "take it out"
            raise ConfigError("is not a setting of DeepSpeed", where=f"{where}: {key[:60]}", hint=hint)
        flag = SET_BY_FLAGS.get(key)
        if flag is not None and value not in ("auto", getattr(config, flag[2:])):
            given = f"is {value!r}, and {flag} is {getattr(config, flag[2:])}"
            raise ConfigError(given, where=f"{where}: {key}", hint='write "auto", and give the flag')
    _check_batch(settings, where, config)
    if settings.get("gradient_allreduce_op", "mean") != "mean":
        raise ConfigError("changes the gradient", where=f"{where}: gradient_allreduce_op", hint="take it out")
    _check_zero(settings.get("zero_optimization", {}), where)
    return [f"{key} ({why})" for key, why in WITHOUT_EFFECT.items() if key in settings]


def _check_batch(settings: Mapping[str, Any], where: str, config: TrainConfig) -> None:
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    size = config.global_batch_size or size
    if settings.get("train_batch_size", "auto") not in ("auto", size):
        given = f"is {settings['train_batch_size']!r}, and the flags give {size} blocks a step"
        raise ConfigError(given, where=f"{where}: train_batch_size", hint='write "auto", and give --global_batch_size')


def _check_zero(zero: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for what DeepSpeed would refuse after the model is built."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"DeepSpeed refuses {name} ({first['msg']})", where=f"{where}: zero_optimization", hint="correct it"
        ) from None
