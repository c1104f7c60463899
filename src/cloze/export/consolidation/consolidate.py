"""Turn a checkpoint of Cloze or of another tool into a model folder, as `cloze consolidate` does."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from cloze.checkpoint.model_path import run_of
from cloze.config import ConsolidateConfig
from cloze.errors import CheckpointError, ConfigError
from cloze.export.consolidation.dcpfiles import holds_metadata
from cloze.export.consolidation.foreign import find_dcp_files, find_zero_files, foreign_source
from cloze.export.consolidation.model_folder import choose_checkpoint, choose_last, is_checkpoint, write_model
from cloze.export.consolidation.replaceable import check_replaceable
from cloze.export.consolidation.stored import Source, own_source
from cloze.utils import run_files
from cloze.utils.atomic_files import check_writable, parse_size
from cloze.utils.terminal.console import say


class Consolidated(NamedTuple):
    """A model's folder, and what its logits were compared with."""

    folder: Path
    compared: str


def consolidate(config: ConsolidateConfig) -> Consolidated:
    """Write the model folder, load it again, and compare its logits with the checkpoint's.

    Raises ConfigError, CheckpointError, ModelError or DiskError.
    """
    max_shard_bytes = parse_size(config.max_shard_size, "--max_shard_size")
    with ExitStack() as stack:
        path = Path(config.checkpoint)
        foreign = find_zero_files(path) or find_dcp_files(path)
        source, output = _own(config, stack) if foreign is None else _foreign(config, foreign)
        compared = write_model(source, output, max_shard_bytes, config.dtype)
    return Consolidated(output, compared)


def _own(config: ConsolidateConfig, stack: ExitStack) -> tuple[Source, Path]:
    for name in ("config_name", "tokenizer_name"):
        if getattr(config, name) is not None:
            raise ConfigError("a checkpoint of Cloze has its own", where=f"--{name}", hint="leave it out")
    path = Path(config.checkpoint)
    run_dir = Path(os.path.abspath(path)).parent if is_checkpoint(path) else path
    _check_output(Path(config.output or run_dir / "model"))
    folders = [choose_checkpoint(path)] if config.average == 1 else choose_last(path, config.average)
    parent = folders[-1].parent
    if config.output is None and (parent / run_files.CONFIG).is_file() and run_of(folders[-1]) is None:
        hint = "give --output FOLDER, or move it out of this run"
        raise CheckpointError("belongs to another run than the folder it is in", where=folders[-1], hint=hint)
    output = Path(config.output) if config.output else parent / "model"
    of = "the moving average of " if config.weights == "ema" else ""
    names = " and ".join([", ".join(folder.name for folder in folders[:-1]), folders[-1].name])
    where = str(folders[0]) if len(folders) == 1 else f"the mean of {names} in {folders[0].parent}"
    say("consolidate", f"{of}{where} -> {output}")
    return own_source(folders, stack, config.weights), output


def _check_output(output: Path) -> None:
    check_writable(output)
    check_replaceable(output)


def _foreign(config: ConsolidateConfig, files: Path) -> tuple[Source, Path]:
    if config.output is None:
        raise ConfigError("--output is required for this checkpoint", where="--output", hint="give a folder")
    _check_output(Path(config.output))
    for name, plain in (("average", 1), ("weights", "trained")):
        if getattr(config, name) != plain:
            raise ConfigError("only for checkpoints of Cloze", where=f"--{name}", hint="leave it out")
    kind = "torch.distributed.checkpoint" if holds_metadata(files) else "DeepSpeed"
    say("consolidate", f"{files} ({kind}) -> {config.output}")
    source = foreign_source(files, Path(config.checkpoint), config.config_name, config.tokenizer_name)
    return source, Path(config.output)
