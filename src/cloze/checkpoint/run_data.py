"""The prepared folder that a run was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cloze.checkpoint.model_path import resolve_model_path
from cloze.config import TrainConfig
from cloze.data.prepared.shards import Prepared, open_prepared
from cloze.data.train_data import open_data
from cloze.errors import ConfigError, DataError
from cloze.utils import run_files
from cloze.utils.foreign.json_yaml import read_json, read_yaml
from cloze.utils.terminal.console import say


def open_run_data(run_dir: Path, option: str) -> Prepared:
    """Return the blocks of a run. Raises ConfigError or DataError, with a hint that names `option`, if they cannot be
    found or are no longer those that the run was trained on."""
    manifest = read_json(run_dir / run_files.DATA)
    if manifest.get("streamed"):
        raise ConfigError("a streamed run keeps no blocks", where=option, hint="prepare the corpus first")
    values = read_yaml(run_dir / run_files.CONFIG)
    found = open_data(TrainConfig(**values))
    if found.manifest["checksum"] != manifest["checksum"]:
        raise DataError(
            "not the data of this run: its checksum is another one",
            where=values["dataset_name"],
            hint=f"put the old blocks back, or look at {option}",
        )
    return open_prepared(Path(found.tokenizer).parent)


def choose_data(data: str | None, models: Sequence[str], otherwise: str = "") -> Prepared:
    """Return the prepared folder `data`; if None, the one that the runs of `models` were trained on. `otherwise`: ends
    the hint of the error.

    Raises ConfigError if no model belongs to a run whose data is known, or two were trained on different blocks.
    """
    if data is not None:
        return open_prepared(data)
    runs = dict.fromkeys(resolve_model_path(name).run_dir for name in models)
    found = {run: open_run_data(run, "--data") for run in runs if run and (run / run_files.DATA).is_file()}
    if not found:
        what = "the model does not belong to a run whose data is known"
        raise ConfigError(what, where="--data", hint=f"give --data FOLDER{otherwise}")
    if len({prepared.manifest["checksum"] for prepared in found.values()}) > 1:
        what = f"the models were trained on different data: {' and '.join(str(one.folder) for one in found.values())}"
        raise ConfigError(what, where="--data", hint="give the folder to measure on with --data")
    run, prepared = next(iter(found.items()))
    say("data", f"{prepared.folder}, which {run} was trained on")
    return prepared
