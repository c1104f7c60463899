"""`cloze init DIR`: write the recipes, configurations and scripts of the repository, for a Cloze installed as a wheel.

They are in `cloze/tools/launch/kit`: links to `launch`, `ds_configs` and `slurm` in the repository, files in a wheel.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import cloze
from cloze.config import InitConfig
from cloze.errors import ConfigError
from cloze.utils.atomic_files import disk_errors, staged_folder
from cloze.utils.terminal.console import say

KIT = Path(cloze.__file__).parent / "tools" / "launch" / "kit"
FOLDERS = ("launch", "ds_configs", "slurm")
# What works in the repository only, and what belongs to one site; a wheel does not have them.
NOT_IN_A_WHEEL = ("demo", "test", "test_lowest", "lock", "env.sh", "site.env", "__pycache__")


def run(config: InitConfig) -> None:
    """Write them into the folder, each of the three whole or not at all. Raises ConfigError if one is there
    already, DiskError."""
    folder = Path(config.folder)
    for name in FOLDERS:
        if (folder / name).exists():
            raise ConfigError("is there already", where=folder / name, hint="give another folder, or move it away")
    for name in FOLDERS:
        with disk_errors(folder), staged_folder(folder / name) as staged:
            ignored = shutil.ignore_patterns(*NOT_IN_A_WHEEL)
            shutil.copytree(KIT / name, staged, ignore=ignored, dirs_exist_ok=True)
    start = "start commands there, as in `cloze plan launch/recipes/NAME.yaml`"
    say("init", f"{', '.join(FOLDERS)} -> {folder}; {start}", result=folder)
