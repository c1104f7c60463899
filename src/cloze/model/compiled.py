"""torch.compile for the backbone as one graph.

    mode = choose_compile(config, model.config.model_type, device_type="cuda", part="backbone", engine="DDP")
    if mode is not None:
        compile_backbone(model, mode)        # before anything wraps the model; names of parameters do not change
    compile_layers(layers, mode)             # the same for engines that gather weights a layer at a time
    with eagerly(): ...                      # evaluation and checks: other shapes, not worth a compilation

Training batches have one shape (see `fixed_capacity`), so that one compilation suffices.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import masking_utils

from cloze.config import TrainConfig
from cloze.config.relations import CUDA_GRAPHS
from cloze.errors import ConfigError
from cloze.model.archs import BREAKS_GRAPH

_plain_depth = 0  # how many `eagerly` blocks are open


def choose_compile(
    config: TrainConfig, model_type: str, device_type: str, part: str | None, engine: str
) -> str | None:
    """Return the mode in which the backbone is to be compiled; None if it is not.

    `--torch_compile auto` compiles on GPUs, for architectures whose backbone becomes one graph. `part`: what the
    engine of that name can compile: `backbone`; `layers`, if it gathers weights around each of them (see
    `compile_layers`); None if it gathers them in hooks inside layers, at which graphs break. Raises ConfigError for an
    unsupported request.
    """
    mode = config.torch_compile_mode or "default"
    if part == "layers" and mode in CUDA_GRAPHS and config.torch_compile:
        raise ConfigError(
            f"CUDA graphs need weights at fixed addresses, and {engine} gathers them for each step",
            where="--torch_compile_mode",
            hint="use default or max-autotune-no-cudagraphs",
        )
    if config.torch_compile == "auto":
        pays = device_type == "cuda" and part is not None and model_type not in BREAKS_GRAPH and _has_triton()
        return mode if pays else None
    if not config.torch_compile:
        return None
    if part is None:
        raise ConfigError(
            f"{engine} does not support torch.compile",
            where="--torch_compile",
            hint="use another engine (launch/accelerate/zero2.yaml), or leave it out",
        )
    if device_type == "cuda" and not _has_triton():
        raise ConfigError("torch.compile needs triton on a GPU", where="--torch_compile", hint="pip install triton")
    return mode


def compile_backbone(model: Any, mode: str, backend: str = "inductor") -> None:
    """Compile `model.base_model_prefix` in place, at its first forward.

    `mode`: of torch.compile; "reduce-overhead" and "max-autotune" record CUDA graphs; the next forward reuses the
    memory.
    """
    backbone = getattr(model, model.base_model_prefix, model)
    # The forward alone: with its hooks, `backbone.compile()` makes a second graph of the one that gathers rows.
    backbone.forward = _compiled(backbone.forward, mode, backend)
    if mode in CUDA_GRAPHS:
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def compile_layers(layers: Sequence[torch.nn.Module], mode: str, backend: str = "inductor") -> None:
    """Compile layers in place, one by one, as FSDP2 requires: hooks around the compiled forward gather and free the
    weights. `mode`: of torch.compile, one without CUDA graphs."""
    for layer in layers:
        layer.forward = _compiled(layer.forward, mode, backend)  # type: ignore[method-assign]


def _compiled(forward: Callable[..., Any], mode: str, backend: str) -> Callable[..., Any]:
    """Return a compiled forward, which runs uncompiled inside `eagerly`."""
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # --tf32 selects it
    compiled = torch.compile(forward, backend=backend, mode=None if mode == "default" else mode, dynamic=False)

    @functools.wraps(forward)
    def either(*arguments: Any, **named: Any) -> Any:
        if _plain_depth:
            return forward(*arguments, **named)
        with _not_exporting():
            return compiled(*arguments, **named)

    return either


def _no() -> bool:
    return False


@contextlib.contextmanager
def _not_exporting() -> Iterator[None]:
    """Make `torch.compiler.is_exporting()` false while a compiled forward runs: torch 2.11's compiler takes it for
    true. transformers would then make a mask that hides nothing, with which attention runs in fp32 without a fused
    kernel. Outside of the block, exports are unaffected."""
    plain = masking_utils.is_torchdynamo_exporting
    masking_utils.is_torchdynamo_exporting = _no
    try:
        yield
    finally:
        masking_utils.is_torchdynamo_exporting = plain


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run what `compile_backbone` and `compile_layers` compiled uncompiled inside the block. What libraries compile
    themselves stays compiled: flex attention without its kernel holds all scores in memory."""
    global _plain_depth
    _plain_depth += 1
    try:
        yield
    finally:
        _plain_depth -= 1


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
