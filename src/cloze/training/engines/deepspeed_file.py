"""The user's DeepSpeed configuration: the file that --deepspeed or the launcher names, read and checked in one place.

    settings = asked_settings(config.deepspeed)         # None without such a file
    check_settings(settings, where, config)             # before any process has joined

Every key is passed on, set by Cloze (a value of the user must agree), ignored with a reason, or rejected. `optimizer`
and `scheduler`, in files for transformers' Trainer, are flags of Cloze.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloze.config import TrainConfig
from cloze.errors import ConfigError
from cloze.training.engines.deepspeed_schema import check_values, without_defaults
from cloze.utils.environment import requests
from cloze.utils.environment.processes import world_size
from cloze.utils.foreign.json_yaml import read_json
from cloze.utils.suggest import suggestion
from cloze.utils.terminal.console import warn

# Passed on to DeepSpeed.
_HONOURED = """
    zero_optimization bf16 bfloat16 fp16 aio communication_data_type prescale_gradients gradient_predivide_factor
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown
    dump_state disable_allgather disable_python_gc log_level comms_logger flops_profiler timers data_types
"""
# Cloze sets these from its flags.
SET_BY_FLAGS = {
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
}
# Cloze does this itself; the value names its option.
REPLACED = {
    "optimizer": "--optim, --learning_rate, --weight_decay and --adam_beta1",
    "scheduler": "--lr_scheduler_type, --warmup_steps and --learning_rate",
    "amp": "--precision",
    "torch_autocast": "--precision",
    "elasticity": "--global_batch_size, which holds for any number of processes",
    "autotuning": "`cloze plan` and --auto_find_batch_size",
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor", "monitor_config"), "--report_to"),
}
# Unsupported: they would change the computation or the partitioning of the model.
_UNSUPPORTED = """
    sparse_attention pipeline tensor_parallel expert_parallel sequence_parallel_size hybrid_engine
    compression_training curriculum_learning data_efficiency progressive_layer_drop eigenvalue quantize_training
    weight_quantization use_data_before_expert_parallelism seq_parallel_communication_data_type
    managed_gradient_accumulation nebula
"""
# Effective only if the user's code calls DeepSpeed's own functions.
WITHOUT_EFFECT = {
    "activation_checkpointing": "use --gradient_checkpointing",
    "checkpoint": "Cloze writes its own checkpoints",
    "datastates_ckpt": "Cloze writes its own checkpoints",
    "compile": "use --torch_compile",
    "dataloader_drop_last": "Cloze draws its own batches",
}
_OTHERS = ("train_batch_size", "gradient_allreduce_op")  # must agree with Cloze
HONOURED, UNSUPPORTED = frozenset(_HONOURED.split()), frozenset(_UNSUPPORTED.split())
KNOWN = HONOURED | SET_BY_FLAGS.keys() | REPLACED.keys() | UNSUPPORTED | WITHOUT_EFFECT.keys() | set(_OTHERS)


def settings_file(deepspeed: str | None) -> str | None:
    """Return the path of the file that --deepspeed or else the launcher names, or None."""
    if deepspeed is None and not requests.wants_deepspeed():
        return None
    return deepspeed or requests.deepspeed_file()


def asked_settings(deepspeed: str | None) -> dict[str, Any] | None:
    """Return the file's settings, None without a file. Raises ConfigError if it is unreadable or has no ZeRO stage."""
    file = settings_file(deepspeed)
    if file is None:
        return None
    settings: dict[str, Any] = read_json(file, typed=True, error=ConfigError)
    zero = settings.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        hint = 'it is "zero_optimization": {"stage": 2}, with a stage from 0 to 3'
        raise ConfigError("no stage of ZeRO can be read in it", where=file, hint=hint)
    if "bfloat16" in settings:
        if "bf16" in settings:
            raise ConfigError("is given twice, as bf16 too", where=f"{file}: bfloat16", hint="leave it out")
        settings["bf16"] = settings.pop("bfloat16")
    for name in ("bf16", "fp16"):
        section = settings.get(name, {})
        enabled = section.get("enabled", "auto") if isinstance(section, dict) else None
        if not isinstance(enabled, bool) and enabled != "auto":
            hint = f'write "{name}": {{"enabled": "auto"}}'
            raise ConfigError(f"{name} cannot be read in it", where=file, hint=hint)
    return settings


