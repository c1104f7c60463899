"""What is only true on this machine, and what nobody else may know: left out of what is told to others.

told = portable({"output_dir": "/home/me/runs/x", "model_name_or_path": "/home/me/start", "seed": 7})
# {"model_name_or_path": "start", "seed": 7}
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# Options whose values are secrets: never stored, shown, or handed to trackers.
SECRETS = ("token", "hub_token")
# Options that say where something lies here, or how this machine is called (`run_name` often is).
PLACES = ("output_dir", "cache_dir", "prepared_cache_dir", "resume_from_checkpoint", "run_name")
_PATH = re.compile(r"[/~]|\.\.?/")


def is_place(text: str) -> bool:
    """Whether a text is a path of this machine: written like one, or something that exists here."""
    if _PATH.match(text):
        return True
    return "/" in text and len(text) < 4096 and "\0" not in text and os.path.exists(text)


def without_place(value: Any) -> Any:
    """A value, also inside lists and mappings, with only the last part of every path."""
    if isinstance(value, dict):
        return {key: without_place(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_place(one) for one in value]
    return Path(value).name if isinstance(value, str) and is_place(value) else value


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration as others may see it: no secrets, no places, of other paths the last part."""
    return {key: without_place(value) for key, value in config.items() if key not in SECRETS + PLACES}
