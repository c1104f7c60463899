"""The depth of each parameter in a model, for layer-wise learning rates, for every architecture.

    depths, num_layers = parameter_depths(model)
    depths["roberta.encoder.layer.3.output.dense.weight"]      # 4: embeddings are 0, the head is num_layers + 1

The layers are the items of the outermost module lists of the backbone: in most architectures one list; in others those
of the encoder, then those of the decoder; or lists of one length in parallel, each with one part of the layers (XLM).
A layer that is used several times (ALBERT) counts once.
"""

from __future__ import annotations

from typing import Any

import torch


def parameter_depths(model: Any) -> tuple[dict[str, int], int]:
    """Return the depth of every parameter by name, 0 (embeddings), 1 .. L (layers), L + 1 (head, last norm), and L.

    A tensor that two modules share has the smaller of its depths: a tied decoder has that of the embeddings. Other
    parameters of the backbone have the depth of the layer before them: mBART's norm between encoder and decoder is as
    deep as the encoder's last layer.
    """
    starts, num_layers = _layers(model)
    inside = _prefix(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    named = list(model.named_parameters(remove_duplicate=False))
    smallest: dict[int, int] = {}
    before = 0  # the deepest layer so far
    for name, parameter in named:
        depth = next((d for path, d in starts.items() if name.startswith(path)), None)
        if depth is not None:
            before = max(before, depth)
        elif not name.startswith(inside):
            depth = num_layers + 1
        elif _is_embedding(name) or id(parameter) in embeddings:
            depth = 0
        else:
            depth = before if before < num_layers else num_layers + 1
        smallest[id(parameter)] = min(depth, smallest.get(id(parameter), depth))
    return {name: smallest[id(parameter)] for name, parameter in named}, num_layers


def layer_depths(model: Any) -> dict[str, int]:
    """Return the name prefix of each layer (`roberta.encoder.layer.3.`) -> its depth, from 1 on."""
    return _layers(model)[0]


def layer_modules(model: Any) -> list[torch.nn.Module]:
    """Return the layers of the backbone, in order."""
    return [model.get_submodule(path.removesuffix(".")) for path in _layers(model)[0]]


def _layers(model: Any) -> tuple[dict[str, int], int]:
    """Return the name prefix of each layer (`roberta.encoder.layer.3.`) -> its depth, and the number of layers."""
    inside = _prefix(model)
    outermost: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        path = f"{name}."
        if not isinstance(module, torch.nn.ModuleList) or not path.startswith(inside) or _is_embedding(name):
            continue
        if any(path.startswith(f"{other}.") for other in outermost):
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):  # not the vision half of a text model
            outermost[name] = _items(name, module)
    starts: dict[str, int] = {}
    beside: dict[tuple[str, int], int] = {}  # lists of one parent and one length begin at the same depth
    num_layers = 0
    for name, items in outermost.items():
        key = name.rpartition(".")[0], len(items)
        if key not in beside:
            beside[key] = num_layers
            num_layers += len(items)
        starts |= {item: beside[key] + place + 1 for place, item in enumerate(items)}
    return starts, num_layers


def _items(name: str, modules: torch.nn.ModuleList) -> list[str]:
    """Return the name prefixes of a list's items; lists in a list (Funnel's blocks of layers) are one list."""
    found = []
    for place, module in enumerate(modules):
        path = f"{name}.{place}"
        found += _items(path, module) if isinstance(module, torch.nn.ModuleList) else [f"{path}."]
    return found


def _prefix(model: Any) -> str:
    """Return the name prefix of the backbone; empty if the model is its own backbone."""
    return f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""


def _is_embedding(name: str) -> bool:
    return "embed" in name.lower()
