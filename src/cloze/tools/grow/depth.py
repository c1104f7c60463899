"""Which old layer each new layer is copied from.

    sources = layer_sources(old_model, new_model, old_types, new_types)
    sources["model.layers.5."]        # ("model.layers.2.", True): its second copy, say

Copies of a layer follow it, spread over the whole depth, as Gopher was deepened (Rae et al., 2021) and
ModernBERT-large was made (Warner et al., 2024). A model with fewer layers gets every second one, or every third: so
DistilBERT began (Sanh et al., 2019). A layer is only ever copied from one that has the same weights (the
first layer of ModernBERT has no norm) and, if it has one, the same type of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloze.errors import ModelError
from cloze.model.depth import layer_depths


@dataclass(frozen=True)
class LayerSource:
    """The layer that one is copied from, and whether that one was copied before: `names` begin with `prefix`."""

    prefix: str
    again: bool


def layer_sources(
    old_model: Any, new_model: Any, old_types: Sequence[str], new_types: Sequence[str]
) -> dict[str, LayerSource]:
    """Return the prefix of each new layer's weight names -> that of its old layer. `types`: of all layers, or empty.

    Raises ModelError if the models have other lists of layers, or none of the same kind.
    """
    old_lists, new_lists = _lists(old_model), _lists(new_model)
    if old_lists.keys() != new_lists.keys():
        raise ModelError(
            "the layers of the two configurations are not of one kind",
            where=type(new_model).__name__,
            hint="change numbers and sizes only with --config_overrides",
        )
    sources: dict[str, LayerSource] = {}
    for name, new in new_lists.items():
        old = old_lists[name]
        old_kinds = _kinds(old_model, old, old_types)
        new_kinds = _kinds(new_model, new, new_types)
        used: set[int] = set()
        for place, prefix in enumerate(new):
            wanted = place * len(old) // len(new)
            weights, kind = new_kinds[place]
            fitting = [other for other, one in enumerate(old_kinds) if one == (weights, kind)]
            fitting = fitting or [other for other, one in enumerate(old_kinds) if one[0] == weights]
            if not fitting:
                raise ModelError(
                    f"no old layer has the weights of {prefix}",
                    where=type(new_model).__name__,
                    hint="change numbers and sizes only with --config_overrides",
                )
            chosen = min(fitting, key=lambda other: (abs(other - wanted), other in used, other))
            sources[prefix] = LayerSource(old[chosen], chosen in used)
            used.add(chosen)
    return sources


def _lists(model: Any) -> dict[str, list[str]]:
    """Return the layers of a model by the list they are in: `bert.encoder.layer.` -> [`bert.encoder.layer.0.`,
    ...]."""
    lists: dict[str, list[str]] = {}
    for prefix in layer_depths(model):
        lists.setdefault(prefix[: prefix[:-1].rindex(".") + 1], []).append(prefix)
    return lists


def _kinds(model: Any, layers: list[str], types: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    """Return what must be the same of two layers for one to be copied from the other: names of weights, type of
    attention."""
    weights: dict[str, list[str]] = {prefix: [] for prefix in layers}
    for name in model.state_dict():
        for prefix in layers:
            if name.startswith(prefix):
                weights[prefix].append(name.removeprefix(prefix))
    of_type = types if len(types) == len(layers) else [""] * len(layers)
    return [(tuple(weights[prefix]), of_type[place]) for place, prefix in enumerate(layers)]
