"""From a checkpoint to a folder that `from_pretrained` and `pipeline("fill-mask")` load.

Weights are read piece by piece and written tensor by tensor, so memory holds one tensor at a time, for any number
of ranks and the engine that wrote the checkpoint. Tied weights are written once. Before the new folder gets its name
every tensor in it is read again and compared with the checkpoint's pieces by checksum, the folder is loaded with
`from_pretrained`, mapped and not copied, and the model has to give the training model's own answers on the probe
stored in the checkpoint.

    with ExitStack() as stack:
        source = own_source([Path("runs/demo/checkpoint-500")], stack)
        write_model(source, Path("runs/demo/model"), max_shard_bytes=5 * 10**9, dtype="fp32")
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from cloze.checkpoint.checksum import content_sum
from cloze.checkpoint.format import MANIFEST, find_checkpoint, list_checkpoints, read_manifest, verify_checkpoint
from cloze.checkpoint.lineage import of_tensors, write_record
from cloze.checkpoint.safetensors_writer import Entry, write_tensors
from cloze.errors import CheckpointError, ConfigError, ModelError
from cloze.export.cards.model_card import write_card
from cloze.export.cards.weights import excluded_scores
from cloze.export.consolidation.replaceable import check_replaceable
from cloze.export.consolidation.stored import Source, Stored, own_source
from cloze.model.load import load_checked
from cloze.utils.atomic_files import replaced_folder, write_json
from cloze.utils.foreign.json_yaml import read_json
from cloze.utils.foreign.pretrained import from_pretrained
from cloze.utils.foreign.safetensors_header import open_tensors
from cloze.utils.terminal.console import progress, warn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return `fp32`, `bf16` or `fp16`, else torch's own name."""
    return next((name for name, one in DTYPES.items() if one == dtype), str(dtype).removeprefix("torch."))


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint by content, or by name if it holds nothing else."""
    return (path / MANIFEST).is_file() or (path.name.startswith("checkpoint-") and not list_checkpoints(path))


def choose_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest good checkpoint of the run's folder.

    Raises CheckpointError if no checkpoint is found.
    """
    if not path.is_dir():
        raise ConfigError("no such folder", where=path, hint="give a run's folder or a checkpoint-N folder")
    if is_checkpoint(path):
        path = path if path.name not in ("", "..") else Path(os.path.abspath(path))  # its parent is the run
        verify_checkpoint(path)
        return path
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError("there is no checkpoint", where=path, hint="train first, or give a checkpoint-N folder")
    return found


def choose_last(path: Path, count: int) -> list[Path]:
    """Return the last `count` good checkpoints of a run, oldest first; `path`: the run's folder, or the newest
    checkpoint to use. Damaged ones are left out with a warning. Raises CheckpointError if there are fewer."""
    newest = choose_checkpoint(path)
    chosen = [newest]
    step = read_manifest(newest)["position"]["global_step"]
    for folder in reversed(list_checkpoints(newest.parent, at_most=step - 1)):
        if len(chosen) == count:
            break
        if not (folder / MANIFEST).is_file():
            continue
        try:
            verify_checkpoint(folder)
            chosen.insert(0, folder)
        except CheckpointError as error:
            warn(f"{error}; trying the checkpoint before")
    if len(chosen) < count:
        raise CheckpointError(
            f"only {len(chosen)} good checkpoint{'s are' if len(chosen) > 1 else ' is'} there",
            where=newest.parent,
            hint=f"--average {count} needs more; save more often (--save_steps), and keep them (--save_total_limit)",
        )
    return chosen


def consolidate(checkpoint: Path, output: Path, max_shard_bytes: int, dtype: str = "fp32") -> str:
    """Verify a checkpoint of Cloze and write its model folder; return what was compared. See `write_model`."""
    verify_checkpoint(checkpoint)
    with ExitStack() as stack:
        return write_model(own_source([checkpoint], stack), output, max_shard_bytes, dtype)


