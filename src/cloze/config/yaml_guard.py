"""The YAML of a --config file, checked before it is used: names and plain values, and nothing that could do more.

check_recipe("recipe.yaml")     # ["seed", "output_dir"], the names in it; or ConfigError
"""

from __future__ import annotations

import contextlib

from cloze.errors import ConfigError
from cloze.utils.foreign.json_yaml import MAX_YAML_BYTES, UNCLEAR, check_events, yaml_names
from cloze.utils.foreign.paths import read_text


def check_recipe(path: str) -> list[str]:
    """Return the names that a file sets. Raises ConfigError if it cannot be read or is not a YAML mapping of names,
    each given once, to plain values."""
    return yaml_names(read_text(path, MAX_YAML_BYTES, typed=True, error=ConfigError), path, ConfigError)


def check_flow(text: str, where: str) -> None:
    """Raise ConfigError for an alias, a tag or great depth in a value of the command line, which need not be YAML."""
    import yaml

    with contextlib.suppress(yaml.YAMLError):
        check_events(text, where, ConfigError)


def check_number(text: str, where: str) -> None:
    """Raise ConfigError for a number of the command line that YAML 1.1 reads with the base 60: `1:30` is 90."""
    if ":" in text and UNCLEAR.fullmatch(text):
        raise ConfigError(f"{text} is not a plain number", where=where, hint="write a decimal number")
