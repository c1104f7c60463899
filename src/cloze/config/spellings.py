"""Read the values of options that have several spellings: --optim_args and --lr_scheduler_type."""

from __future__ import annotations

from typing import Any

from cloze.errors import ConfigError
from cloze.utils.foreign.json_yaml import parse_yaml

WSD = "warmup_stable_decay"
SCHEDULE_ALIASES = {"wsd": WSD, "trapezoid": WSD, "trapezoidal": WSD}


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Parse `momentum=0.9,nesterov=true` -> {"momentum": 0.9, "nesterov": True}. Raises ConfigError."""
    values: dict[str, Any] = {}
    for part in (text or "").split(","):
        name, equals, value = part.partition("=")
        if not part.strip():
            continue
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"cannot read {part!r}", where="--optim_args", hint="write momentum=0.9,nesterov=true")
        if name.strip() in values:
            raise ConfigError(f"{name.strip()} is given twice", where="--optim_args", hint="give it once")
        values[name.strip()] = _read(value)
    return values


def _read(text: str) -> Any:
    """Return a value as YAML reads it, but 1e-8 is a number too."""
    value = parse_yaml(text, "--optim_args", kind=object, typed=True, error=ConfigError)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def schedule_name(name: str) -> str:
    """Return the name that transformers has for a schedule."""
    return SCHEDULE_ALIASES.get(name, name)