def engine_settings(deepspeed: str | None) -> dict[str, Any] | None:
    """Return the settings for DeepSpeed: those of the file that it uses, else those of the launcher's variables; None
    without DeepSpeed. accelerate and DeepSpeed read neither themselves."""
    settings = asked_settings(deepspeed)
    if settings is not None:
        given = without_defaults({name: value for name, value in settings.items() if name in HONOURED})
        for name in given.keys() & {"bf16", "fp16"}:
            given[name].setdefault("enabled", "auto")  # accelerate fills in the run's precision
        return given
    return {"zero_optimization": requests.zero_settings()} if requests.wants_deepspeed() else None


def check_settings(settings: Mapping[str, Any], where: str, config: TrainConfig) -> list[str]:
    """Return the settings without effect, with the reason. Raises ConfigError for a key that is unknown, unsupported,
    or contradicts a flag, and for a value that DeepSpeed would reject."""
    for key, value in settings.items():
        if _is_off(key, value):
            continue
        if key in REPLACED:
            hint = f"take it out, and use {REPLACED[key]}"
            raise ConfigError("is set by Cloze itself", where=f"{where}: {key}", hint=hint)
        if key in UNSUPPORTED:
            raise ConfigError("is not supported", where=f"{where}: {key}", hint="take it out")
        if key not in KNOWN:
            hint = suggestion(key, sorted(KNOWN)) or "take it out"
            raise ConfigError("is not a setting of DeepSpeed", where=f"{where}: {key[:60]}", hint=hint)
    check_values(settings, where)
    if all(settings.get(name, {}).get("enabled") is True for name in ("bf16", "fp16")):
        raise ConfigError("bf16 and fp16 are both enabled", where=where, hint='write "auto", and give --precision')
    for key, flag in SET_BY_FLAGS.items():
        if settings.get(key) not in (None, "auto", getattr(config, flag[2:])):
            given = f"is {settings[key]!r}, and {flag} is {getattr(config, flag[2:])}"
            raise ConfigError(given, where=f"{where}: {key}", hint='write "auto", and give the flag')
    _check_batch(settings, where, config)
    unused = [f"{key} ({why})" for key, why in WITHOUT_EFFECT.items() if key in settings]
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    return unused + [f"{said} (the file says it)" for said in requests.unread_beside_file(where, stage)]


def report_settings(config: TrainConfig, on_gpu: bool) -> None:
    """Raise ConfigError for an invalid configuration; warn of settings without effect."""
    settings, where = asked_settings(config.deepspeed), settings_file(config.deepspeed)
    if settings is None or where is None:
        return
    if not on_gpu:
        requests.run_deepspeed_on_cpu()
    unused = check_settings(settings, where, config)
    if unused:
        warn(f"{where}: ignored: {', '.join(unused)}")
    if rounding := rounding_settings(settings):
        warn(f"{where}: {', '.join(rounding)} rounds gradients, so the numbers are not those of other engines")


def rounding_settings(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings, `name=value`, that change how gradients are added or sent, and so the numbers of a run."""
    usual = {
        "communication_data_type": ("auto", "fp32"),
        "prescale_gradients": ("auto", False),
        "gradient_predivide_factor": ("auto", 1, 1.0),
        "grad_accum_dtype": ("auto", "fp32"),
    }
    given = {**settings, **(settings.get("data_types") or {})}
    return [f"{name}={given[name]}" for name, usuals in usual.items() if given.get(name) not in (None, *usuals)]


def _is_off(key: str, value: Any) -> bool:
    """Return whether a section that Cloze does not use is disabled (`"enabled": false`)."""
    return key in REPLACED.keys() | UNSUPPORTED and isinstance(value, dict) and value.get("enabled") is False


def _check_batch(settings: Mapping[str, Any], where: str, config: TrainConfig) -> None:
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    size = config.global_batch_size or size
    if settings.get("train_batch_size") not in (None, "auto", size):
        given = f"is {settings['train_batch_size']!r}, and the flags give {size} blocks a step"
        raise ConfigError(given, where=f"{where}: train_batch_size", hint='write "auto", and give --global_batch_size')
