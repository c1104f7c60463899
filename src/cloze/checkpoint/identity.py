"""The identity of a run: the values that determine its numbers, compared by content and not by spelling.

    here = run_identity(config, global_batch=256, manifest=data.manifest, base=base_checksum(config))
    check_same_run(checkpoint, saved["run"], here, model_config)       # CheckpointError naming what differs

A base model is identified by the checksum of its weights and configuration, so its folder may move; data by the
checksum of their blocks. Values without effect are ignored: num_train_epochs with max_steps, Adam's with SGD. A
checkpoint holds all weights, so its run can resume without its base model. Checkpoints of earlier versions have no
checksum of the base model: the last part of its path is compared. If the model's options are spelled differently, its
configuration is compared with the checkpoint's copy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from cloze.config import TrainConfig
from cloze.config.relations import effective_values
from cloze.config.spellings import parse_arguments, schedule_name
from cloze.config.train import RUN_KEYS
from cloze.errors import CheckpointError, ConfigError, error_phase
from cloze.model.overrides import parse_overrides
from cloze.utils import run_files
from cloze.utils.atomic_files import sha256
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.shareable import basename_paths
from cloze.utils.terminal.console import warn

MODEL_KEYS = ("model_name_or_path", "model_revision", "model_type", "config_name", "config_overrides")
BASE, BLOCKS, DATA = "base_model", "blocks", "data"
_ADAM = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
_CONTENT_NAME = re.compile(r"[0-9a-f]{64}")  # of a file in the Hub's cache: the SHA-256 of its content
# Values of a model's configuration that do not change the model.
_VOLATILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "attn_implementation")


def run_identity(
    config: TrainConfig, global_batch: int, manifest: dict[str, Any], base: str | None = None
) -> dict[str, Any]:
    """Return the values that all starts of a run share. `base`: see `base_checksum`."""
    values = dataclasses.asdict(config)
    return {
        **{key: values[key] for key in RUN_KEYS},
        "global_batch_size": global_batch,
        DATA: manifest["checksum"],
        BLOCKS: blocks_checksum(manifest),
        BASE: base,
    }


def blocks_checksum(manifest: dict[str, Any]) -> str | None:
    """Return the checksum of prepared blocks and of what masks them, without the corpus's name; None if streamed."""
    splits = manifest.get("splits")
    if not splits:
        return None
    shards = {name: [shard["sha256"] for shard in split["shards"]] for name, split in splits.items()}
    tokenizer = manifest.get("tokenizer", {}).get("fingerprint")
    return _digest([manifest["block_size"], manifest.get("packing"), tokenizer, shards])


def base_checksum(config: TrainConfig) -> str | None:
    """Return the checksum of a base model's configuration and weights; None from scratch, or if it is missing."""
    folder = base_folder(config)
    if folder is None:
        return None
    weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    files = [[path.name, _file_checksum(path)] for path in weights]
    return _digest([plain_config(read_mapping(folder / "config.json")), files]) if files else None


