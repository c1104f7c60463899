"""Optimizers and their parameter groups: weight decay, learning rate by layer, matrices for Muon.

    check_optimizer(config)                                        # before any process group
    check_update(config, support, precision)                       # does the engine keep parameters whole?
    optimizer, names = build_optimizer(model, config, offload=False)

A group's `lr_scale` multiplies the learning rate of the step (see `Engine.step`).

AdamW, step t = 1, 2, ... with the clipped gradient g (`Engine.take_step`), in this order:

    weight *= 1 - lr * weight_decay
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    weight -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + adam_epsilon)
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import shutil
from collections.abc import Callable
from typing import Any

import torch

from cloze.config import TrainConfig
from cloze.config.ranges import MIN_EPSILON
from cloze.config.spellings import parse_arguments
from cloze.errors import ConfigError
from cloze.model.depth import parameter_depths
from cloze.training.engines.base import Support
from cloze.training.engines.deepspeed_ops import load_op
from cloze.training.engines.precision import precision_name
from cloze.utils.terminal.console import warn

Groups = list[tuple[dict[str, Any], list[str]]]
_NOT_ARGUMENTS = {"params", "model_params", "lr", "weight_decay", "adamw_wd", "kwargs", "betas", "adamw_betas"}
_NOT_ARGUMENTS |= {"maximize", "differentiable", "capturable"}  # gradient ascent; code around the optimizer
_FLAGS = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "adam_beta1", "adamw_betas": "adam_beta1"}
# For each optimizer, how many tensors of a parameter's shape it keeps (see `moments_of`).
_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "stable_adamw": 2, "sgd": 0, "rmsprop": 1, "muon": 1}
WHOLE_TENSORS = ("stable_adamw", "muon")  # the update of an element depends on the whole tensor


def decay_groups(model: torch.nn.Module, weight_decay: float) -> Groups:
    """Return (parameter group, names) pairs, none empty: weights decay; biases, norms and other vectors do not."""
    return _groups(model, weight_decay, lambda name: ())


def layer_groups(model: torch.nn.Module, config: TrainConfig) -> Groups:
    """Return the groups of `decay_groups`, split further by `lr_scale` (depth) and `use_muon` if configured.

    Layer l (0 .. L - 1) has lr_scale decay^(L - l), embeddings decay^(L + 1), the head 1: ELECTRA (Clark et al. 2020,
    appendix A), with the exponents of BEiT (Bao et al. 2022).
    """
    decay = config.layerwise_lr_decay
    depths, num_layers = parameter_depths(model) if decay is not None else ({}, 0)
    matrices = hidden_matrices(model) if config.optim == "muon" else set()

    def settings(name: str) -> tuple[tuple[str, Any], ...]:
        muon = (("use_muon", name in matrices),) if config.optim == "muon" else ()
        scale = (("lr_scale", decay ** (num_layers + 1 - depths[name])),) if decay is not None else ()
        return muon + scale

    return _groups(model, config.weight_decay, settings)


def _groups(
    model: torch.nn.Module, weight_decay: float, settings: Callable[[str], tuple[tuple[str, Any], ...]]
) -> Groups:
    """Return the trained parameters grouped by weight decay and `settings`, in the order of the model."""
    pairs: dict[tuple[bool, Any], list[tuple[str, Any]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pairs.setdefault((parameter.ndim < 2, settings(name)), []).append((name, parameter))
    return [
        (
            {"params": [p for _, p in found], "weight_decay": 0.0 if is_vector else weight_decay, **dict(more)},
            [n for n, _ in found],
        )
        for (is_vector, more), found in sorted(pairs.items(), key=lambda item: item[0][0])
    ]


def hidden_matrices(model: Any) -> set[str]:
    """Return the names of the weight matrices between embeddings and decoder, which Muon (Jordan et al. 2024) updates.

    Not those with a row per token, position or segment, whose rows are independent vectors; nor convolutions.
    """
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", None)
    found = set()
    for prefix, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, torch.nn.Parameter) and weight.ndim == 2 and vocab_size not in weight.shape
        if is_matrix and "embedding" not in type(module).__name__.lower():
            found.add(f"{prefix}.weight")
    return found


def build_optimizer(
    model: torch.nn.Module, config: TrainConfig, offload: bool
) -> tuple[torch.optim.Optimizer, list[list[str]]]:
    """Return the optimizer and the parameter names of each of its groups. Raises ConfigError for unknown arguments.

    AdamW (Loshchilov and Hutter, 2019) is fused on CPU and CUDA. With ZeRO offload it is DeepSpeed's CPU Adam,
    compiled at its first use if a compiler is installed. StableAdamW (Wortsman et al. 2023) and Muon (Jordan et al.
    2024; AdamW for all but hidden matrices) come from pytorch_optimizer. State: fp32 tensors of a parameter's shape
    and the number of steps of each group.
    """
    groups = layer_groups(model, config)
    parameters, names = [group for group, _ in groups], [names for _, names in groups]
    make, usual = _choose(config, offload)
    return _make(make, parameters, config, usual), names


def _make(make: Any, groups: Any, config: TrainConfig, usual: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the optimizer. Raises ConfigError for an unknown argument or an invalid value."""
    arguments = parse_arguments(config.optim_args)
    known = set(inspect.signature(make).parameters) - _NOT_ARGUMENTS
    for name in arguments:
        if name not in known:
            hint = f"it is the flag --{_FLAGS[name]}" if name in _FLAGS else f"it has {', '.join(sorted(known))}"
            raise ConfigError(f"{config.optim} takes no {name} here", where="--optim_args", hint=hint)
        _check_argument(name, arguments[name], inspect.signature(make).parameters[name].default)
    if config.optim == "muon" and "adamw_lr" in arguments:
        _scale_others(groups, arguments["adamw_lr"], config.learning_rate)
    try:
        return make(groups, lr=config.learning_rate, **{**usual, **arguments})
    except Exception as error:  # each optimizer raises its own errors
        raise _refused(error, config) from None


