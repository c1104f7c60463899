"""`cloze train`: train a model on a prepared folder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from cloze.config import TrainConfig
from cloze.distributed.resilience.run_owner import own_run_folder
from cloze.training.run_dir import check_run_folder
from cloze.training.trainer import train
from cloze.utils.shareable import with_secrets
from cloze.utils.terminal.console import is_main, say


def run(config: TrainConfig) -> None:
    """Train, then say what to do next."""
    folder = train_here(with_secrets(config))
    if config.save_strategy != "no":
        say("next", f"cloze consolidate {folder}")


def train_here(config: TrainConfig, own_process: bool = True) -> Path:
    """Train in this process, as the only start in the run's folder, and return that. With --push_to_hub what is saved
    goes to the Hub meanwhile.

    `own_process`: False where there is more in it than this run, such as a notebook.
    """
    if config.push_to_hub:
        from cloze.export.hub.follow import following
    with own_run_folder(Path(config.output_dir)):
        if is_main():
            check_run_folder(config)
        with following(config) if config.push_to_hub else nullcontext():
            return train(config, own_process)
