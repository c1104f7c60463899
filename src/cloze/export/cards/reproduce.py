"""The commands that repeat a run, from its files: with its own flags, and without paths of this machine.

for command in commands(config, data, sessions, repo="owner/name"): print(command)
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from typing import Any

from cloze.checkpoint.lineage import Lineage
from cloze.config import BlocksConfig, PrepareConfig, TrainConfig
from cloze.utils.atomic_files import parse_size
from cloze.utils.foreign.lenient_read import is_number, part
from cloze.utils.shareable import PLACES, SECRETS, basename_paths

BLOCK_FLAGS = {field.name for field in dataclasses.fields(BlocksConfig)} | {"tokenizer_name"}
_HUB = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "license", "language")


def commands(
    config: dict[str, Any],
    data: dict[str, Any],
    sessions: list[dict[str, Any]],
    repo: str,
    lineage: Lineage | None = None,
) -> list[str]:
    """Return `cloze prepare`, `train` and `push` as shell commands; [] if the run's files are insufficient."""
    if not config or not isinstance(data.get("source"), dict):
        return []
    name = repo.split("/")[-1]
    run = shlex.quote(f"runs/{name}")
    precision = sessions[-1].get("precision") if sessions else None
    if precision and not (config.get("bf16") or config.get("fp16")) and config.get("precision", "auto") == "auto":
        config = {**config, "precision": precision}  # as resolved from launcher and machine
    lines = [] if data.get("streamed") else [prepare_command(data, f"prepared/{name}")]
    lines.append(f"{launcher(sessions)} {train_command(config, data, f'prepared/{name}', f'runs/{name}')}")
    lines.append(f"cloze consolidate {run}{_which_weights(lineage)} && cloze push {run} --repo {shlex.quote(repo)}")
    return lines


def _which_weights(lineage: Lineage | None) -> str:
    """Return the flags of `cloze consolidate` that choose these weights of a finished run."""
    if lineage is None:
        return ""
    average = f" --average {len(lineage.steps)}" if len(lineage.steps) > 1 else ""
    return average + (" --weights ema" if "ema" in lineage.kind else "")


def prepare_command(data: dict[str, Any], output: str) -> str:
    """Return `cloze prepare` with the settings of a prepared folder's manifest."""
    source, rule, tokenizer = data["source"], part(data, "split_rule"), part(data, "tokenizer")
    values = {
        "dataset_name": source.get("dataset_name"),
        "dataset_config_name": source.get("dataset_config_name"),
        "dataset_revision": source.get("revision"),
        "split": source.get("split"),
        "text_field": source.get("text_field"),
        "id_field": source.get("id_field"),
        "tokenizer_name": tokenizer.get("name"),
        "block_size": data.get("block_size"),
        "packing": data.get("packing"),
        "split_special_tokens": data.get("split_special_tokens"),
        "validation_split": rule.get("validation"),
        "validation_split_percentage": rule.get("validation_percentage"),
        "on_bad_record": "skip" if data.get("bad_records") else None,
    }
    defaults = _defaults(PrepareConfig)
    if is_number(size := data.get("unit_size")) and size != parse_size(defaults["unit_size"], "--unit_size"):
        values["unit_size"] = str(size)
    return f"cloze prepare {_flags(values, defaults)} --output {shlex.quote(output)}"


def train_command(config: dict[str, Any], data: dict[str, Any], prepared: str, run: str) -> str:
    """Return `cloze train` with every flag of a run's config.yaml that is not its default."""
    defaults = _defaults(TrainConfig)
    not_said = {*PLACES, *SECRETS, *_HUB, "dataset_name"}
    dataset = config.get("dataset_name") if data.get("streamed") else prepared
    if not data.get("streamed"):
        not_said |= BLOCK_FLAGS
    values = {"dataset_name": dataset} | {name: one for name, one in config.items() if name not in not_said}
    return f"-m cloze train {_flags(values, defaults)} --output_dir {shlex.quote(run)}"


def launcher(sessions: list[dict[str, Any]]) -> str:
    """Return the command that launches the processes of the last start."""
    last = sessions[-1] if sessions else {}
    ranks = int(last["ranks"]) if is_number(last.get("ranks")) else 1
    engine = str(last.get("engine", ""))
    if zero := re.fullmatch(r"DeepSpeed ZeRO-([0-3])", engine):
        stage = zero[1]
        how = f"--config_file launch/accelerate/zero{stage}.yaml" if stage != "0" else "--use_deepspeed --zero_stage 0"
    elif engine == "FSDP2":
        how = "--config_file launch/accelerate/fsdp2.yaml"
    elif ranks > 1:
        on_gpu = any("NVIDIA" in name for name in part(last, "devices"))
        how = f"--config_file launch/accelerate/{'multi_gpu' if on_gpu else 'cpu'}.yaml"
    else:
        return "python"
    return f"accelerate launch {how} --num_processes {ranks}"


def _defaults(kind: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


def _flags(values: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return `--name value ...` of known values that differ from the default, paths without their folders."""
    words = []
    for name, value in values.items():
        if name not in defaults or value is None or value == defaults[name]:
            continue
        shown = basename_paths(value)
        text = json.dumps(shown) if isinstance(shown, dict | list | bool) else str(shown)
        if text.isprintable():  # commands to copy must not contain control characters
            words += [f"--{name}", shlex.quote(text)]
    return " ".join(words)
