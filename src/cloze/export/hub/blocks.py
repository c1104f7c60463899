"""Publish the blocks that a run was trained on, as a dataset that `load_dataset` and `load_from_disk` open.

prepared = find_blocks(Path("runs/demo"))
pushed = push_blocks(api, Target("owner/name", "dataset"), prepared, card, message="Upload blocks")
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi

from cloze.config import TrainConfig
from cloze.data.manifest import MANIFEST
from cloze.data.prepared.shards import Prepared, open_prepared
from cloze.data.train_data import open_data
from cloze.errors import ConfigError, DataError
from cloze.export.hub.client import Pushed, Target, commit
from cloze.export.hub.publish import refuse_tokens
from cloze.utils.foreign.json_yaml import read_json, read_yaml
from cloze.utils.foreign.paths import check_regular, names_below

_OLD_BLOCKS = re.compile(r"(train|validation)/data-\d{5}-of-\d{5}\.arrow")


def find_blocks(run_dir: Path | None) -> Prepared:
    """The prepared folder that a run was trained on. Raises ConfigError or DataError where it cannot be found."""
    if run_dir is None:
        raise ConfigError("needs the run's folder", where="--dataset_repo", hint="give the run, not its model folder")
    manifest = read_json(run_dir / "data.json")
    if manifest.get("streamed"):
        raise ConfigError("a streamed run keeps no blocks", where="--dataset_repo", hint="prepare the corpus first")
    values = read_yaml(run_dir / "config.yaml")
    found = open_data(TrainConfig(**values))
    if found.manifest["checksum"] != manifest["checksum"]:
        raise DataError(
            "not the data of this run: its checksum is another one",
            where=values["dataset_name"],
            hint="put the old blocks back, or leave out --dataset_repo",
        )
    return open_prepared(Path(found.tokenizer).parent)


def block_files(prepared: Prepared, card: str) -> dict[str, Path | bytes]:
    """The files of a prepared folder that go up, by their names in the repository, with a dataset card."""
    folder = prepared.folder
    parts = [folder / name for name in (*prepared.splits, "tokenizer")]
    paths = [MANIFEST, "dataset_dict.json"]
    paths += [f"{part.name}/{name}" for part in parts for name in names_below(part)]
    files = {path: check_regular(folder / path, folder=folder) for path in paths}
    return {**files, "README.md": card.encode()}


def push_blocks(api: HfApi, target: Target, prepared: Prepared, card: str, message: str) -> Pushed:
    """Upload a prepared folder as a dataset in one commit; shards of an earlier push are deleted. Raises HubError."""
    files = block_files(prepared, card)
    refuse_tokens(files)
    return commit(api, target, files, message, lambda name: bool(_OLD_BLOCKS.fullmatch(name)))
