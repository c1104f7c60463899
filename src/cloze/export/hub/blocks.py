"""Publish the blocks that a run was trained on, as a dataset that `load_dataset` and `load_from_disk` open.

prepared = find_blocks(Path("runs/demo"))
pushed = push_blocks(api, Target("owner/name", "dataset"), prepared, card, message="Upload blocks")
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi

from cloze.checkpoint.run_data import open_run_data
from cloze.data.manifest import MANIFEST
from cloze.data.prepared.shards import Prepared
from cloze.errors import ConfigError
from cloze.export.hub.client import Pushed, Target, commit
from cloze.export.hub.publish import refuse_tokens
from cloze.utils.foreign.paths import check_regular, names_below

_OLD_BLOCKS = re.compile(r"(train|validation)/data-\d{5}-of-\d{5}\.arrow")


def find_blocks(run_dir: Path | None) -> Prepared:
    """Return the prepared folder that a run was trained on. Raises ConfigError or DataError if it cannot be found."""
    if run_dir is None:
        raise ConfigError("needs the run's folder", where="--dataset_repo", hint="give the run, not its model folder")
    return open_run_data(run_dir, "--dataset_repo")


def block_files(prepared: Prepared, card: str) -> dict[str, Path | bytes]:
    """Return the files of a prepared folder to upload, by name in the repository, with a dataset card."""
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
