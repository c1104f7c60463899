"""Identify the axes of a model's weights, and the old indices that a wider model copies.

This module knows no architectures: a model without memory for its weights is built from the new configuration, and
again with one of its numbers (`intermediate_size`, ...) as it was before: the axes that change are that number's. What
is left changes with the width of the model, its heads.

    axes = find_axes(old_config, new_config)
    axes["bert.encoder.layer.0.intermediate.dense.weight"][0]     # LongTensor [3072] of places below 2048, or None

Weights are tiled from the middle, as ModernBERT-large was made from ModernBERT-base (Warner et al., 2024, after the
Phi models, Javaheripi and Bubeck, 2023): the old weights are in the middle of the new ones, and are repeated around.
Each part of a fused matrix (queries, keys and values in one; the halves of a gated layer) is tiled by itself, and
heads stay whole: a head is a copy of a head. One axis is tiled the same way wherever it occurs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PretrainedConfig

from cloze.errors import ConfigError, ModelError
from cloze.utils.foreign.pretrained import from_config

Map = torch.Tensor  # [new size] of old places
Shapes = Mapping[str, tuple[int, ...]]
# The names that configurations have for these numbers.
HIDDEN = ("hidden_size", "d_model", "dim", "emb_dim")
HEADS = (
    "num_attention_heads",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "n_head",
    "num_self_attention_heads",
)
OTHER_HEADS = ("head_dim", "num_key_value_heads")
POSITIONS = ("max_position_embeddings",)
# Rows of these are head by head [head, (q, k, v), place], and not part by part.
BY_HEAD = {("deberta", "in_proj")}


@dataclass(frozen=True)
class Heads:
    """Numbers of one model: its width, heads, heads of keys and values, and places in a head."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def blank_model(config: PretrainedConfig) -> Any:
    """Return the masked language model of a configuration, without memory for its weights. Raises ModelError."""
    try:
        with torch.device("meta"):
            return from_config(AutoModelForMaskedLM, copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # any error of numbers that do not fit together; only transformers' code runs here
        what = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(
            f"no masked language model can be made from the configuration ({what})",
            where=getattr(config, "model_type", None),
            hint="change --config_overrides",
        ) from None


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a model's files."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def whole_numbers(config: PretrainedConfig) -> dict[str, int]:
    """Return the whole numbers of a configuration that may be sizes."""
    values = config.get_text_config().to_dict()
    found = {name: value for name, value in values.items() if isinstance(value, int) and not isinstance(value, bool)}
    return {name: value for name, value in found.items() if not name.endswith("token_id")}


def first_of(config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    """Return the first of several numbers that a configuration has."""
    values = (getattr(config.get_text_config(), name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def heads_of(config: PretrainedConfig) -> Heads:
    """Return the width and the heads of a model; without attention, every place is a head. Raises ModelError if no
    width is known."""
    hidden = first_of(config, HIDDEN)
    if hidden is None:
        raise ModelError(
            "its width is not in the configuration",
            where=config.model_type,
            hint="models of this kind cannot be grown; train one from scratch",
        )
    heads = first_of(config, HEADS) or hidden
    kv_heads = first_of(config, ("num_key_value_heads",)) or heads
    return Heads(hidden, heads, kv_heads, first_of(config, ("head_dim",)) or hidden // heads)


def axes_of_number(config: PretrainedConfig, name: str, value: int, shapes: Shapes) -> set[tuple[str, int]]:
    """Return the axes (weight, dimension) whose size changes when one number of the configuration is `value`."""
    changed = copy.deepcopy(config)
    setattr(changed.get_text_config(), name, value)
    others = shapes_of(blank_model(changed))
    return {
        (weight, axis)
        for weight, shape in shapes.items()
        for axis, (here, there) in enumerate(zip(shape, others.get(weight, shape), strict=True))
        if here != there
    }


def tiled(old: int, new: int) -> Map:
    """Return the old indices in the middle, repeated to both sides: tiled(3, 8) is 1 2 0 1 2 0 1 2."""
    return (torch.arange(new) - (new - old) // 2) % old


@dataclass(frozen=True)
class Width:
    """How a model's width is tiled: maps of its heads, of the places in a head, and of its hidden size."""

    heads: Map
    places: Map
    hidden: Map
    sizes: dict[tuple[int, int], Map]  # by the size before and after


def width_of(old: Heads, new: Heads) -> Width:
    """Heads that share keys and values stay together; the two halves of a head are tiled each by itself, since rotary
    positions pair their places. A hidden size that is that of all heads is tiled as they are."""
    kv = tiled(old.kv_heads, new.kv_heads)
    old_group, new_group = old.heads // old.kv_heads, new.heads // new.kv_heads
    heads = (kv[:, None] * old_group + tiled(old_group, new_group)).reshape(-1)
    if old.head_dim % 2 or new.head_dim % 2:
        places = tiled(old.head_dim, new.head_dim)
    else:
        half = tiled(old.head_dim // 2, new.head_dim // 2)
        places = torch.cat([half, half + old.head_dim // 2])

    def spread(numbers: Map) -> Map:
        return (numbers[:, None] * old.head_dim + places).reshape(-1)

    sizes = {
        (old.head_dim, new.head_dim): places,
        (old.kv_heads, new.kv_heads): kv,
        (old.heads, new.heads): heads,
        (old.kv_heads * old.head_dim, new.kv_heads * new.head_dim): spread(kv),
        (old.hidden, new.hidden): tiled(old.hidden, new.hidden),
    }
    sizes[old.heads * old.head_dim, new.heads * new.head_dim] = spread(heads)
    return Width(heads, places, sizes[old.hidden, new.hidden], sizes)


@dataclass(frozen=True)
class Growth:
    """The two models, and what is known of how one is made of the other: the old layer of each new one, in the order
    of all layers, and by how many rows positions move back, to make room for another id of the padding."""

    old: PretrainedConfig
    new: PretrainedConfig
    layers: Map
    position_shift: int

    def width(self) -> Width:
        """How the width is tiled; ESM-2 also has a weight for each head of all layers."""
        old, new = heads_of(self.old), heads_of(self.new)
        width = width_of(old, new)
        of_all = (self.layers[:, None] * old.heads + width.heads).reshape(-1)
        before = (int(self.layers.max()) + 1) * old.heads
        return replace(width, sizes={(before, len(of_all)): of_all} | width.sizes)


def find_axes(
    growth: Growth, old_shapes: Shapes, new_shapes: Shapes
) -> tuple[dict[tuple[str, int], Map], set[tuple[str, int]]]:
    """Return, for each axis of a weight that has grown, the old index of each new one; and the axes that are those
    of the vocabulary, which are not among them.

    `old_shapes`: of the old model, under the names of the new one. Raises ConfigError if the model would become
    smaller, ModelError if an axis cannot be identified.
    """
    new_config, shift = growth.new, growth.position_shift
    old_numbers, new_numbers = whole_numbers(growth.old), whole_numbers(new_config)
    vocabulary = axes_of_number(new_config, "vocab_size", new_numbers["vocab_size"] + 1, new_shapes)
    numbers = _numbers_of_axes(old_numbers, new_numbers, new_config, new_shapes)
    old, new, width = heads_of(growth.old), heads_of(new_config), growth.width()
    found = {}
    for weight, shape in new_shapes.items():
        for axis, (before, after) in enumerate(zip(old_shapes[weight], shape, strict=True)):
            name = numbers.get((weight, axis))
            chosen: Map | None
            if before == after or (weight, axis) in vocabulary:
                continue
            if name in POSITIONS and after - before == shift:
                chosen = (torch.arange(after) - shift).clamp(min=0)
            elif before > after or name in POSITIONS:
                raise ConfigError(
                    f"{weight} would go from {before} to {after}",
                    where="--config_overrides",
                    hint="a model can become wider, deeper or less deep, but not narrower, and keeps its positions",
                )
            elif name is not None:
                one, other = old_numbers[name], new_numbers[name]
                chosen = _parts(tiled(one, other), one, other, before, after)
            elif (new_config.model_type, weight.split(".")[-2]) in BY_HEAD and axis == 0:
                chosen = _by_head(width, old.head_dim, before // old.hidden)
            elif (before, after) in width.sizes:
                chosen = width.sizes[before, after]
            else:
                chosen = _parts(width.hidden, old.hidden, new.hidden, before, after)
            if chosen is None:
                raise ModelError(
                    f"it is unknown how {weight} grows from {before} to {after}",
                    where=new_config.model_type,
                    hint="only its vocabulary and its number of layers can be changed",
                )
            found[weight, axis] = chosen
    return found, vocabulary


def _numbers_of_axes(
    old: Mapping[str, int], new: Mapping[str, int], config: PretrainedConfig, shapes: Shapes
) -> dict[tuple[str, int], str]:
    """Return axis -> the number of the configuration that sets its size, for numbers that changed other than the
    width's."""
    found: dict[tuple[str, int], str] = {}
    for name, value in new.items():
        before = old.get(name, value)
        if before == value or name in (*HIDDEN, *HEADS, *OTHER_HEADS, "vocab_size") or "layers" in name:
            continue
        try:
            found |= dict.fromkeys(axes_of_number(config, name, before, shapes), name)
        except ModelError:
            continue  # it cannot be changed alone: its axes follow the width
    return found


def _parts(one: Map, old: int, new: int, before: int, after: int) -> Map | None:
    """Return the map of an axis of several parts, each as large as `old` before and `new` now; None if it has no
    parts."""
    count = before // old
    if before != count * old or after != count * new:
        return None
    return torch.cat([one + part * old for part in range(count)])


def _by_head(width: Width, head_dim: int, parts: int) -> Map:
    """Return the map of the rows [head, part, place] of a fused matrix."""
    part = torch.arange(parts)[:, None]
    return ((width.heads[:, None, None] * parts + part) * head_dim + width.places).reshape(-1)