def _refused(error: Exception, config: TrainConfig) -> ConfigError:
    """Return one line for the optimizer's error. Raises the error itself if the user gave no arguments."""
    if not config.optim_args or isinstance(error, MemoryError):
        raise error
    what = (str(error) or type(error).__name__).split("\n")[0]
    return ConfigError(what, where="--optim_args", hint=f"see the arguments of {config.optim}")


def _choose(config: TrainConfig, offload: bool) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer's class and its arguments, which optim_args may override."""
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    if config.optim == "sgd":
        return torch.optim.SGD, {"fused": True}
    if config.optim == "rmsprop":
        return torch.optim.RMSprop, {}
    if config.optim == "stable_adamw":
        from pytorch_optimizer import StableAdamW

        return StableAdamW, {"betas": betas, "eps": eps}
    if config.optim == "muon":
        from pytorch_optimizer import Muon

        # Scale orthogonal updates to the size of AdamW's (Liu et al. 2025), so that one learning rate suits both.
        return Muon, {
            "use_adjusted_lr": True,
            "adamw_betas": betas,
            "adamw_eps": eps,
            "adamw_lr": config.learning_rate,
        }
    if offload and torch.cuda.is_available():
        if shutil.which("g++") or shutil.which("c++"):
            from deepspeed.ops.adam import DeepSpeedCPUAdam
            from deepspeed.ops.op_builder import CPUAdamBuilder

            load_op(CPUAdamBuilder(), "offload of the optimizer")
            return DeepSpeedCPUAdam, {"betas": betas, "eps": eps}
        warn("no C++ compiler is here, so that offload uses torch's AdamW, not DeepSpeed's faster CPU Adam")
    return torch.optim.AdamW, {"betas": betas, "eps": eps, "fused": True}


