"""From a checkpoint to a folder that `from_pretrained` and `pipeline("fill-mask")` load.

Weights are read piece by piece and written tensor by tensor, so memory holds one tensor at a time, whatever the number
of ranks and the engine that wrote the checkpoint. Tied weights are written once. The new folder is loaded again and
has to give the training model's own answers on the probe stored in the checkpoint before it gets its name.

    consolidate(Path("runs/demo/checkpoint-500"), Path("runs/demo/model"), max_shard_bytes=5 * 10**9)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cloze.card import write_card
from cloze.errors import CheckpointError, ConfigError
from cloze.files import staged_folder, write_json
from cloze.model.load import load_checked
from cloze.tensorfile import Entry, write_tensors
from cloze.train.checkpoint_files import PROBE, find_checkpoint, list_checkpoints, verify_checkpoint
from cloze.train.probe import TOLERANCE, probe_difference
from cloze.train.restore import PieceReader
from cloze.train.state import WEIGHT


def choose_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest good checkpoint of the run's folder.

    Raises CheckpointError where there is none.
    """
    if not path.is_dir():
        raise ConfigError("no such folder", where=path, hint="give a run's folder or a checkpoint-N folder")
    if path.name.startswith("checkpoint-") and not list_checkpoints(path):
        verify_checkpoint(path)
        return path
    found = find_checkpoint(path, "auto")
    if found is None:
        raise CheckpointError("there is no checkpoint", where=path, hint="train first, or give a checkpoint-N folder")
    return found


def consolidate(checkpoint: Path, output: Path, max_shard_bytes: int) -> float:
    """Write the model folder; return the probe's largest relative difference of logits.

    An older folder of the same name, made by consolidation, is replaced. Raises CheckpointError where the checkpoint
    is damaged or the new folder does not answer as the training model did; nothing is left behind then.
    """
    manifest = verify_checkpoint(checkpoint)
    if output.exists() and not (output / "config.json").is_file():
        raise ConfigError("exists and is not a model folder", where=output, hint="choose another --output")
    finished = output.with_name(f"{output.name}.new")
    shutil.rmtree(finished, ignore_errors=True)
    with PieceReader(checkpoint, manifest) as pieces, staged_folder(finished) as staged:
        shutil.copytree(checkpoint / "model", staged, dirs_exist_ok=True)
        write_weights(staged, pieces, max_shard_bytes)
        difference = check_answers(staged, checkpoint, manifest)
        run_dir = checkpoint.parent if (checkpoint.parent / "config.yaml").is_file() else None
        if (output / "README.md").is_file():
            shutil.copy(output / "README.md", staged)  # write_card keeps it if somebody wrote it by hand
        write_card(staged, run_dir)
    _replace(output, finished)
    return difference


def _replace(output: Path, finished: Path) -> None:
    """Put `finished` in the place of `output`; the old folder goes only when the new one is there."""
    old = output.with_name(f"{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    finished.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def write_weights(folder: Path, pieces: PieceReader, max_shard_bytes: int) -> None:
    """model.safetensors, or several files with an index where they would be larger than `max_shard_bytes`."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in _entries(pieces):
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0], {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, entries, {"format": "pt"})
        weight_map |= {entry.key: file for entry in entries}
    total = sum(entry.num_bytes for entries in shards for entry in entries)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _entries(pieces: PieceReader) -> list[Entry]:
    """Every weight once, under the name that holds it where weights are tied; then the buffers."""
    manifest = pieces.manifest
    entries = []
    for name, facts in manifest["parameters"].items():
        shape = tuple(facts["shape"])
        entries.append(
            Entry(manifest["tied"].get(name, name), torch.float32, shape, _weight_reader(pieces, name, shape, facts))
        )
    for name in pieces.frozen_names():
        if name not in manifest["parameters"]:
            tensor = pieces.frozen(name)
            entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), lambda name=name: pieces.frozen(name)))  # type: ignore[misc]
    return entries


def _weight_reader(pieces: PieceReader, name: str, shape: tuple[int, ...], facts: dict[str, Any]) -> Any:
    if facts["trained"]:
        return lambda: pieces.read(name, WEIGHT).view(shape)
    return lambda: pieces.frozen(name)


def check_answers(folder: Path, checkpoint: Path, manifest: dict[str, Any]) -> float:
    """Load the folder as a user would and compare with the probe. Raises CheckpointError where it differs."""
    model = load_checked(folder)
    probe = load_file(checkpoint / PROBE)
    difference = probe_difference(model, probe)
    if difference > TOLERANCE[manifest["precision"]]:
        raise CheckpointError(
            f"the consolidated model does not answer as the training model did (logits differ by {difference:.1e})",
            where=checkpoint,
            hint="this is a bug in Cloze or memory that lies; please report it with the architecture's name",
        )
    return difference
