"""FSDP2: every parameter divided among the ranks by its rows, gathered when its layer computes.

    model, optimizer = shard(accelerator, model, optimizer)      # in place, before the first step

torch's `fully_shard` is called here rather than by `accelerator.prepare`, so that all architectures are divided by one
rule and that what is computed in bf16 is what DDP computes in bf16. accelerate's own way (1.15, fsdp2_prepare_model)
divides a head apart from the bias that BERT and RoBERTa share with it, which torch (2.13) refuses, goes by names of
classes, computes all of a model in bf16 and adds up gradients in bf16. Its settings are those of `accelerate launch`.
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

from cloze.errors import ConfigError
from cloze.model.archs import GATHERED_AS_ONE
from cloze.model.depth import layer_modules


def check_fsdp(divided: bool, precision: str) -> None:
    """Raise ConfigError for a precision that FSDP2 does not support. `divided`: whether FSDP2 is used."""
    if divided and precision not in ("no", "bf16"):
        raise ConfigError(
            f"FSDP2 does not support {precision}",
            where="--precision",
            hint="use bf16 or fp32, or another engine (launch/accelerate/zero3.yaml)",
        )


def shard(accelerator: Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Divide the model's parameters among all ranks, in place, and let the optimizer hold this rank's parts of them.

    A layer's whole weights are let go of as soon as it is divided. Weights stay in fp32; in mixed precision they are
    gathered in bf16, operations choose their precision by autocast as under DDP, and gradients are added up in fp32.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:  # nothing else may keep the whole weights
        group["params"] = [names[parameter] for parameter in group["params"]]
    names.clear()
    half = accelerator.mixed_precision == "bf16"
    how: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    for layer in units(model):
        fully_shard(layer, **how, reshard_after_forward=accelerator.state.fsdp_plugin.reshard_after_forward)
    fully_shard(model, **how, reshard_after_forward=False)  # the rest, which backward begins with, stays gathered
    model.register_forward_hook(_let_go)
    # Logits are a view of a matrix product's result; nobody changes them in place, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if half:
        model.forward = convert_outputs_to_fp32(torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward))
    parts = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parts[name] for name in group["params"]]
        if isinstance(optimizer, torch.optim.SGD):  # torch (2.13) has the fused one for whole tensors only
            group["fused"] = None
    return model, accelerator.prepare_optimizer(optimizer)


def units(model: Any) -> list[torch.nn.Module]:
    """The modules that are gathered one at a time: the layers that hold matrices of their own. The rest, embeddings
    and head, is gathered as a whole, so that weights may be tied in it. None in architectures that do not allow it."""
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
    """After a forward that no backward follows: what is still gathered would hide it when the parts are changed."""
    if not torch.is_grad_enabled():
        model.reshard()
