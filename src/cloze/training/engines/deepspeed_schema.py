"""The valid values of settings in DeepSpeed's configuration, checked early.

    check_values(settings, "ds.json")                # ConfigError naming the first invalid value
    given = without_defaults(settings)               # without null and "auto", which mean DeepSpeed's default

Sections with a pydantic model in DeepSpeed are checked with it, but strictly: the model accepts `true` for 1.
DeepSpeed does not check the other sections; their types and ranges are given here.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le

from cloze.errors import ConfigError
from cloze.utils.suggest import suggestion

_BITS = 62  # of an integer: products with the size of a type must fit into 64 bits
# accelerate replaces "auto" in these by values of the model; Cloze and accelerate set the batch and the precision.
FILLED = frozenset(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"))


@dataclass(frozen=True)
class Only:
    """A setting that must be `value`, which `why` explains."""

    value: Any
    why: str


_MODULES = Only(0, "modules that are fetched as one do not pass on all that Cloze gives them")
_FP32 = Only(False, "Cloze keeps weights and optimizer state in fp32")


_COUNT, _DTYPE = Annotated[int, Ge(1)], Literal["fp32", "fp16", "bf16"]
_SWITCHES = """
    prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown memory_breakdown
    dump_state disable_allgather disable_python_gc
"""
_COUNTS = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print"


@functools.cache
def schema() -> dict[str, Any]:
    """Return the valid values of each setting by name: a type for pydantic, an `Only`, or a mapping for a section."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        **dict.fromkeys(_COUNTS.split(), _COUNT),
        **dict.fromkeys(_SWITCHES.split(), bool),
        **_sections(),
        "gradient_clipping": Annotated[float, Ge(0)],
        "gradient_predivide_factor": Annotated[float, Ge(2.0**-16), Le(2.0**16)],
        "gradient_allreduce_op": Only("mean", "another one changes the gradient"),
        "communication_data_type": _DTYPE,
        "log_level": Literal["debug", "info", "warning", "error", "critical"],
        "comms_logger": _fields(CommsLoggerConfig) | {"prof_ops": list[str]},
        "timers": {"throughput": _fields(DeepSpeedThroughputTimerConfig)},
        "data_types": {
            **dict.fromkeys(("grad_accum_dtype", "param_dtype", "buffer_dtype"), _DTYPE),
            "keep_in_fp32_modules": list[str],
        },
        "aio": {
            **dict.fromkeys(("queue_depth", "intra_op_parallelism"), Annotated[int, Ge(1), Le(2**12)]),
            **dict.fromkeys(("single_submit", "overlap_events"), bool),
            "block_size": Annotated[int, Ge(1), Le(2**30)],
            "thread_count": Only(None, "it is now intra_op_parallelism"),
            "use_gds": bool if torch.cuda.is_available() else Only(False, "it needs a GPU"),
        },
        "flops_profiler": {
            **dict.fromkeys(("enabled", "detailed"), bool),
            **dict.fromkeys(("profile_step", "top_modules"), _COUNT),
            "recompute_fwd_factor": Annotated[float, Ge(0)],
            "module_depth": Annotated[int, Ge(-1)],
            "output_file": str,
        },
    }


def _sections() -> dict[str, Any]:
    """Return the sections that DeepSpeed has models for and whose values Cloze restricts."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {
        "compute_grad_norm": Only(True, "Cloze needs the norm of the gradients"),
        "zenflow": Only(None, "Cloze does not support ZenFlow"),
        "elastic_checkpoint": Only(False, "Cloze writes its own checkpoints"),
        "legacy_stage1": Only(False, "DeepSpeed does not support it any more"),
        "cpu_offload": Only(False, "it is now offload_optimizer"),
        "cpu_offload_param": Only(False, "it is now offload_param"),
        "cpu_offload_use_pin_memory": Only(False, "it is now pin_memory of offload_optimizer"),
        **dict.fromkeys(("module_granularity_threshold", "stage3_module_granularity_threshold"), _MODULES),
        "sub_group_size": _COUNT,
        "zero_hpz_partition_size": _COUNT,
    }
    fp16 = {
        "fp16_master_weights_and_grads": _FP32,
        "initial_scale_power": Annotated[int, Ge(0), Le(32)],
        "loss_scale": Annotated[float, Ge(0), Le(2.0**32)],
        "loss_scale_window": _COUNT,
        "min_loss_scale": Annotated[int, Ge(1), Le(2**32)],
        "hysteresis": _COUNT,
    }
    bf16 = dict.fromkeys(("bf16_master_weights_and_grads", "bf16_optimizer_states"), _FP32)
    return {
        "zero_optimization": _fields(DeepSpeedZeroConfig) | zero,
        "bf16": _fields(DeepSpeedBF16Config) | bf16,
        "bfloat16": _fields(DeepSpeedBF16Config) | bf16,
        "fp16": _fields(DeepSpeedFP16Config) | fp16,
    }


def _fields(model: Any) -> dict[str, Any]:
    """Return the fields of one of DeepSpeed's models by name and alias."""
    from pydantic import BaseModel

    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        parts = getattr(field.annotation, "__args__", ()) or (field.annotation,)
        nested = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        kind = _fields(nested[0]) if nested else field.annotation
        for mark in () if nested else field.metadata:
            kind = Annotated[kind, mark]
        found |= {name: kind} | ({field.alias: kind} if field.alias else {})
    return found


def check_values(settings: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for the first value of a wrong type or outside its range, also inside sections."""
    known = schema()
    for key, value in settings.items():
        if key in known:
            _check(known[key], value, f"{where}: {key}")
    _check_zero(without_defaults(settings).get("zero_optimization", {}), where)


def _check(kind: Any, value: Any, where: str) -> None:
    if value is None or value == "auto":
        return
    if isinstance(kind, Only):
        if type(value) is not type(kind.value) or value != kind.value:
            raise ConfigError(f"cannot be {_shown(value)}: {kind.why}", where=where, hint="take it out")
    elif not isinstance(kind, dict):
        fault = _fault(kind, value)
        if fault is not None:
            raise ConfigError(f"cannot be {_shown(value)} ({fault})", where=where, hint="correct it, or take it out")
    elif not isinstance(value, dict):
        raise ConfigError(f"must be a JSON object, not {_shown(value)}", where=where, hint='write {"name": value}')
    else:
        for name, one in value.items():
            if name not in kind:
                hint = suggestion(name, kind) or "take it out"
                raise ConfigError("is not a setting of DeepSpeed", where=f"{where}.{name[:60]}", hint=hint)
            if name.removeprefix("stage3_") != name and name.removeprefix("stage3_") in value:
                raise ConfigError("is given twice", where=f"{where}.{name}", hint="leave one of the two names out")
            _check(kind[name], one, f"{where}.{name}")


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _fault(kind: Any, value: Any) -> str | None:
    """Return why a value is invalid, or None."""
    from pydantic import ValidationError

    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"it must be below 2^{_BITS}"
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**_BITS:
        value = int(value)  # 5e8, as DeepSpeed's documentation writes it
    try:
        _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return None


def _check_zero(zero: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for contradicting settings, which DeepSpeed would reject only after the model is built."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except (ValidationError, AssertionError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        place = f"{where}: zero_optimization"
        raise ConfigError(f"DeepSpeed refuses it ({what})", where=place, hint="correct it") from None


def without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without null and "auto", also inside sections, and integers as such: 5e8 is 500000000."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found[name] = without_defaults(value)
        elif value == "auto" and name in FILLED:
            found[name] = value
        elif value is not None and value != "auto":
            found[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    return found


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
