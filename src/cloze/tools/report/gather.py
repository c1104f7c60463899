"""Read a run's folder as far as possible, without facts that hold on this machine only.

runs = gather_runs(["runs/a", "runs/b"])        # Raises ConfigError, DataError
runs[0].lines[-1]["loss"], runs[0].damaged_lines, runs[0].config["learning_rate"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from cloze.checkpoint.format import MANIFEST, list_checkpoints
from cloze.checkpoint.lineage import Lineage, from_mapping, read_record, run_id, same_run, same_weights
from cloze.errors import ConfigError, DataError
from cloze.utils import run_files
from cloze.utils.foreign import text_lines
from cloze.utils.foreign.json_yaml import read_json_lines, read_mapping
from cloze.utils.foreign.lenient_read import is_number, part
from cloze.utils.foreign.paths import real_path
from cloze.utils.foreign.safetensors_header import read_header
from cloze.utils.shareable import basename_paths, shareable_config


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint-N: its step, and the bytes of its files."""

    step: int
    num_bytes: int


@dataclass(frozen=True)
class Run:
    """A run. `lines`: those of metrics.jsonl that can be read, by step; `damaged_lines`: how many cannot; `config`,
    `data`, `scores`: the mappings of config.yaml, data.json and eval.json, without paths; `parameters`: numbers in the
    consolidated model, if there is one; `scores_note`: one line if eval.json may not be of the run's
    newest weights."""

    folder: Path
    name: str
    lines: list[dict[str, Any]]
    damaged_lines: int
    config: dict[str, Any]
    data: dict[str, Any]
    scores: dict[str, Any]
    scores_note: str | None
    sessions: list[dict[str, Any]]
    status: str | None
    checkpoints: list[Checkpoint]
    parameters: int | None

    @property
    def measured(self) -> Lineage | None:
        """Return the weights that eval.json is of; None if that is not recorded."""
        return from_mapping(self.scores)

    @property
    def last_step(self) -> int:
        """Return the last step that was logged."""
        return int(self.lines[-1]["step"])

    def last(self, key: str) -> float | None:
        """Return the last finite value of a metric."""
        return next((line[key] for line in reversed(self.lines) if is_number(line.get(key))), None)

    def last_step_of(self, key: str) -> int | None:
        """Return the step of the last finite value of a metric."""
        return next((int(line["step"]) for line in reversed(self.lines) if is_number(line.get(key))), None)

    @cached_property
    def seconds(self) -> float:
        """Time spent on the steps that count: without pauses, and without those that were done again."""
        return sum(line["seconds"] for line in self.lines if is_number(line.get("seconds")))

    @property
    def tokens_seen(self) -> int | None:
        """Return the tokens of the blocks that were trained on; None if unknown."""
        samples, size = self.last("samples_seen"), self.data.get("block_size")
        return int(samples) * size if samples is not None and isinstance(size, int) else None

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """Return the sessions that went on with the run."""
        return [one for one in self.sessions if one["first_step"] > 0]


def gather_runs(folders: Sequence[str]) -> list[Run]:
    """Return the runs in these folders, in this order. Raises ConfigError for a folder that is not there or given
    twice, DataError for one without metrics."""
    paths = [Path(folder) for folder in folders]
    for number, path in enumerate(paths):
        if not path.is_dir():
            raise ConfigError("no such run", where=path, hint="give the output_dir of `cloze train`")
        if real_path(path) in [real_path(one) for one in paths[:number]]:
            raise ConfigError("given twice", where=path, hint="leave one out")
    return [_gather(path, name) for path, name in zip(paths, names_of(paths), strict=True)]


