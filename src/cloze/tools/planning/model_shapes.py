"""The model of a recipe without its weights: parameters, groups, and how many operations a block takes.

facts = model_facts(recipe)              # on torch's meta device: no memory, no data, any size
facts.elements, facts.groups             # 124,697,433; elements of each parameter of each optimizer group
twin = make_twin(recipe, torch.bfloat16, checkpointing=True)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForMaskedLM

from cloze.errors import ConfigError, ModelError
from cloze.model.archs import NO_BF16
from cloze.model.attention import supported
from cloze.model.flops import block_flops, undivided
from cloze.model.trained import freeze_matching
from cloze.tools.planning.activations import Untraceable, untrained
from cloze.tools.planning.gpus import Gpu
from cloze.tools.planning.recipe import Recipe
from cloze.training.engines.fsdp2 import units
from cloze.training.optim.optimizers import layer_groups, moments_of
from cloze.utils.foreign.pretrained import from_config


@dataclass(frozen=True)
class Weight:
    """A parameter: its rows (the first dimension), its elements, whether it is trained, and which of the layers that
    FSDP2 gathers one at a time it lies in, from 1 on; 0 in none."""

    rows: int
    elements: int
    trained: bool
    layer: int


@dataclass(frozen=True)
class ModelFacts:
    """`groups`: elements of each trained parameter, group by group of the optimizer, in the order of its flat tensors;
    `frozen`: elements that are not trained; `moments`: tensors the optimizer keeps for each trained element, EMA
    included; `unused`: names of parameters that have no part in the output; `flops`: of one block's forward, backbone
    and head (None if it cannot be counted); `weights`: every parameter, in the model's order."""

    model_class: str
    groups: list[list[int]]
    frozen: int
    moments: float
    unused: list[str]
    hidden_size: int | None
    depth: int
    flops: tuple[float, float] | None
    can_checkpoint: bool
    weights: list[Weight] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """Return elements that are trained."""
        return sum(map(sum, self.groups))

    @property
    def elements(self) -> int:
        """Return elements of all parameters, tied ones once."""
        return self.trained + self.frozen


def make_twin(recipe: Recipe, dtype: torch.dtype, checkpointing: bool = False) -> Any:
    """Return the model on the meta device, in training mode. Raises ModelError if it cannot be made there."""
    config = copy.deepcopy(recipe.model_config)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), undivided():
            twin = from_config(AutoModelForMaskedLM, config, dtype=dtype, **_attention(recipe)).train()
    except Exception as error:  # code of 51 architectures
        what = f"cannot be made without weights ({type(error).__name__}: {error})"
        raise ModelError(
            what, where=config.model_type, hint="mend --config_overrides; `cloze archs` shows the architectures"
        ) from None
    if checkpointing:
        twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return twin


def _attention(recipe: Recipe) -> dict[str, Any]:
    """Return what the model is made with: flash and flex attention, which need a GPU, keep what sdpa keeps there."""
    asked = recipe.train.attn_implementation
    if asked is None:
        return {}
    return {"attn_implementation": asked if asked in ("eager", "sdpa") else "sdpa"}


def freeze(twin: Any, pattern: str | None, unused: list[str]) -> None:
    """Do not train what the recipe says and what has no part in the output."""
    if pattern is not None:
        freeze_matching(twin, pattern)
    for name in unused:
        twin.get_parameter(name).requires_grad = False


def model_facts(recipe: Recipe) -> ModelFacts:
    """Count. Raises ModelError, ConfigError."""
    twin = make_twin(recipe, torch.float32)
    freeze(twin, recipe.train.freeze, [])
    try:
        unused = untrained(twin, recipe.block_size)
    except Untraceable:
        unused = []
    freeze(twin, None, unused)
    groups = [[p.numel() for p in group["params"]] for group, _ in layer_groups(twin, recipe.train)]
    text = recipe.model_config.get_text_config()
    try:
        flops = block_flops(twin, recipe.block_size)
    except Exception:  # a forward that looks at its data
        flops = None
    config = recipe.model_config
    sizes = getattr(config, "hidden_size", None) or max(getattr(config, "hidden_sizes", None) or [0])
    return ModelFacts(
        model_class=type(twin).__name__,
        groups=groups,
        frozen=sum(p.numel() for p in twin.parameters() if not p.requires_grad),
        moments=moments_of(twin, recipe.train) + (recipe.train.ema_decay is not None),
        unused=unused,
        hidden_size=sizes or None,
        depth=int(getattr(text, "num_hidden_layers", None) or 0),
        flops=flops,
        can_checkpoint="checkpointing" in supported(type(twin)),
        weights=_weights(twin),
    )


def _weights(twin: Any) -> list[Weight]:
    layers = {id(p): number for number, layer in enumerate(units(twin), 1) for p in layer.parameters()}
    return [
        Weight(p.shape[0] if p.ndim else 1, p.numel(), p.requires_grad, layers.get(id(p), 0))
        for p in twin.parameters()
    ]


def precision_for(recipe: Recipe, gpu: Gpu) -> str:
    """Return `no`, `bf16`, `fp16` or `fp8`: the recipe's precision, else the fastest of the GPU; fp32 on a CPU.

    Raises ConfigError for what the GPU or the architecture does not have.
    """
    train, model_type = recipe.train, recipe.model_config.model_type
    asked: str = "bf16" if train.bf16 else "fp16" if train.fp16 else train.precision
    if asked == "auto":
        return "no" if not gpu.is_gpu or model_type in NO_BF16 else gpu.half
    asked = {"fp32": "no"}.get(asked, asked)
    if asked in ("bf16", "fp8") and (gpu.half == "fp16" or model_type in NO_BF16):
        who = gpu.name if gpu.half == "fp16" else model_type
        raise ConfigError(f"{who} has no {asked}", where="--precision", hint="use fp16 or fp32")
    if asked in ("fp16", "fp8") and not gpu.is_gpu:
        raise ConfigError(f"{asked} needs a GPU", where="--precision", hint="use bf16 or fp32, or say --gpus")
    return asked
