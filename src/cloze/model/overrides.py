"""Changes to a model's configuration, written as text: `hidden_size=256,text_config.num_hidden_layers=2`.

apply_overrides(config, parse_overrides("hidden_size=256,block_sizes=[4,4]"))
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM, PretrainedConfig

from cloze.config import ModelConfig
from cloze.config.ranges import MIN_EPSILON
from cloze.errors import ConfigError, DataError, ModelError
from cloze.utils.foreign.json_yaml import parse_yaml
from cloze.utils.foreign.pretrained import forward_errors, from_config

_WHERE = "--config_overrides"
_SIZE = re.compile(r"(^|_)(size|dim|layers|heads|groups|embeddings|model)$")
_DRAWN = re.compile(r"(^|_)(initializer_range|init_std|initializer_std|theta)$")
_ROLE = re.compile(r"(pad|bos|eos|cls|sep|mask|unk)_(token_id|index)")
_ROLES = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
_ONE_SIDED = ("is_decoder", "add_cross_attention", "is_causal", "causal")
_COMMON = frozenset(dir(PretrainedConfig)) | vars(PretrainedConfig()).keys()


def parse_overrides(text: str | None) -> dict[str, str]:
    """Parse `a=1,b=x` into {"a": "1", "b": "x"}. Raises ConfigError."""
    if not text:
        return {}
    pairs = [part.split("=", 1) for part in re.split(r",(?![^\[]*\])", text)]  # commas outside of brackets
    if any(len(pair) != 2 or not pair[0].strip() for pair in pairs):
        raise ConfigError(f"cannot read {text!r}", where=_WHERE, hint="write it as a=1,b=[2,3],c.d=4")
    found = {name.strip(): value.strip() for name, value in pairs}
    if len(found) < len(pairs):
        names = [pair[0].strip() for pair in pairs]
        raise _twice(next(name for name in names if names.count(name) > 1))
    return found


def apply_overrides(config: PretrainedConfig, overrides: dict[str, str]) -> None:
    """Set values of a configuration, read as the type they have; `text_config.hidden_size` goes into a nested one,
    `rope_parameters.full_attention.rope_theta` into a table.

    Raises ConfigError, for a name that neither the configuration has nor the model asks for, too.
    """
    seen: set[tuple[int, str]] = set()
    for name, value in overrides.items():
        *outer, last = name.split(".")
        if any(map(_is_common, name.split("."))):
            what = f"{name} is how results are returned or stored, or for other tasks"
            raise ConfigError(what, where=_WHERE, hint="leave it out")
        try:
            inner = reduce(_inside, outer, config)
            setting = id(inner), (getattr(inner, "attribute_map", None) or {}).get(last, last)
            if setting in seen:
                raise _twice(setting[1])
            seen.add(setting)
            before = inner.get(last) if isinstance(inner, dict) else getattr(inner, last, None)
            _set(inner, last, value)
            _check_number(last, before, _inside(inner, last))
        except (ValueError, TypeError, AttributeError, KeyError, DataError) as error:
            raise ConfigError(f"{name}={value}: {error}", where=_WHERE, hint=f"see {type(config).__name__}") from None
    if "layer_types" not in overrides:
        _follow_depth(config)


def check_same_weights(stored: PretrainedConfig, changed: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """Raise ConfigError if changes to the configuration of pretrained weights need other weights: surplus layers would
    be dropped silently, missing ones drawn at random."""
    shapes = [_shapes(config, trust_remote_code) for config in (stored, changed)]
    names = [name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)]
    if names:
        first = min(names)
        here, there = shapes[1].get(first, "gone"), shapes[0].get(first, "nothing")
        raise ConfigError(
            f"pretrained weights have their own shapes, and {first} would be {here} in place of {there}",
            where=_WHERE,
            hint="change what needs no other weights (dropout, rotary angles), or train from scratch: --config_name",
        )


def check_token_ids(config: PretrainedConfig, overrides: dict[str, str], tokenizer: Any) -> None:
    """Raise ConfigError if overrides give a special token an id that it does not have in the tokenizer."""
    for name in overrides:
        *outer, last = name.split(".")
        inner = reduce(_inside, outer, config)
        value, role = _inside(inner, last), _ROLE.fullmatch(last)
        if role is not None:
            own = getattr(tokenizer, f"{role[1]}_token_id", None)
            if value != own:
                what = f"{name}={value}, but the tokenizer's is {own}"
                raise ConfigError(what, where=_WHERE, hint="leave it out: it follows the tokenizer")
        elif last.endswith(("_token_id", "_index")) and value is not None:
            ids = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
            if value not in ids | set(getattr(tokenizer, "all_special_ids", ())):
                what = f"{name}={value} is no special token of the tokenizer"
                raise ConfigError(what, where=_WHERE, hint="leave it out")


def check_reads_both_ways(config: PretrainedConfig, where: object, overrides: dict[str, str] | None = None) -> None:
    """Raise ModelError if a configuration is of a model that does not see the text on both sides of a position, or
    ConfigError if one of `overrides` makes it so."""
    for inner in (config, config.get_text_config()):
        wrong = next((name for name in _ONE_SIDED if getattr(inner, name, None)), None)
        if wrong is None:
            continue
        what = f"{wrong}={getattr(inner, wrong)} is not for masked language modelling, which reads a text both ways"
        if any(name.split(".")[-1] == wrong for name in overrides or ()):
            raise ConfigError(what, where=_WHERE, hint="leave it out")
        raise ModelError(what, where=where, hint="use a model that was trained to predict masked tokens")


@contextmanager
def overrides_named(text: str | None) -> Iterator[None]:
    """Let an error about a model that cannot be made name the overrides, if there are any."""
    try:
        yield
    except ModelError as error:
        if not text or not error.what.startswith("cannot load the model"):
            raise
        what = error.what.replace("cannot load the model", "no model can be made with them", 1)
        raise ModelError(what, where=_WHERE, hint="change or leave out the value that does not fit") from None


def first_forward(config: ModelConfig) -> AbstractContextManager[None]:
    """Return the context for a model's first forward pass, which turns errors into a ModelError if the user chose the
    configuration."""
    chosen = config.model_name_or_path or config.config_name
    if config.config_overrides:
        return forward_errors(_WHERE, "change or leave out the value that does not fit")
    return forward_errors(chosen) if chosen else nullcontext()


def _twice(name: str) -> ConfigError:
    return ConfigError(f"{name} is given twice", where=_WHERE, hint="give it once")


def _is_common(name: str) -> bool:
    """Return whether every configuration has this setting: such a setting does not define a masked language model."""
    return name.startswith("_") or (name in _COMMON and name not in ("rope_scaling", "per_layer_config"))


def _check_number(name: str, before: Any, value: Any) -> None:
    """Raise ValueError for a number that no model can be trained with. `before`: what it was; None if nothing."""
    if isinstance(value, list | tuple):
        for one in value:
            _check_number(name, 0, one)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    known = before if isinstance(before, int | float) and not isinstance(before, bool) else None
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    if "drop" in name or name.endswith("_prob"):
        if not 0 <= value < 1:
            raise ValueError("must be at least 0 and below 1")
    elif name.endswith(("eps", "epsilon")):
        if value < MIN_EPSILON:
            raise ValueError(f"must be at least {MIN_EPSILON}")
    elif _DRAWN.search(name):
        if value <= 0:
            raise ValueError("must be above 0")
    elif known is not None and known > 0 and _SIZE.search(name):
        if value < 1:
            raise ValueError("must be at least 1")
    elif known is not None and known >= 0 and value < 0:
        raise ValueError("must be at least 0")


def _inside(outer: Any, name: str) -> Any:
    return outer[name] if isinstance(outer, dict) else getattr(outer, name)


def _set(inner: Any, name: str, value: str) -> None:
    if isinstance(inner, dict):
        inner[name] = type(inner[name])(parse_yaml(value, _WHERE, kind=object, typed=True))
        return
    before = getattr(inner, name, "")
    if isinstance(before, bool | int | float | str) and (hasattr(inner, name) or not _is_asked_for(inner, name)):
        inner.update_from_string(f"{name}={value}")  # raises for an unknown name
    else:  # a list, a table, or nothing yet
        read = parse_yaml(value, _WHERE, kind=object, typed=True)
        setattr(inner, name, tuple(read) if isinstance(before, tuple) else read)


def _is_asked_for(config: PretrainedConfig, name: str) -> bool:
    """Return whether the model reads a setting of this name that its configuration need not have, as DeBERTa's do for
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
    """Fit the list of layer types to a changed number of layers, here and in nested configurations."""
    for inner in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        types, depth = getattr(inner, "layer_types", None), getattr(inner, "num_hidden_layers", None)
        if types is not None and depth is not None and len(types) != depth:
            fresh = type(inner)(**{name: v for name, v in inner.to_dict().items() if name != "layer_types"})
            inner.layer_types = fresh.layer_types