def base_folder(config: TrainConfig) -> Path | None:
    """Return the folder that holds a base model: a local one, or its snapshot in the Hub's cache; None without one."""
    name = config.model_name_or_path
    if name is None:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        found = cached_file(
            name, "config.json", revision=config.model_revision, cache_dir=config.cache_dir, local_files_only=True
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def _file_checksum(path: Path) -> str:
    real = Path(os.path.realpath(path))
    is_blob = real != path and real.parent.name == "blobs" and _CONTENT_NAME.fullmatch(real.name)
    return real.name if is_blob else sha256(path)


def plain_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a model's configuration that change the model."""
    kept = {key: value for key, value in values.items() if not key.startswith("_") and key not in _VOLATILE}
    return {key: plain_config(value) if isinstance(value, dict) else value for key, value in kept.items()}


def effective(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an identity that have an effect, in a canonical spelling, without those of the model."""
    without_model = {key: value for key, value in identity.items() if key not in (*MODEL_KEYS, BASE, BLOCKS)}
    values = effective_values(TrainConfig, without_model)
    if values["max_steps"] < 1:
        del values["max_steps"]
    arguments = _arguments(values["optim_args"])
    for name, argument in _ADAM.items():
        if {argument, f"adamw_{argument}"} & arguments.keys():
            del values[name]
    values["optim"] = values["optim"].removesuffix("_fused")
    values["optim_args"] = arguments or None
    if values["mlm_probability_end"] is None:
        values["mlm_probability_end"] = values["mlm_probability"]
    values["lr_scheduler_type"] = schedule_name(values["lr_scheduler_type"])
    values["lr_scheduler_kwargs"] = values["lr_scheduler_kwargs"] or None
    if not values["batch_size_warmup_steps"]:
        del values["batch_size_warmup_start"]
    return values


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        return parse_arguments(text)
    except ConfigError:  # of another version
        return {"text": text}


@error_phase("resume")
def check_same_run(
    folder: Path, saved: dict[str, Any], here: dict[str, Any], model_config: dict[str, Any] | None = None
) -> None:
    """Raise CheckpointError listing the differences between a checkpoint's run and this one.

    `model_config`: the configuration of this start's model. A flag that `saved` lacks is newer than the checkpoint,
    whose run behaves like the flag's default.
    """
    saved, here = _complete(saved), _complete(here)
    different = _differences(saved, here)
    if DATA in different and _has_same_blocks(folder, saved, here):
        different.remove(DATA)
    different = model_differences(folder, saved, here, model_config) + different
    if different:
        different = [key for key in different if saved.get(key) != here.get(key)] or different
        changes = "; ".join(f"{key} {saved.get(key)} -> {here.get(key)}" for key in different)
        raise CheckpointError(
            f"this checkpoint belongs to another run ({changes})",
            where=folder,
            hint="resume with the values it was started with, or start a new run in another output_dir",
        )
    if BLOCKS not in saved and here["mask_unit"] != "token":
        warn(
            f"{folder} is of an earlier version, whose words in scripts without spaces (Chinese, Thai) were whole "
            "sentences; from here on every token is one, so the masks of such text change"
        )


def option_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the options in which the identities of two checkpoints differ, without those of model and data."""
    return [key for key in _differences(_complete(one), _complete(other)) if key != DATA]


def _complete(identity: dict[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name in RUN_KEYS}
    return {**defaults, **identity}


def _differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    there, now = effective(saved), effective(here)
    return [
        key
        for key in dict.fromkeys([*now, *there])
        if key in here and there.get(key) not in (now.get(key), basename_paths(now.get(key)))
    ]


def _has_same_blocks(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> bool:
    """Return whether the blocks are equal although the manifests differ. Earlier versions kept the manifest in the
    run's folder only."""
    blocks = saved.get(BLOCKS)
    if blocks is None:
        manifest = read_mapping(folder.parent / run_files.DATA)
        if manifest.get("checksum") != saved.get(DATA) or manifest.get("checksum") is None:
            return False
        try:
            blocks = blocks_checksum(manifest)
        except (KeyError, TypeError, AttributeError):
            return False
    return blocks is not None and blocks == here.get(BLOCKS)


def model_differences(
    folder: Path, saved: dict[str, Any], here: dict[str, Any], model_config: dict[str, Any] | None
) -> list[str]:
    """Return the keys of two identities that describe different models."""
    base = "model_name_or_path"
    if not _has_same_base(saved, here):
        return [base]
    no_effect = {base}
    if here[base] is not None:
        no_effect |= {"model_type", "config_name"}
    if (saved.get(BASE) is not None and saved[BASE] == here.get(BASE)) or os.path.isdir(here[base] or ""):
        no_effect.add("model_revision")
    spelled = [key for key in MODEL_KEYS if key not in no_effect and not _is_same_spelling(key, saved, here)]
    if spelled and model_config is not None:
        stored = plain_config(read_mapping(folder / "model" / "config.json"))
        model_config = plain_config(json.loads(json.dumps(model_config)))
        common = stored.keys() & model_config.keys()
        if stored and all(stored[key] == model_config[key] for key in common):
            return []
    return spelled


def _has_same_base(saved: dict[str, Any], here: dict[str, Any]) -> bool:
    """Return whether both start from the same weights. If the files of one are gone, its name's last part decides."""
    was, now = saved["model_name_or_path"], here["model_name_or_path"]
    if was is None or now is None:
        return was is now
    if saved.get(BASE) is not None and here.get(BASE) is not None:
        return bool(saved[BASE] == here[BASE])
    return was == now or os.path.basename(os.path.normpath(was)) == os.path.basename(os.path.normpath(now))


def _is_same_spelling(key: str, saved: dict[str, Any], here: dict[str, Any]) -> bool:
    was, now = saved[key], here[key]
    if key == "config_overrides" and isinstance(was, str | None) and isinstance(now, str | None):
        return was == now or parse_overrides(was) == parse_overrides(now)
    return was in (now, basename_paths(now))


def _digest(value: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}"
