"""A run's folder: what is in it before the first step, and whether a checkpoint belongs to it.

runs/NAME/config.yaml     the resolved configuration
runs/NAME/run.json        what makes it this run: hyperparameters, global batch, checksum of the data
runs/NAME/data.json       the manifest of the prepared data
runs/NAME/metrics.jsonl   one line per logged step
runs/NAME/sessions.json   each start: devices, ranks, engine, versions
runs/NAME/status.json     running, stopped, finished or failed
runs/NAME/error.json      of a start that failed: the first failing rank, where and why (see cloze.failures)
runs/NAME/.owner          while it is trained: the process that does so (see cloze.train.run_owner)
runs/NAME/checkpoint-N/   see cloze.train.checkpoint
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cloze.config import TrainConfig
from cloze.console import is_main, own_rank
from cloze.environment import processes
from cloze.errors import CheckpointError, ConfigError, DiskError, OwnerError, in_phase
from cloze.failures import FailureLog, forget, secret_values
from cloze.files import disk_errors, write_json, write_text
from cloze.places import SECRETS, without_place
from cloze.train.checkpoint_files import list_checkpoints, own_checkpoints
from cloze.train.metrics import FILE as METRICS_FILE
from cloze.train.run_owner import check_owner, is_ours

STATUS_FILE, IDENTITY_FILE = "status.json", "run.json"

# What decides the numbers a run computes. The split of the global batch is not among them.
RUN_KEYS = (
    "model_name_or_path",
    "model_revision",
    "model_type",
    "config_name",
    "config_overrides",
    "mlm_probability",
    "mlm_probability_end",
    "mask_unit",
    "mask_replace_prob",
    "random_replace_prob",
    "batch_size_warmup_steps",
    "batch_size_warmup_start",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "layerwise_lr_decay",
    "optim",
    "optim_args",
    "ema_decay",
    "freeze",
    "seed",
)


def run_identity(config: TrainConfig, global_batch: int, data_checksum: str) -> dict[str, Any]:
    """What two runs must share to be the same run."""
    values = dataclasses.asdict(config)
    return {**{key: values[key] for key in RUN_KEYS}, "global_batch_size": global_batch, "data": data_checksum}


@in_phase("resume")
def check_same_run(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise CheckpointError listing what differs between a checkpoint's run and this one.

    A flag that `saved` does not know is younger than the checkpoint: its run did what the flag's default does. Of a
    path, a checkpoint that was on the Hub knows the last part only.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name in RUN_KEYS}
    saved = {**defaults, **saved}
    different = [
        f"{key} {saved.get(key)} -> {value}"
        for key, value in here.items()
        if saved.get(key) not in (value, without_place(value))
    ]
    if different:
        raise CheckpointError(
            f"this checkpoint belongs to another run ({'; '.join(different)})",
            where=folder,
            hint="resume with the values it was started with, or start a new run in another output_dir",
        )


def resolved(config: TrainConfig) -> dict[str, Any]:
    """The configuration as it is kept beside a run: every value but the tokens."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in SECRETS}


def failure_log(config: TrainConfig) -> FailureLog:
    """Return this rank's part of the run's error.json, which it writes only if this launch owns the folder."""
    run_dir, world_size = Path(config.output_dir), processes.world_size()
    return FailureLog(run_dir, own_rank(), world_size, secret_values(config), partial(is_ours, run_dir))


def goes_on(config: TrainConfig) -> bool:
    """Whether this start is to go on with a run whose folder is there; else the folder may be another run's."""
    return config.resume_from_checkpoint is not None and (Path(config.output_dir) / IDENTITY_FILE).is_file()


@contextlib.contextmanager
def kept_failures(config: TrainConfig) -> Iterator[None]:
    """What goes wrong before the ranks watch each other is kept too, where the run's folder is there already."""
    log = failure_log(config) if goes_on(config) else None
    if log is not None:
        log.begin()
    try:
        yield
    except Exception as error:
        if log is not None:
            log.leave(error)
        raise


def write_status(output_dir: Path, status: str, line: str) -> None:
    """Write status.json: running, stopped (to be resumed), finished or failed, and one line about it; on rank 0 only,
    and not in a folder that another start has taken over."""
    if is_main():
        with contextlib.suppress(DiskError, OwnerError):
            check_owner(output_dir)
            write_json(output_dir / STATUS_FILE, {"status": status, "line": line})


def open_run_folder(config: TrainConfig, manifest: dict[str, Any], identity: dict[str, Any]) -> Path:
    """Make the run's folder and describe the run in it; `identity` is that of `run_identity`.

    Raises ConfigError if it holds another run.
    """
    output_dir = Path(config.output_dir)
    if config.resume_from_checkpoint is None and (
        list_checkpoints(output_dir) or (output_dir / METRICS_FILE).exists()
    ):
        if not (output_dir / METRICS_FILE).exists():
            own_checkpoints(output_dir)  # says whose they are
        raise ConfigError(
            "holds a run already",
            where=output_dir,
            hint="continue it with --resume_from_checkpoint auto, or choose another --output_dir",
        )
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "config.yaml", yaml.safe_dump(resolved(config), sort_keys=False))
    write_json(output_dir / IDENTITY_FILE, identity)
    write_json(output_dir / "data.json", manifest)
    forget(output_dir)
    write_status(output_dir, "running", "")
    return output_dir
