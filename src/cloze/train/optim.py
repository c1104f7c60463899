"""Optimizers with decay groups, and learning rates as a function of the step.

optimizer, names = build_optimizer(model, config, zero_offload=False)
schedule = learning_rate_schedule(config, total_steps)
schedule(0)          # learning rate of the first step
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import torch
import yaml
from transformers import get_scheduler

from cloze.config import TrainConfig
from cloze.console import warn
from cloze.errors import ConfigError


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[tuple[dict[str, Any], list[str]]]:
    """(parameter group, names) pairs, none empty: weights decay; biases, norms and other vectors do not."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    split = [
        ([(n, p) for n, p in trained if p.ndim >= 2], weight_decay),
        ([(n, p) for n, p in trained if p.ndim < 2], 0.0),
    ]
    return [
        ({"params": [p for _, p in pairs], "weight_decay": decay}, [n for n, _ in pairs])
        for pairs, decay in split
        if pairs
    ]


def build_optimizer(
    model: torch.nn.Module, config: TrainConfig, offload: bool
) -> tuple[torch.optim.Optimizer, list[list[str]]]:
    """The optimizer and the parameter names of each of its groups. Raises ConfigError for arguments it does not have.

    AdamW (Loshchilov and Hutter, 2019) is fused on CPU and CUDA; with ZeRO offload it is DeepSpeed's CPU Adam, which
    is compiled at its first use, where there is a compiler. All choices keep their state per element, so that any
    piece of a parameter can be updated by itself.
    """
    groups = decay_groups(model, config.weight_decay)
    parameters, names = [group for group, _ in groups], [names for _, names in groups]
    arguments = {"lr": config.learning_rate, **parse_arguments(config.optim_args)}
    try:
        if config.optim == "sgd":
            return torch.optim.SGD(parameters, fused=True, **arguments), names
        if config.optim == "rmsprop":
            return torch.optim.RMSprop(parameters, **arguments), names
        betas = (config.adam_beta1, config.adam_beta2)
        arguments = {"betas": betas, "eps": config.adam_epsilon, **arguments}
        if offload and torch.cuda.is_available():
            if shutil.which("g++") or shutil.which("c++"):
                from deepspeed.ops.adam import DeepSpeedCPUAdam

                return DeepSpeedCPUAdam(parameters, **arguments), names
            warn("no C++ compiler is here, so that offload uses torch's AdamW, not DeepSpeed's faster CPU Adam")
        return torch.optim.AdamW(parameters, fused=True, **arguments), names
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error), where="--optim_args", hint=f"see the arguments of {config.optim}") from None


def parse_arguments(text: str | None) -> dict[str, Any]:
    """`momentum=0.9,nesterov=true` -> {"momentum": 0.9, "nesterov": True}. Raises ConfigError."""
    values: dict[str, Any] = {}
    for part in (text or "").split(","):
        name, equals, value = part.partition("=")
        if not part.strip():
            continue
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"cannot read {part!r}", where="--optim_args", hint="write momentum=0.9,nesterov=true")
        values[name.strip()] = yaml.safe_load(value)
    return values


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each step (0-based), from the schedules of transformers; it keeps no state.

    Raises ConfigError for a schedule that is not known or not a function of the step.
    """
    warmup = config.warmup_steps
    num_warmup_steps = math.ceil(total_steps * warmup) if warmup < 1 else int(warmup)
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD([weight], lr=config.learning_rate),
            num_warmup_steps=num_warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
        factor = scheduler.lr_lambdas[0]
        factor(0)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(str(error), where="--lr_scheduler_type / --lr_scheduler_kwargs") from None
    except AttributeError:
        raise ConfigError(
            f"{config.lr_scheduler_type} depends on more than the step",
            where="--lr_scheduler_type",
            hint="use linear, cosine, constant_with_warmup, polynomial, inverse_sqrt or warmup_stable_decay",
        ) from None
    return lambda step: config.learning_rate * float(factor(step))
