"""Remove secrets and facts of this machine from files that are shared with others.

config = shareable_config({"output_dir": "/home/me/runs/x", "model_name_or_path": "/home/me/start", "seed": 7})
# {"model_name_or_path": "start", "seed": 7}
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")

# Options whose values are secrets: never stored, shown, or handed to trackers.
SECRETS = ("token", "hub_token")
# Options with paths of this machine or its name (`run_name` often has it).
PLACES = ("output_dir", "cache_dir", "prepared_cache_dir", "resume_from_checkpoint", "run_name")
_PATH = re.compile(r"[/~]|\.\.?/")


def split_secrets(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a configuration without its secrets, and the secrets as variables for a child process, which reads them
    by `with_secrets`: a killed process would leave them in a file."""
    secrets = {_variable(name): config[name] for name in SECRETS if config.get(name)}
    return {key: value for key, value in config.items() if key not in SECRETS}, secrets


def with_secrets(config: Config) -> Config:
    """Return a command's configuration with the secrets that `split_secrets` put into the environment, and remove them
    from the environment."""
    found = {name: os.environ.pop(_variable(name), None) for name in SECRETS if hasattr(config, name)}
    return replace(config, **{name: value for name, value in found.items() if value})  # type: ignore[type-var]


def _variable(secret: str) -> str:
    return f"CLOZE_GIVEN_{secret.upper()}"


def is_place(text: str) -> bool:
    """Return whether a text is a path of this machine: written like one, or existing here."""
    if _PATH.match(text):
        return True
    return "/" in text and len(text) < 4096 and "\0" not in text and os.path.exists(text)


def basename_paths(value: Any) -> Any:
    """Return a value with paths, also inside lists and mappings, reduced to their last part."""
    if isinstance(value, dict):
        return {key: basename_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [basename_paths(one) for one in value]
    return Path(value).name if isinstance(value, str) and is_place(value) else value


def shareable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration for others: no secrets or places, and only the last part of other paths."""
    return {key: basename_paths(value) for key, value in config.items() if key not in SECRETS + PLACES}
