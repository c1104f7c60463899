"""Train a run in this process, with pushes to the Hub meanwhile.

train_here(config)                          # as `cloze train` does
train_here(config, own_process=False)       # in a notebook's kernel
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from cloze.config import TrainConfig
from cloze.distributed.resilience.run_owner import own_run_folder
from cloze.training.run_dir import check_run_folder
from cloze.training.trainer import train
from cloze.utils.terminal.console import is_main


def train_here(config: TrainConfig, own_process: bool = True) -> Path:
    """Train as the only process group that writes into the run's folder, and return that folder.

    With --push_to_hub what is saved goes to the Hub meanwhile. `own_process`: False if the process does more than
    this run, such as a notebook's kernel.
    """
    if config.push_to_hub:
        from cloze.export.hub.follow import following
    with own_run_folder(Path(config.output_dir)):
        if is_main():
            check_run_folder(config)
        with following(config) if config.push_to_hub else nullcontext():
            return train(config, own_process)