def moments_of(model: torch.nn.Module, config: TrainConfig) -> float:
    """Return the tensors kept for each trained element (Muon: its matrices 1, the rest AdamW's 2)."""
    arguments = parse_arguments(config.optim_args)
    found = float(_MOMENTS[config.optim])
    if config.optim in ("sgd", "rmsprop") and arguments.get("momentum"):
        found += 1
    if config.optim == "rmsprop" and arguments.get("centered"):
        found += 1
    if config.optim in ("adamw_torch", "adamw_torch_fused") and arguments.get("amsgrad"):
        found += 1
    if config.optim == "muon":
        groups = [group for group, _ in layer_groups(model, config)]
        sizes = [(sum(p.numel() for p in group["params"]), group["use_muon"]) for group in groups]
        found = sum(size * (1 if muon else 2) for size, muon in sizes) / sum(size for size, _ in sizes)
    return found


def _check_argument(name: str, value: Any, default: Any) -> None:
    """Raise ConfigError for a value of another type than the default, and for a number that is not finite."""
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif name in ("foreach", "fused"):
        fits, expected = value is None or isinstance(value, bool), "true or false"
    elif name in ("momentum", "alpha", "dampening"):
        fits, expected = _is_number(value) and 0 <= value < 1, "at least 0 and below 1"
    else:
        fits, expected = _is_number(value) or not _is_number(default), "a finite number"
    if not fits or (_is_number(value) and not math.isfinite(value)):
        what = f"{name} must be {expected}, not {value!r}"
        raise ConfigError(what, where="--optim_args", hint="write momentum=0.9,nesterov=true")
    if name in ("eps", "adamw_eps") and not MIN_EPSILON <= value <= 1:
        raise ConfigError(f"{name} must be at least {MIN_EPSILON} and at most 1, not {value!r}", where="--optim_args")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scale_others(groups: list[dict[str, Any]], adamw_lr: Any, learning_rate: float) -> None:
    """Scale the groups that Muon leaves to AdamW to the peak learning rate `adamw_lr`; they share the schedule."""
    if not isinstance(adamw_lr, int | float) or adamw_lr < 0 or learning_rate == 0:
        raise ConfigError(
            f"adamw_lr={adamw_lr} is not a learning rate", where="--optim_args", hint="for example adamw_lr=3e-4"
        )
    for group in groups:
        if not group["use_muon"]:
            group["lr_scale"] = group.get("lr_scale", 1.0) * adamw_lr / learning_rate


def check_optimizer(config: TrainConfig) -> None:
    """Raise ConfigError if the optimizer is not installed, rejects an argument, or cannot take a step.

    It builds the optimizer for two small weights, because only the optimizer knows its valid arguments.
    """
    if config.optim in WHOLE_TENSORS and importlib.util.find_spec("pytorch_optimizer") is None:
        raise ConfigError(
            f"{config.optim} is not installed", where="--optim", hint="`pip install cloze[optimizers]` for it"
        )
    make, usual = _choose(config, offload=False)
    weights = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    muon = config.optim == "muon"
    groups = [
        {"params": [w], "weight_decay": 0.0, **({"use_muon": n == 0} if muon else {})} for n, w in enumerate(weights)
    ]
    optimizer = _make(make, groups, config, usual)
    try:
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    except Exception as error:
        raise _refused(error, config) from None


def check_update(config: TrainConfig, support: Support, precision: str) -> None:
    """Raise ConfigError if the optimizer needs whole parameters and the engine flattens or splits them."""
    if config.optim in WHOLE_TENSORS and not support.whole_parameters:
        engine = f"{support.name} in {precision_name(precision)}"
        raise ConfigError(
            f"{config.optim} needs whole parameters, which {engine} does not keep",
            where="--optim",
            hint="train with DDP (launch/accelerate/multi_gpu.yaml), or use adamw_torch_fused",
        )
