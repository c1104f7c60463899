"""What was read from a run's JSON and YAML files, any of which may be missing, cut short or hold something else.

config = read_mapping(Path("runs/demo/config.yaml"))        # {} where it cannot be read
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

import yaml


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and value is not True and value is not False and math.isfinite(value)


def part(values: dict[str, Any], key: str) -> dict[str, Any]:
    """A mapping inside a mapping; empty where there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def interval_of(scores: dict[str, Any], kind: str) -> list[float] | None:
    """[low, high] of a result where eval.json has them."""
    found = scores.get(f"{kind}_interval")
    return found if isinstance(found, list) and len(found) == 2 and all(map(is_number, found)) else None


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file's mapping; empty where there is no such file or it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
