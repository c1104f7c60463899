"""Values of a run's JSON and YAML files (`foreign.json_yaml.read_mapping`), which may hold anything.

low, high = interval_of(scores, "perplexity") or (None, None)
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def part(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a mapping inside a mapping; empty if it is missing."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def interval_of(scores: dict[str, Any], kind: str) -> list[float] | None:
    """Return [low, high] of a result in eval.json; None if it is missing."""
    found = scores.get(f"{kind}_interval")
    return found if isinstance(found, list) and len(found) == 2 and all(map(is_number, found)) else None
