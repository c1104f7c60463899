"""The files of a DeepSpeed ZeRO-1/2/3 checkpoint: the location of each parameter's elements.

    mp_rank_00_model_states.pt                           stage 1, 2: the module in training precision, names and shapes
    zero_pp_rank_R_mp_rank_00_model_states.pt            stage 3: the same of each rank, but parameters left out
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt     each rank's part of the fp32 weights, and the moments

Stages 1 and 2 put the parameters of a group one after another into one flat tensor and cut that into a part for each
rank. Stage 3 cuts every parameter into a part for each rank, the last one padded, and puts a rank's parts one after
another. Names are only in the order of `param_shapes`. Nothing but tensors, numbers, text and containers of them is
taken out of the files; they are mapped into memory and not loaded.

    files = ZeroFiles(folder)
    files.trained["bert.pooler.dense.weight"].pieces()     # (offset, elements [n]), fp32
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloze.errors import CheckpointError, ConfigError
from cloze.utils.foreign.pickles import NO_ARCHIVE, damaged_member, load_torch, reason
from cloze.utils.terminal.console import progress

_OPTIMIZER = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OTHER_LAYOUT = re.compile(r"(layer_\d+|expert_|expp_rank).*\.pt")
_HINT = "use an earlier checkpoint"
# Objects that are stored with the tensors (DeepSpeed's loss scaler, enumerations and addresses; what a training script
# put there): these names are read as empty shells, so that no code of theirs runs. All others are refused.
_SHELLS = re.compile(r"(deepspeed|numpy|transformers|accelerate)\.|argparse\.Namespace$")


@dataclass(frozen=True)
class Extent:
    """Elements [offset, offset + length) of a parameter are at [start, start + length) of a flat tensor."""

    offset: int
    length: int
    flat: torch.Tensor
    start: int


@dataclass(frozen=True)
class Placed:
    """The location of one parameter."""

    shape: tuple[int, ...]
    extents: list[Extent]

    @property
    def dtype(self) -> torch.dtype:
        """Return the stored type."""
        return self.extents[0].flat.dtype if self.extents else torch.float32

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (offset, elements [n]), mapped."""
        for one in self.extents:
            yield one.offset, one.flat[one.start : one.start + one.length]


class ZeroFiles:
    """An opened checkpoint. `trained`: the fp32 weights; `frozen`: parameters that were not trained; `module`: what
    the stage keeps of the module in training precision (all of it up to stage 2, buffers only in stage 3)."""

    def __init__(self, folder: Path):
        self.folder = folder
        models, optimizers = _find(folder)
        self.model_file = models[0]
        states = [_load(file, rank) for rank, file in sorted(models.items())]
        shards = [_load(file, rank)["optimizer_state_dict"] for rank, file in sorted(optimizers.items())]
        self.module: dict[str, torch.Tensor] = _plain_names(states[0]["module"])
        self.buffers = [plain_name(name) for name in states[0]["buffer_names"]]
        self.aliases = {plain_name(k): plain_name(v) for k, v in (states[0].get("shared_params") or {}).items()}
        self.stage = 0 if not shards else 3 if "fp32_flat_groups" in shards[0] else 2
        self.world_size = len(shards) or 1
        if shards:
            _check_count(folder, shards, optimizers)
        self.trained = self._place_trained(states[0].get("param_shapes"), shards)
        self.frozen = self._place_frozen(states)
        if self.stage < 3:  # stages 0 and 1 keep what is not trained in the module only
            rest = self.module.keys() - self.trained.keys() - self.frozen.keys() - set(self.buffers)
            alias_of_other = {name for name in rest if name in self.aliases}
            self.frozen |= {n: _whole(self.module[n], self.module[n].shape) for n in sorted(rest - alias_of_other)}

    def _place_trained(self, groups: Any, shards: list[dict[str, Any]]) -> dict[str, Placed]:
        if not shards:
            return {}
        if not groups:
            raise CheckpointError("names and shapes of parameters are missing", where=self.model_file, hint=_HINT)
        shapes = [{plain_name(name): tuple(shape) for name, shape in group.items()} for group in groups]
        if self.stage == 3:
            return _place_by_parameter({k: v for group in shapes for k, v in group.items()}, shards, self.folder)
        return _place_by_group(shapes, shards, self.folder)

    def _place_frozen(self, states: list[dict[str, Any]]) -> dict[str, Placed]:
        placed = {}
        for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
            parts = [state["frozen_param_fragments"][name].reshape(-1) for state in states]
            numel = math.prod(shape)
            extents = []
            for rank, part in enumerate(parts if self.stage == 3 else parts[:1]):
                offset = rank * part.numel()
                extents.append(Extent(offset, max(0, min(part.numel(), numel - offset)), part, 0))
            placed[plain_name(name)] = Placed(tuple(shape), extents)
        return placed


