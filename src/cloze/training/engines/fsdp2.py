"""FSDP2: every parameter divided among the ranks by its rows, gathered when its layer computes.

This module calls torch's `fully_shard` itself, so that one rule divides all architectures and bf16 is used for the
same operations as under DDP. `accelerator.prepare` (1.15, fsdp2_prepare_model) divides a head apart from the bias that
BERT and RoBERTa share with it, which torch (2.13) refuses; it selects by class names, computes the whole model in bf16
and adds up gradients in bf16. The settings of `accelerate launch` are used.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.operations import convert_outputs_to_fp32
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cloze.data.batches.layout import Layout
from cloze.distributed.fsdp_plugin import is_fsdp
from cloze.model.archs import GATHERED_AS_ONE
from cloze.model.compiled import compile_layers
from cloze.model.depth import layer_modules
from cloze.training.engines.base import Support
from cloze.training.engines.ddp import DDPEngine
from cloze.training.engines.optimizer_memory import optimizer_bytes
from cloze.training.engines.sharded_state import Fragment, local
from cloze.utils.environment import requests

SUPPORT = Support("FSDP2", precisions=("no", "bf16"), whole_parameters=False, compiles="layers")


class FSDP2Engine(DDPEngine):
    """Torch's optimizer steps this rank's rows of every fp32 weight."""

    partitioned = True
    needs_own_processes = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.support = SUPPORT

    @classmethod
    def requested(cls, deepspeed: str | None) -> bool:
        """Return whether the launcher asks for FSDP."""
        return requests.wants_fsdp()

    @classmethod
    def runs(cls, accelerator: Accelerator) -> bool:
        """Return whether accelerate was started with FSDP."""
        return is_fsdp(accelerator)

    @classmethod
    def requested_support(cls, deepspeed: str | None, precision: str) -> Support:
        """Return what FSDP2 supports."""
        return SUPPORT

    def can_hold(self, parameter: torch.nn.Parameter) -> bool:
        """Return whether a parameter has rows."""
        return parameter.ndim > 0

    def compile(self, model: Any, mode: str) -> str:
        """Compile each layer by itself."""
        compile_layers(units(model), mode)
        return f"each layer of the {model.base_model_prefix}"

    def wrap(self, model: Any, optimizer: torch.optim.Optimizer, layout: Layout) -> tuple[Any, Any]:
        """Divide the model's parameters among all ranks, in place; the optimizer holds this rank's parts of them.

        A layer's whole weights are released as soon as it is divided. Weights stay in fp32. In mixed precision they
        are gathered in bf16, autocast chooses the precision of operations as in DDP, and gradients are added in fp32.
        """
        accelerator = self.accelerator
        for group in optimizer.param_groups:  # no other reference may keep the whole weights
            group["params"] = []
        half = accelerator.mixed_precision == "bf16"
        how: dict[str, Any] = {
            "mesh": init_device_mesh(accelerator.device.type, (self.world_size,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        }
        for layer in units(model):
            fully_shard(layer, **how, reshard_after_forward=accelerator.state.fsdp_plugin.reshard_after_forward)
        fully_shard(model, **how, reshard_after_forward=False)  # the rest stays gathered: backward begins with it
        model.register_forward_hook(_let_go)
        # torch warns of in-place changes to logits, a view of a matrix product; Cloze makes no such changes.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        if half:
            autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
            model.forward = convert_outputs_to_fp32(autocast(model.forward))
        parts = dict(model.named_parameters())
        for names, group in zip(self.group_names, optimizer.param_groups, strict=True):
            group["params"] = [parts[name] for name in names]
            if isinstance(optimizer, torch.optim.SGD):  # torch (2.13) fuses it for whole tensors only
                group["fused"] = None
        return model, accelerator.prepare_optimizer(optimizer)

    def locate(self, name: str, parameter: DTensor) -> Fragment:
        """Return this rank's rows of a parameter."""
        return Fragment(name, self.shape_of(parameter), *own_rows(parameter), parameter, 0)

    def whole(self, parameter: DTensor) -> torch.Tensor:
        """Gather a parameter; every rank calls it."""
        return parameter.detach().full_tensor()  # type: ignore[attr-defined]

    @torch.no_grad()
    def refresh(self, parameter: DTensor, full: torch.Tensor) -> None:
        """Set this rank's rows, from which weights are gathered."""
        offset, length = own_rows(parameter)
        local(parameter).view(-1).copy_(full.reshape(-1)[offset : offset + length])

    def bytes_to_come(self, elements: int, moments: int) -> int:
        """Return the bytes of a rank's optimizer tensors. Gathered tensors fit into whole weights and gradients."""
        return -(-int(optimizer_bytes(elements, moments, None, half=False)) // self.world_size)


def own_rows(parameter: DTensor) -> tuple[int, int]:
    """Return (offset, length) of this rank's elements of a parameter. Ranks have the rows that `torch.chunk` gives
    them: the last ranks may have fewer, or none."""
    rows, mesh = parameter.shape[0], parameter.device_mesh
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return first * (parameter.numel() // max(rows, 1)), local(parameter).numel()


def units(model: Any) -> list[torch.nn.Module]:
    """Return the modules that are gathered one at a time: the layers with matrices of their own. The rest, embeddings
    and head, is gathered together, so that its weights may be tied. Empty for architectures that do not allow it."""
    if model.config.model_type in GATHERED_AS_ONE:
        return []
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = []
    for layer in layer_modules(model):
        inside = Counter(id(p) for module in layer.modules() for p in module._parameters.values() if p is not None)
        alone = all(users[one] == count for one, count in inside.items())
        if alone and any(parameter.ndim > 1 for parameter in layer.parameters()):
            found.append(layer)
    return found


def _let_go(model: FSDPModule, *_: Any) -> None:
    """Release the gathered parameters after a forward pass without a backward pass: they would hide later updates."""
    if not torch.is_grad_enabled():
        model.reshard()
