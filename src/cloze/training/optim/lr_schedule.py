"""Learning rates as a function of the step.

    schedule = learning_rate_schedule(config, total_steps)
    schedule(0)          # learning rate of the first step

The learning rate of step s (0-based) of T is `learning_rate` times a factor. During the first w steps (`warmup_steps`;
below 1 a share of T, rounded up) the factor is s / w, so 0 at the first step. `constant` has no warm-up: 1. After the
warm-up, with u = (s - w) / (T - w), the factor is

    linear                  1 - u
    cosine                  (1 + cos(pi * u)) / 2
    polynomial              (1 - u) * (1 - 1e-7 / learning_rate) + 1e-7 / learning_rate
    inverse_sqrt            sqrt(w / s); without warm-up sqrt(10,000 / (s + 10,000))
    constant_with_warmup    1
    warmup_stable_decay     1; in the last d steps, with v = (s - (T - d)) / d, by `decay_type`: cosine (the default)
                            (1 + cos(pi * v)) / 2, linear 1 - v, 1-sqrt 1 - sqrt(v). d is `num_decay_steps`, below 1 a
                            share of T, rounded up; by default a tenth of T

`lr_scheduler_kwargs` change it as documented for the schedules of transformers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from cloze.config import TrainConfig
from cloze.config.ranges import MAX_STEPS
from cloze.config.spellings import SCHEDULE_ALIASES, WSD, schedule_name
from cloze.errors import ConfigError
from cloze.utils.suggest import suggestion

_GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
_DECAYS = {"sqrt": "1-sqrt", "1_sqrt": "1-sqrt", "one_minus_sqrt": "1-sqrt"}


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return the function from step (0-based) to learning rate, taken from transformers; it keeps no state.

    Raises ConfigError for an unknown schedule, or one that depends on more than the step.
    """
    name = schedule_name(config.lr_scheduler_type)
    if name in ("1-sqrt", *_DECAYS):
        raise ConfigError(
            f"{name} is a way to decay, not a schedule",
            where="--lr_scheduler_type",
            hint=f"""use {WSD} with --lr_scheduler_kwargs '{{"decay_type": "1-sqrt"}}'""",
        )
    check_arguments(name, config.lr_scheduler_kwargs or {})
    num_warmup_steps = _steps(config.warmup_steps, total_steps)
    arguments = config.lr_scheduler_kwargs
    if name == WSD:
        arguments = _wsd_arguments(arguments or {}, num_warmup_steps, total_steps)
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        scheduler = get_scheduler(
            name,
            torch.optim.SGD([weight], lr=config.learning_rate),
            num_warmup_steps=num_warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=arguments,
        )
        factor = scheduler.lr_lambdas[0]
        for step in {0, min(num_warmup_steps, total_steps - 1), total_steps // 2, total_steps - 1}:
            _check_factor(factor(step), step)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise ConfigError(
            str(error),
            where="--lr_scheduler_type / --lr_scheduler_kwargs",
            hint="give arguments that this schedule of transformers has",
        ) from None
    except AttributeError:
        raise ConfigError(
            f"{config.lr_scheduler_type} depends on more than the step",
            where="--lr_scheduler_type",
            hint="use linear, cosine, constant_with_warmup, polynomial, inverse_sqrt or warmup_stable_decay",
        ) from None
    return lambda step: config.learning_rate * float(factor(step))


def check_schedule(config: TrainConfig) -> None:
    """Raise ConfigError for an invalid schedule before the length of the run is known; MAX_STEPS stands for it."""
    learning_rate_schedule(config, config.max_steps if config.max_steps > 0 else MAX_STEPS)


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Raise ConfigError for an unknown schedule, unknown arguments, and values that are not finite numbers."""
    functions: dict[str, Any] = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    if name not in functions:
        hint = suggestion(name, [*functions, *SCHEDULE_ALIASES]) or f"there are: {', '.join(sorted(functions))}"
        raise ConfigError(f"no schedule {name!r}", where="--lr_scheduler_type", hint=hint)
    known = inspect.signature(functions[name]).parameters
    taken = sorted(set(known) - _GIVEN)
    for key, value in arguments.items():
        if key not in taken:
            hint = f"it has {', '.join(taken)}" if taken else "leave them out"
            raise ConfigError(f"{name} has no argument {key!r}", where="--lr_scheduler_kwargs", hint=hint)
        of = type(known[key].default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if of in (int, float) and not is_number:
            raise ConfigError(f"{key} must be a finite number, not {value!r}", where="--lr_scheduler_kwargs")
        if isinstance(value, dict | list):
            raise ConfigError(f"{key} must be a single value", where="--lr_scheduler_kwargs")


def _check_factor(factor: Any, step: int) -> None:
    if isinstance(factor, complex) or not 0 <= factor < math.inf:
        raise ValueError(f"the learning rate of step {step + 1:,} would be {factor} times the peak")


def _wsd_arguments(given: dict[str, Any], num_warmup_steps: int, total_steps: int) -> dict[str, Any]:
    """Return the arguments of warm-up, plateau and decay (Hägele et al. 2024), completed from the length of the run.

    `num_decay_steps` may be a share of all steps. By default it is a tenth of them; with `num_stable_steps` it is what
    is left after the plateau. Raises ConfigError if the parts do not add up to the run.
    """
    arguments = dict(given)
    for key in ("decay_type", "warmup_type"):
        if key in arguments:
            arguments[key] = _DECAYS.get(arguments[key], arguments[key])
    stable, decay = arguments.pop("num_stable_steps", None), arguments.get("num_decay_steps")
    where = "--lr_scheduler_kwargs"
    for key, value in (("num_stable_steps", stable), ("num_decay_steps", decay)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise ConfigError(f"{key} must be a number of steps or a share of them, not {value!r}", where=where)
    stable = None if stable is None else _steps(stable, total_steps)
    if decay is None:
        decay = 0.1 if stable is None else max(0, total_steps - num_warmup_steps - stable)
    decay = _steps(decay, total_steps)
    rest = total_steps - num_warmup_steps - decay
    if rest < 0 or (stable is not None and stable != rest):
        plateau = "" if stable is None else f" + {stable} of plateau"
        raise ConfigError(
            f"{num_warmup_steps} steps of warm-up{plateau} + {decay} of decay do not fit into a run of {total_steps}",
            where=where,
            hint="give num_decay_steps only (below 1: a share of all steps); the plateau is what is left",
        )
    return {**arguments, "num_decay_steps": decay}


def _steps(number: float, total_steps: int) -> int:
    """Return a number of steps from a number or, below 1, a share of all steps (rounded up, as in transformers)."""
    return math.ceil(total_steps * number) if number < 1 else int(number)