def holds_files(folder: Path) -> bool:
    """Return whether a folder contains DeepSpeed's files."""
    return folder.is_dir() and any(_MODEL.fullmatch(p.name) or _OPTIMIZER.fullmatch(p.name) for p in folder.iterdir())


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes of torch.compile and data-parallel wrappers."""
    return re.sub(r"^(module\.)+|(?<![^.])_orig_mod\.", "", name)


def _plain_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {plain_name(name): tensor for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def _whole(tensor: torch.Tensor, shape: Any) -> Placed:
    return Placed(tuple(shape), [Extent(0, tensor.numel(), tensor.reshape(-1), 0)])


def _find(folder: Path) -> tuple[dict[int, Path], dict[int, Path]]:
    """Return the model files and the optimizer files, by rank. Raises for unsupported layouts, and for gaps."""
    models: dict[int, Path] = {}
    optimizers: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if _OTHER_LAYOUT.fullmatch(path.name):
            raise ConfigError(
                "a checkpoint of a pipeline or of experts is not read",
                where=path,
                hint="DeepSpeed's own tools can make a model file of it",
            )
        for pattern, found in ((_MODEL, models), (_OPTIMIZER, optimizers)):
            match = pattern.fullmatch(path.name)
            if match and int(match.group(2)):
                raise ConfigError(
                    "a model split by tensor parallelism is not read",
                    where=path,
                    hint="DeepSpeed's own tools can make a model file of it",
                )
            if match:
                found[int(match.group(1) or 0)] = path
    stage3 = any(path.name.startswith("zero_pp_") for path in models.values())
    if not stage3 and not models:
        name = "mp_rank_00_model_states.pt (or zero_pp_rank_0_mp_rank_00_model_states.pt)"
        raise CheckpointError(f"rank 0's file is missing: {name}", where=folder, hint=_HINT)
    for found, other in ((models, optimizers), (optimizers, models)):
        for rank in range(max((found | (other if stage3 else {})).keys(), default=-1) + 1):
            if rank not in found:
                name = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank}", next(iter(found.values())).name)
                raise CheckpointError(f"rank {rank}'s file is missing", where=folder / name, hint=_HINT)
    return models, optimizers


def _load(file: Path, rank: int) -> dict[str, Any]:
    """Return the contents of a file, its tensors mapped. Raises CheckpointError naming file and rank if it is damaged,
    ConfigError if it holds unknown objects."""
    hint = "save the checkpoint without it (client_state), or, if you trust it, use the zero_to_fp32.py beside it"
    content = load_torch(file, f"rank {rank}'s file", _SHELLS, hint)
    if not isinstance(content, dict) or not ({"module", "optimizer_state_dict"} & content.keys()):
        raise CheckpointError(
            f"rank {rank}'s file is not one of DeepSpeed", where=file, hint="give a folder that DeepSpeed wrote"
        )
    return content


def _damaged(file: Path, rank: int, why: str) -> CheckpointError:
    return CheckpointError(f"rank {rank}'s file is damaged ({reason(why)})", where=file, hint=_HINT)


def verify_files(folder: Path) -> None:
    """Compare every file with the checksums inside (CRC-32 of each record, which torch ignores for a mapped file).
    Raises CheckpointError naming file and rank."""
    found = [(rank, file) for files in _find(folder) for rank, file in sorted(files.items())]
    with progress("verify", total=len(found), unit="files") as advance:
        for rank, file in found:
            try:
                bad = damaged_member(file)
            except NO_ARCHIVE as error:
                raise _damaged(file, rank, str(error)) from None
            if bad is not None:
                raise _damaged(file, rank, f"checksum of {bad}")
            advance()


def _check_count(folder: Path, shards: list[dict[str, Any]], files: dict[int, Path]) -> None:
    counts = shards[0]["partition_count"]
    expected = max(counts) if isinstance(counts, list | tuple) else counts
    if expected > len(shards):
        last = files[len(shards) - 1].name
        name = last.replace(f"rank_{len(shards) - 1}_mp", f"rank_{len(shards)}_mp")
        raise CheckpointError(f"rank {len(shards)}'s file of {expected} is missing", where=folder / name, hint=_HINT)
    if expected < len(shards):
        raise CheckpointError(
            f"{len(shards)} ranks' files are there, but {expected} ranks wrote it",
            where=folder,
            hint="it was written over an older one; delete the files of ranks that are too many",
        )


def _place_by_group(
    groups: list[dict[str, tuple[int, ...]]], shards: list[dict[str, Any]], folder: Path
) -> dict[str, Placed]:
    """Locate parameters under stages 1 and 2. The flat tensor of a group may be longer than its parameters, by its
    alignment at the end."""
    placed = {}
    paddings = shards[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        flats = [shard["single_partition_of_fp32_groups"][number] for shard in shards]
        position, between = 0, paddings[number] if paddings else [0] * len(shapes)
        for (name, shape), gap in zip(shapes.items(), between, strict=True):
            placed[name] = Placed(shape, list(_extents(flats, position, math.prod(shape))))
            position += math.prod(shape) + gap
        # Groups are aligned to two elements a rank at their end (deepspeed/runtime/zero/stage_1_and_2.py).
        _check_used(folder, position, sum(flat.numel() for flat in flats), slack=2 * len(shards))
    return placed


def _place_by_parameter(
    shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Any]], folder: Path
) -> dict[str, Placed]:
    """Locate parameters under stage 3: every rank has a part of each, in order; sub-groups only cut between
    parameters."""
    placed = {}
    position = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        part = -(-numel // len(shards))
        extents = []
        for rank, shard in enumerate(shards):
            length = max(0, min(part, numel - rank * part))  # the last ranks' parts are padded
            for one in _extents(shard["fp32_flat_groups"], position, length):
                extents.append(Extent(rank * part + one.offset, one.length, one.flat, one.start))
        placed[name] = Placed(shape, extents)
        position += part
    for shard in shards:
        _check_used(folder, position, sum(flat.numel() for flat in shard["fp32_flat_groups"]), slack=1)
    return placed


def _extents(flats: list[torch.Tensor], position: int, length: int) -> Iterator[Extent]:
    """Yield elements [position, position + length) of the concatenated tensors as extents from offset 0 on."""
    begin = 0
    for flat in flats:
        first, last = max(position, begin), min(position + length, begin + flat.numel())
        if first < last:
            yield Extent(first - position, last - first, flat.detach(), first - begin)
        begin += flat.numel()


def _check_used(folder: Path, used: int, there: int, slack: int) -> None:
    if not used <= there < used + slack:
        raise CheckpointError(
            f"the parameters have {used:,} elements, but {there:,} are there",
            where=folder,
            hint="its files are not of one checkpoint, or of a kind of engine that is not read",
        )
