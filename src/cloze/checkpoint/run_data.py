"""The prepared folder that a run was trained on."""

from __future__ import annotations

from pathlib import Path

from cloze.config import TrainConfig
from cloze.data.prepared.shards import Prepared, open_prepared
from cloze.data.train_data import open_data
from cloze.errors import ConfigError, DataError
from cloze.utils.foreign.json_yaml import read_json, read_yaml


def open_run_data(run_dir: Path, option: str) -> Prepared:
    """Return the blocks of a run. Raises ConfigError or DataError, with a hint that names `option`, if they cannot be
    found or are no longer those that the run was trained on."""
    manifest = read_json(run_dir / "data.json")
    if manifest.get("streamed"):
        raise ConfigError("a streamed run keeps no blocks", where=option, hint="prepare the corpus first")
    values = read_yaml(run_dir / "config.yaml")
    found = open_data(TrainConfig(**values))
    if found.manifest["checksum"] != manifest["checksum"]:
        raise DataError(
            "not the data of this run: its checksum is another one",
            where=values["dataset_name"],
            hint=f"put the old blocks back, or look at {option}",
        )
    return open_prepared(Path(found.tokenizer).parent)
