"""Check before the first step that all ranks of a run will train the same thing.

    base = compare_ranks(config, data, model, tokenizer, engine)      # LaunchError on every rank if they differ

Compared are options, versions, engine, the checksum of the data manifest (every host has verified its own shards
against it: `cloze.data.prepared.verified`), the tokenizer's fingerprint, and the checksum of the base model's files.
Processes of one host read a shared path once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cloze.checkpoint.identity import base_checksum, base_folder, plain_config
from cloze.config import TrainConfig
from cloze.data.tokenizers.load import fingerprint
from cloze.data.train_data import TrainData
from cloze.distributed.collectives import gather, raise_on_any_rank
from cloze.errors import ClozeError, LaunchError
from cloze.training.engines.base import Engine
from cloze.utils.system import versions_of

# Options that may differ between hosts: secrets, and paths whose content is compared instead.
NOT_COMPARED = {
    "token",
    "hub_token",
    "cache_dir",
    "prepared_cache_dir",
    "output_dir",
    "dataset_name",
    "tokenizer_name",
    "model_name_or_path",
    "config_name",
    "deepspeed",
    "resume_from_checkpoint",
}


def compare_ranks(
    config: TrainConfig, data: TrainData, model: Any, tokenizer: PreTrainedTokenizerBase, engine: Engine
) -> str | None:
    """Return the checksum of the base model (see `base_checksum`); every rank calls it.

    Raises LaunchError, on every rank, naming the first rank whose values differ from those of rank 0.
    """
    host, problem = socket.gethostname(), None
    folder = base_folder(config)
    paths = {
        "base_model": None if folder is None else os.path.realpath(folder),
    }
    everyone = gather((host, paths))
    first = {name: _is_first(everyone, engine.rank, name) for name in paths}
    values = described(config, data, model, tokenizer, engine)
    try:
        values["base_model"] = base_checksum(config) if first["base_model"] else None
    except ClozeError as error:
        problem = error
    except OSError as error:
        problem = LaunchError(f"cannot be read ({error.strerror})", where=error.filename, hint="check the disk")
    raise_on_any_rank(problem)
    found = gather(values)
    check_equal([one for one, _ in everyone], found)
    return next((one["base_model"] for one in found if one["base_model"] is not None), None)


def _is_first(everyone: list[tuple[str, dict[str, str | None]]], rank: int, name: str) -> bool:
    """Return whether no lower rank of the same host reads the same path."""
    host, paths = everyone[rank]
    return not any(other == host and theirs[name] == paths[name] for other, theirs in everyone[:rank])


def described(
    config: TrainConfig, data: TrainData, model: Any, tokenizer: PreTrainedTokenizerBase, engine: Engine
) -> dict[str, Any]:
    """Return the description of what a rank will train, as JSON values."""
    options = dataclasses.asdict(config)
    versions, accelerator = versions_of(["cloze", "torch", "transformers"]), engine.accelerator
    resume = config.resume_from_checkpoint
    return {
        **{name: value for name, value in options.items() if name not in NOT_COMPARED},
        "resume_from_checkpoint": None if resume is None else Path(resume).name,
        "model": _digest(plain_config(json.loads(model.config.to_json_string(use_diff=False)))),
        "engine": engine.support.name,
        "engine settings": engine.settings,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "data": data.manifest["checksum"],
        "tokenizer": fingerprint(tokenizer),
        **{f"version of {name}": _minor(name, version) for name, version in versions.items()},
    }


def _minor(name: str, version: str) -> str:
    return version if name == "cloze" else ".".join(version.split(".")[:2])


def check_equal(hosts: list[str], found: list[dict[str, Any]]) -> None:
    """Raise LaunchError naming the first rank and value that differ from rank 0. None, for files that another rank of
    the host has read, is not compared."""
    for rank, values in enumerate(found):
        for name in dict.fromkeys([*found[0], *values]):
            value = values.get(name)
            read_once = name == "base_model"
            if value == found[0].get(name) or (read_once and None in (value, found[0].get(name))):
                continue
            raise LaunchError(
                f"rank {rank} on {hosts[rank]} has {name} {_short(value)}, but rank 0 on {hosts[0]} has "
                f"{_short(found[0].get(name))}",
                where="the ranks of this run differ",
                hint="give all of them the same options, files and packages",
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
