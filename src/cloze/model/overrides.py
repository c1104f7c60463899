"""Changes to a model's configuration, written as text: `hidden_size=256,text_config.num_hidden_layers=2`.

apply_overrides(config, parse_overrides("hidden_size=256,block_sizes=[4,4]"))
"""

from __future__ import annotations

import inspect
import math
import re
from functools import reduce
from typing import Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM, PretrainedConfig

from cloze.errors import ConfigError, DataError
from cloze.foreign.json_yaml import parse_yaml
from cloze.foreign.pretrained import from_config


def parse_overrides(text: str | None) -> dict[str, str]:
    """`a=1,b=x` -> {"a": "1", "b": "x"}. Raises ConfigError."""
    if not text:
        return {}
    pairs = [part.split("=", 1) for part in re.split(r",(?![^\[]*\])", text)]  # commas outside of brackets
    if any(len(pair) != 2 or not pair[0].strip() for pair in pairs):
        raise ConfigError(f"cannot read {text!r}", where="--config_overrides", hint="write it as a=1,b=[2,3],c.d=4")
    return {name.strip(): value.strip() for name, value in pairs}


def apply_overrides(config: PretrainedConfig, overrides: dict[str, str]) -> None:
    """Set values of a configuration, read as the type they have; `text_config.hidden_size` goes into a nested one,
    `rope_parameters.full_attention.rope_theta` into a table.

    Raises ConfigError, for a name that neither the configuration has nor the model asks for, too.
    """
    for name, value in overrides.items():
        *outer, last = name.split(".")
        try:
            inner = reduce(_inside, outer, config)
            _set(inner, last, value)
            if _is_not_finite(_inside(inner, last)):
                raise ValueError("must be a finite number")
        except (ValueError, TypeError, AttributeError, KeyError, DataError) as error:
            raise ConfigError(
                f"{name}={value}: {error}", where="--config_overrides", hint=f"see {type(config).__name__}"
            ) from None
    if "layer_types" not in overrides:
        _follow_depth(config)


def check_same_weights(stored: PretrainedConfig, changed: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """Raise ConfigError where changes to the configuration of pretrained weights would need other weights: layers
    fewer than stored would be dropped without a word, and more would be made up."""
    shapes = [_shapes(config, trust_remote_code) for config in (stored, changed)]
    names = [name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)]
    if names:
        first = min(names)
        here, there = shapes[1].get(first, "gone"), shapes[0].get(first, "nothing")
        raise ConfigError(
            f"pretrained weights have their own shapes, and {first} would be {here} in place of {there}",
            where="--config_overrides",
            hint="change what needs no other weights (dropout, rotary angles), or train from scratch: --config_name",
        )


def _is_not_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_not_finite, value))
    return isinstance(value, float) and not math.isfinite(value)


def _inside(outer: Any, name: str) -> Any:
    return outer[name] if isinstance(outer, dict) else getattr(outer, name)


def _set(inner: Any, name: str, value: str) -> None:
    if isinstance(inner, dict):
        inner[name] = type(inner[name])(parse_yaml(value, "--config_overrides", kind=object, typed=True))
        return
    before = getattr(inner, name, "")
    if isinstance(before, bool | int | float | str) and (hasattr(inner, name) or not _is_asked_for(inner, name)):
        inner.update_from_string(f"{name}={value}")  # raises where there is no such name
    else:  # a list, a table, or nothing yet
        read = parse_yaml(value, "--config_overrides", kind=object, typed=True)
        setattr(inner, name, tuple(read) if isinstance(before, tuple) else read)


def _is_asked_for(config: PretrainedConfig, name: str) -> bool:
    """Whether the model looks for a setting of this name that its configuration need not have, as DeBERTa's do for
    `position_buckets`: getattr(config, "position_buckets", -1)."""
    models = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)
    if models is None:
        return False
    model = models[0] if isinstance(models, tuple) else models
    return f'(config, "{name}"' in inspect.getsource(inspect.getmodule(model))  # type: ignore[arg-type]


def _shapes(config: PretrainedConfig, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = from_config(AutoModelForMaskedLM, config, trust_remote_code=trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _follow_depth(config: PretrainedConfig) -> None:
    """Where the number of layers was changed, the list of their types follows, here and in nested configurations."""
    for inner in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        types, depth = getattr(inner, "layer_types", None), getattr(inner, "num_hidden_layers", None)
        if types is not None and depth is not None and len(types) != depth:
            fresh = type(inner)(**{name: v for name, v in inner.to_dict().items() if name != "layer_types"})
            inner.layer_types = fresh.layer_types