def write_model(source: Source, output: Path, max_shard_bytes: int, dtype: str) -> str:
    """Write the model folder; return what was compared to verify it.

    An older folder of the same name, made by consolidation, is replaced when the new one is complete. Raises
    ConfigError if the folder is anything else (see `check_replaceable`), CheckpointError if the checkpoint is damaged
    or the new folder is not its model; partial output is removed.
    """
    check_replaceable(output)
    with replaced_folder(output) as staged:
        source.save_model_files(staged)
        tidy_config(staged, DTYPES[dtype])
        files = write_weights(staged, source.tensors, max_shard_bytes, DTYPES[dtype])
        sums = compare_sums(staged, files, source.tensors, DTYPES[dtype])
        lineage = source.lineage or of_tensors(sums, dtype)
        write_record(staged, replace(lineage, dtype=dtype))
        model = load_checked(staged)
        compared = source.check(model)
        if (output / "README.md").is_file():
            shutil.copy(output / "README.md", staged)  # write_card keeps a card written by hand
        if line := excluded_scores(staged, source.run_dir):
            warn(line)
        write_card(staged, source.run_dir)
        check_replaceable(output)  # it may have changed meanwhile
    return compared


def tidy_config(folder: Path, dtype: torch.dtype) -> None:
    """Set the type of the weights in config.json, and drop values for text generation, which old configurations have
    and newer transformers refuse to save."""
    path = folder / "config.json"
    values = read_json(path, error=ModelError)
    own = type(from_pretrained(AutoConfig, folder))().to_dict()
    left = (vars(GenerationConfig()).keys() - own.keys()) | {"task_specific_params", "_name_or_path", "torch_dtype"}
    kept = {name: value for name, value in values.items() if name not in left}
    write_json(path, {**kept, "dtype": str(dtype).removeprefix("torch.")})
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_weights(folder: Path, tensors: list[Stored], max_shard_bytes: int, dtype: torch.dtype) -> dict[str, str]:
    """Write model.safetensors, or shards and an index beyond `max_shard_bytes`; return the file of each tensor."""
    shards: list[list[Entry]] = [[]]
    size = 0
    with progress("write", total=len(tensors), unit="tensors") as advance:
        for tensor in tensors:
            entry = Entry(tensor.name, tensor.written_dtype(dtype), tensor.shape, _reader(tensor, dtype, advance))
            if shards[-1] and size + entry.num_bytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += entry.num_bytes
        if len(shards) == 1:
            write_tensors(folder / "model.safetensors", shards[0], {"format": "pt"})
            return {entry.key: "model.safetensors" for entry in shards[0]}
        weight_map: dict[str, str] = {}
        for number, entries in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(folder / file, entries, {"format": "pt"})
            weight_map |= {entry.key: file for entry in entries}
    total = sum(entry.num_bytes for entries in shards for entry in entries)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return weight_map


def _reader(tensor: Stored, dtype: torch.dtype, advance: Callable[..., None]) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        advance()
        return tensor.read(dtype)

    return read


def compare_sums(
    folder: Path, files: dict[str, str], tensors: list[Stored], dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Read every tensor that was written, one at a time, and compare its checksum with that of the checkpoint's
    pieces; return shape and checksum of each. Raises CheckpointError naming the first that differs."""
    sums = {}
    with ExitStack() as stack, progress("compare", total=len(tensors), unit="tensors") as advance:
        opened = {file: stack.enter_context(open_tensors(folder / file)) for file in set(files.values())}
        for tensor in tensors:
            written = opened[files[tensor.name]].get_tensor(tensor.name).reshape(-1)  # mapped
            sums[tensor.name] = tensor.shape, content_sum(written, 0)
            if sums[tensor.name][1] != tensor.content_sum(dtype):
                raise CheckpointError(
                    f"{tensor.name} was not written as it is stored",
                    where=tensor.where,
                    hint="this is a bug in Cloze, or faulty memory or a faulty disk; please report it",
                )
            advance()
    return sums
