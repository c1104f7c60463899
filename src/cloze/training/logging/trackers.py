"""Trackers (TensorBoard, Weights & Biases, MLflow, Trackio, ...) through accelerate's classes for them.

    begin_trackers(accelerator, config, output_dir, resolved(config), first_step=0)
    report({"train/loss": 5.1}, step=10)        # names as transformers' Trainer writes them
    with trackers_closed(): ...                 # finished, stopped or failed, as the block ends

A resumed run resumes the tracker's run, whose id is kept in RUN/trackers.json. A tracker that fails during training is
disabled with a warning; training continues.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from cloze.config import TrainConfig
from cloze.distributed.collectives import run_on_main_and_broadcast
from cloze.distributed.resilience.error_records import secret_values
from cloze.errors import ConfigError, Stopped, one_line
from cloze.utils import run_files
from cloze.utils.atomic_files import auxiliary_write, write_json
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.suggest import suggestion
from cloze.utils.terminal.console import warn
from cloze.utils.terminal.redact import redacted

_HINTS = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline and use `wandb sync` later",
    "mlflow": "see MLFLOW_TRACKING_URI",
}
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_running: list[GeneralTracker] = []  # on the main process only


def tracker_names(config: TrainConfig) -> list[str]:
    """Return the names in --report_to."""
    return [] if config.report_to == "none" else [name.strip() for name in config.report_to.split(",")]


def check_trackers(config: TrainConfig) -> None:
    """Raise ConfigError for a tracker that is not installed here."""
    installed = {str(tracker.value) for tracker in get_available_trackers()}
    for name in tracker_names(config):
        if name not in installed:
            known = {str(tracker.value) for tracker in LoggerType} - {"all"}
            close = suggestion(name, sorted(known))
            more = f"; {close}" if close else ""
            more = f"; `pip install {name}` for it" if name in known else more
            hint = f"installed here: {', '.join(sorted(installed)) or 'none'}{more}"
            raise ConfigError(f"no tracker {name}", where="--report_to", hint=hint)


def begin_trackers(
    accelerator: Accelerator, config: TrainConfig, output_dir: Path, values: dict[str, Any], first_step: int
) -> None:
    """Start the trackers of --report_to on the main process; every rank calls it. `values`: the hyperparameters, of
    which numbers and texts are reported once. Steps from `first_step` on will be repeated.

    Raises ConfigError on every rank if a tracker does not start.
    """
    if tracker_names(config):
        run_on_main_and_broadcast(lambda: _begin(accelerator, config, output_dir, values, first_step))


def _begin(
    accelerator: Accelerator, config: TrainConfig, output_dir: Path, values: dict[str, Any], first_step: int
) -> None:
    kept = read_kept(output_dir) if config.resume_from_checkpoint is not None else {}
    plain = {key: value for key, value in values.items() if isinstance(value, bool | int | float | str)}
    for name in tracker_names(config):
        tracker = None
        if name in kept:
            try:
                tracker = _start(name, config, output_dir, kept[name], first_step)
                if name == "trackio":  # each of its starts replaces the previous values
                    tracker.store_init_configuration(plain)
            except Exception as error:
                warn(f"{name} cannot resume its earlier run ({one_line(error)}); it starts a new one")
        if tracker is None:
            try:
                tracker = _start(name, config, output_dir, None, first_step)
                tracker.store_init_configuration(plain)
            except Exception as error:
                hint = _HINTS.get(name, f"leave {name} out")
                raise ConfigError(
                    f"{name} does not start ({one_line(error)})", where="--report_to", hint=hint
                ) from None
        kept[name] = _identity(name, tracker)
        _running.append(tracker)
        accelerator.trackers.append(tracker)
    with auxiliary_write(output_dir / run_files.TRACKERS):
        write_json(output_dir / run_files.TRACKERS, kept)


def read_kept(output_dir: Path) -> dict[str, str]:
    """Return the id of the run in each tracker that it had before."""
    return {
        name: kept for name, kept in read_mapping(output_dir / run_files.TRACKERS).items() if isinstance(kept, str)
    }


def _start(name: str, config: TrainConfig, output_dir: Path, kept: str | None, first_step: int) -> GeneralTracker:
    """Return a tracker that has started a run, or resumed the one with the id `kept`."""
    run_name = config.run_name or output_dir.name
    make = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # TensorBoard hides steps of older files from purge_step on
        tracker = make(run_name, str(output_dir), purge_step=first_step + 1 if first_step else None)
    elif name == "wandb":
        folder = {} if os.environ.get("WANDB_DIR") else {"dir": str(output_dir)}
        project = os.environ.get("WANDB_PROJECT", config.project)
        tracker = make(project, name=run_name, id=kept, resume="allow", **folder)
    elif name == "mlflow":
        tracker = make(config.project, run_name=run_name, run_id=kept)
    elif name == "trackio":
        tracker = make(config.project, name=kept or run_name, resume="must" if kept else "never")
    elif make.requires_logging_directory:
        tracker = make(run_name, str(output_dir))
    else:
        tracker = make(run_name)
    with _command_line_without(secret_values(config)):
        tracker.start()
    if name == "wandb":  # as in Trainer: W&B's own step must never decrease, the run's may (--on_nonfinite rollback)
        tracker.tracker.define_metric("train/global_step")
        tracker.tracker.define_metric("*", step_metric="train/global_step", step_sync=True)
    return tracker


@contextlib.contextmanager
def _command_line_without(secrets: tuple[str, ...]) -> Iterator[None]:
    """Hide secrets from W&B, which stores the words of the command line with the run, also a `--token hf_...`."""
    words = list(sys.argv)
    sys.argv[:] = [redacted(word, secrets) for word in words]
    try:
        yield
    finally:
        sys.argv[:] = words


def _identity(name: str, tracker: GeneralTracker) -> str:
    """Return the id with which a later start can resume this run."""
    if name == "wandb":
        return str(tracker.tracker.id)
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    if name == "trackio":
        return str(tracker.tracker.name)
    return ""


def tracker_values(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics under the names of transformers' Trainer (`rewrite_logs`):
    `eval_perplexity` -> `eval/perplexity`, `loss` -> `train/loss`."""
    return {
        f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in line.items()
        if key != "step" and isinstance(value, int | float)
    }


def report(values: dict[str, float], step: int) -> None:
    """Send values to all trackers of this process."""
    for tracker in list(_running):
        try:
            if tracker.name == "wandb":
                tracker.log({**values, "train/global_step": step})
            else:
                tracker.log(values, step=step)
        except Exception as error:
            _running.remove(tracker)
            warn(f"{tracker.name} fails ({one_line(error)}), and gets nothing more of this start; training continues")


@contextlib.contextmanager
def trackers_closed() -> Iterator[None]:
    """Close the trackers that were started within the block, with the status in which it ended."""
    try:
        yield
    except BaseException as error:
        _end("stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed")
        raise
    _end("finished")


def _end(status: str) -> None:
    while _running:
        tracker = _running.pop()
        try:
            if tracker.name == "wandb":
                if status == "stopped":  # W&B: not crashed, to be resumed
                    tracker.tracker.mark_preempting()
                tracker.tracker.finish(exit_code=int(status != "finished"))
            elif tracker.name == "mlflow":
                import mlflow

                mlflow.end_run(status=_MLFLOW_STATUS[status])
            else:
                tracker.finish()
        except Exception as error:
            warn(f"{tracker.name} was not closed well ({one_line(error)})")