def _gather(folder: Path, name: str) -> Run:
    lines, damaged = read_lines(folder / run_files.METRICS)
    sessions = read_mapping(folder / run_files.SESSIONS).get("sessions")
    status = read_mapping(folder / run_files.STATUS).get("status")
    checkpoints = list_checkpoints(folder)
    scores, scores_note = read_scores(folder, [path for path in checkpoints if (path / MANIFEST).is_file()])
    return Run(
        folder=folder,
        name=name,
        lines=lines,
        damaged_lines=damaged,
        config=shareable_config(read_mapping(folder / run_files.CONFIG)),
        data=basename_paths(read_mapping(folder / run_files.DATA)),
        scores=scores,
        scores_note=scores_note,
        sessions=[one for one in sessions or [] if isinstance(one, dict) and is_number(one.get("first_step"))]
        if isinstance(sessions, list)
        else [],
        status=status if isinstance(status, str) else None,
        checkpoints=[_checkpoint(path) for path in checkpoints],
        parameters=num_parameters(folder / "model"),
    )


def read_scores(folder: Path, checkpoints: Sequence[Path]) -> tuple[dict[str, Any], str | None]:
    """Return the values of eval.json without paths, and one line if they may not be of the run's newest weights.

    Those of another run are left out. `checkpoints`: the complete ones, oldest first.
    """
    scores = basename_paths(read_mapping(folder / run_files.SCORES))
    if not is_number(scores.get("perplexity")):
        return scores, None
    measured, model, own = (
        from_mapping(scores),
        read_record(folder / "model"),
        run_id(read_mapping(folder / run_files.IDENTITY)),
    )
    if measured is None:
        return scores, "eval.json does not record the weights it is of"
    if not same_run(measured.run, own):
        return {}, "eval.json is of another run, and is left out"
    newest = int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else None
    if newest is not None and (measured.step or 0) < newest:
        return scores, f"eval.json is of {measured}, and checkpoint-{newest} is newer"
    if model is not None and not same_weights(measured, model):
        return scores, f"eval.json is of {measured}, and the model of {model}"
    return scores, None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of metrics.jsonl by step, and how many are damaged. A last line without its end is being
    written.

    Raises DataError if there is no such file or nothing in it can be read.
    """
    try:
        found, damaged = read_json_lines(path, "step")
    except DataError as error:
        hint = "give the output_dir of `cloze train`, once it has logged a step"
        why = "is not there" if not path.exists() else error.what
        raise DataError(why, where=path, hint=hint) from None
    lines = [line for line in found if line["step"] >= 0]
    if not lines:
        why = f"all {len(damaged):,} lines are damaged" if damaged else "holds no line yet"
        raise DataError(why, where=path, hint="a run logs every --logging_steps steps")
    return sorted(lines, key=itemgetter("step")), len(damaged)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each folder's path; if two are equal, as many parts as distinguish them."""
    parts = [real_path(folder).parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]).lstrip("/") for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def num_parameters(model: Path) -> int | None:
    """Return the number of values in the safetensors files of a folder, from their headers; None if no file can be
    read."""
    total = 0
    for path in model.glob("*.safetensors"):
        try:
            total += sum(tensor.numel for tensor in read_header(path, error=DataError).values())
        except DataError:
            return None
    return total or None


def _checkpoint(folder: Path) -> Checkpoint:
    sizes = 0
    for path in folder.rglob("*"):
        try:
            sizes += path.stat().st_size if path.is_file() else 0
        except OSError:  # a run that is being trained deletes its oldest checkpoint
            continue
    return Checkpoint(int(folder.name.rpartition("-")[2]), sizes)


def model_name(run: Run) -> str:
    """Return the name of the pretrained model, else the architecture."""
    config = run.config
    name = config.get("model_name_or_path") or config.get("config_name") or config.get("model_type")
    return str(name) if name else "masked language model"


def data_name(run: Run) -> str | None:
    """Return the name of the training data's source."""
    name = part(run.data, "source").get("dataset_name")
    return str(name) if name else None


def read_prompts(path: str) -> list[str]:
    """Return the texts of a file, one a line, empty lines left out. Raises DataError."""
    prompts = text_lines.read_lines(path)
    if not prompts:
        raise DataError("holds no text", where=path, hint="give texts with a mask, one a line")
    return prompts
