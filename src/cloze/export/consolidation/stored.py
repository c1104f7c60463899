"""The model in one or several checkpoints: every tensor once, in pieces that are read on demand.

Consolidation reads all checkpoints, of Cloze and of others, through it. At most one tensor is in memory at a time:
files are mapped, and a tensor is assembled from its pieces and released before the next one.

    source = own_source([folder], stack)                  # a checkpoint of Cloze
    source = own_source([older, newer], stack)            # the mean of several
    source = cloze.export.consolidation.foreign.foreign_source(folder, ...)    # what DeepSpeed wrote
    for tensor in source.tensors:
        tensor.read(torch.bfloat16), tensor.content_sum(torch.bfloat16)
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cloze.checkpoint.checksum import add_sums, content_sum
from cloze.checkpoint.format import EMA, PROBE, WEIGHT, read_manifest, still_there
from cloze.checkpoint.identity import option_differences
from cloze.checkpoint.lineage import Lineage, of_average, of_checkpoint, run_id, same_run
from cloze.checkpoint.model_path import run_of
from cloze.checkpoint.probe import TOLERANCE, not_finite, probe_difference, probe_loss, stored_loss
from cloze.checkpoint.reader import PieceReader
from cloze.errors import CheckpointError, ConfigError
from cloze.model.in_float32 import InFloat32
from cloze.utils.closeness import largest, within
from cloze.utils.foreign.paths import check_regular
from cloze.utils.foreign.safetensors_header import load_tensors

MODEL = "model/"  # the folder in a checkpoint with configuration and tokenizer
CHUNK = 1 << 22  # elements that are averaged or compared at a time
# How much worse an average may answer the stored batch than the worst model in it, in nats a token: weights of one run
# that differ too much give an average without meaning, many nats worse.
WORSE_NATS = 0.5
_NOTHING = "the stored batch holds no masked position, so no answers were compared"  # a short block, older versions

Pieces = Callable[[], Iterator[tuple[int, torch.Tensor]]]


@dataclass(frozen=True)
class Stored:
    """One tensor of a model. `pieces` yields (offset, elements [n]), each element once, in any order; `saved_sum`: its
    `content_sum` when it was saved, None if not recorded; `where`: its place, for errors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Pieces
    where: object
    saved_sum: int | None = None

    def written_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type to write if floating-point numbers become `dtype`: integers keep theirs."""
        return dtype if self.dtype.is_floating_point else self.dtype

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole tensor. Raises CheckpointError for missing elements, ConfigError if `dtype` overflows."""
        numel = math.prod(self.shape)
        out: torch.Tensor | None = None
        covered = 0
        for offset, piece in self.pieces():
            part = _converted(piece, self.written_dtype(dtype), self.name)
            if offset == 0 and part.numel() == numel:
                return part.view(self.shape)
            if out is None:
                out = torch.empty(numel, dtype=part.dtype)
            out[offset : offset + part.numel()] = part
            covered += part.numel()
        if covered != numel:
            raise CheckpointError(
                f"{covered} of {numel} elements of {self.name} are there",
                where=self.where,
                hint="it is damaged: use another checkpoint",
            )
        return torch.empty(self.shape, dtype=self.written_dtype(dtype)) if out is None else out.view(self.shape)

    def content_sum(self, dtype: torch.dtype) -> int:
        """Return `cloze.checkpoint.checksum.content_sum` of the tensor after conversion to `dtype`: the value recorded
        when it was saved, else computed from the pieces in place."""
        written = self.written_dtype(dtype)
        if self.saved_sum is not None and written == self.dtype:
            return self.saved_sum
        return add_sums(content_sum(piece.to(written), offset) for offset, piece in self.pieces())


@dataclass(frozen=True)
class Source:
    """A model to be written. `save_model_files` puts configuration and tokenizer into a folder; `check` compares the
    model, loaded again, with what else the checkpoint knows of it, says what it did, and raises CheckpointError;
    `run_dir`: the folder of the run, for the model card; `lineage`: the weights it is made of, in fp32, None if they
    are another program's."""

    tensors: list[Stored]
    save_model_files: Callable[[Path], None]
    check: Callable[[torch.nn.Module], str]
    run_dir: Path | None = None
    lineage: Lineage | None = None


def _converted(piece: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if piece.dtype == dtype:
        return piece
    converted = piece.to(dtype)
    if dtype == torch.float16 and not torch.equal(torch.isfinite(converted), torch.isfinite(piece)):
        raise ConfigError(f"{name} has elements beyond 65504, the largest in fp16", where="--dtype", hint="use bf16")
    return converted


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of `numel` elements, a chunk at a time."""
    for offset in range(0, numel, CHUNK):
        yield offset, min(CHUNK, numel - offset)


def own_source(folders: Sequence[Path], stack: ExitStack, weights: str = "trained") -> Source:
    """Return the model in a checkpoint of Cloze, or the mean of those in several, oldest first, newest last.

    `weights`: "trained", or "ema" for the moving average of them. The folders were verified before. Raises
    CheckpointError if they are not of one model; ConfigError if no moving average was kept.
    """
    stack.enter_context(still_there(*folders))
    manifests = [read_manifest(folder) for folder in folders]
    readers = [stack.enter_context(PieceReader(*both)) for both in zip(folders, manifests, strict=True)]
    newest, manifest, sums = readers[-1], manifests[-1], readers[-1].sums()
    key = {"trained": WEIGHT, "ema": EMA}[weights]
    for folder, other in zip(folders, manifests, strict=True):
        if {n: f["shape"] for n, f in other["parameters"].items()} != {
            n: f["shape"] for n, f in manifest["parameters"].items()
        }:
            raise CheckpointError(
                f"has other parameters than {folders[-1].name}",
                where=folder,
                hint="average the checkpoints of one run only, or fewer of them",
            )
        different = option_differences(other["run"], manifest["run"])
        if different or not same_run(run_id(other["run"]), run_id(manifest["run"])):
            named = f" ({', '.join(different)})" if different else ""
            raise CheckpointError(
                f"belongs to another run than {folders[-1].name}{named}",
                where=folder,
                hint="average the checkpoints of one run only",
            )
    tensors = []
    for name, facts in manifest["parameters"].items():
        shape = tuple(facts["shape"])
        if facts["trained"] and (name, key) not in sums:
            raise ConfigError(
                "no moving average of the weights is in this checkpoint",
                where=newest.folder,
                hint="train with --ema_decay, or leave --weights ema out",
            )
        kept = manifest["tied"].get(name, name)
        if not facts["trained"]:
            tensors.append(_frozen(newest, name, kept))
        elif len(readers) == 1:
            pieces, saved = partial(newest.pieces, name, key), sums[name, key]
            tensors.append(Stored(kept, shape, torch.float32, pieces, newest.folder, saved))
        else:
            tensors.append(Stored(kept, shape, torch.float32, _mean_pieces(readers, name, key), newest.folder))
    names = set(manifest["parameters"])
    tensors += [_frozen(newest, name, name) for name in newest.frozen_names() if name not in names]
    exact = len(folders) == 1 and key == WEIGHT
    check = partial(_check_logits if exact else _check_loss, folders, manifest["precision"], key)
    run_dir = run_of(newest.folder)
    lineage = of_average([of_checkpoint(one, key) for one in manifests])
    return Source(
        tensors, partial(_copy_model_files, newest.folder, sorted(manifest["files"])), check, run_dir, lineage
    )


def _frozen(reader: PieceReader, name: str, kept: str) -> Stored:
    tensor = reader.frozen(name)  # mapped, not loaded
    shape, dtype = tuple(tensor.shape), tensor.dtype
    return Stored(kept, shape, dtype, lambda: iter([(0, reader.frozen(name).reshape(-1))]), reader.folder)


def _mean_pieces(readers: Sequence[PieceReader], name: str, key: str) -> Pieces:
    """Yield the mean of a parameter over checkpoints, summed in float64 (Izmailov et al., "Averaging Weights Leads to
    Wider Optima and Better Generalization", 2018; Wortsman et al., "Model soups", 2022)."""

    def pieces() -> Iterator[tuple[int, torch.Tensor]]:
        for offset, length in chunks(math.prod(readers[-1].manifest["parameters"][name]["shape"])):
            total = torch.zeros(length, dtype=torch.float64)
            for reader in readers:
                total += reader.read(name, key, offset, length)
            yield offset, (total / len(readers)).float()

    return pieces


def _copy_model_files(folder: Path, names: Sequence[str], output: Path) -> None:
    """Copy the files that the checkpoint's manifest lists, and that were compared with their checksums."""
    for name in names:
        if not name.startswith(MODEL):
            continue
        target = output / name.removeprefix(MODEL)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(check_regular(folder / name, folder=folder, error=CheckpointError), target)


def _check_logits(folders: Sequence[Path], precision: str, key: str, model: Any) -> str:
    """Check that the model reproduces the training model's logits on the stored batch."""
    probe = load_tensors(folders[0] / PROBE)
    if not len(probe["rows"]):
        return _NOTHING
    if (problem := not_finite(probe, folders[0])) is not None:
        raise problem
    with _computing(model):
        difference = probe_difference(model, probe)
    written = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "no")
    if not within(difference, max(TOLERANCE[precision], TOLERANCE[written])):
        raise CheckpointError(
            f"the consolidated model does not answer as the training model did (logits differ by {difference:.1e})",
            where=folders[0],
            hint="this is a bug in Cloze or faulty memory; please report it with the architecture's name",
        )
    return f"logits as in training to {difference:.0e} of the largest"


def _computing(model: Any) -> AbstractContextManager[Any]:
    return nullcontext() if model.dtype == torch.float32 else InFloat32()


def _check_loss(folders: Sequence[Path], precision: str, key: str, model: Any) -> str:
    """Check that an average, whose logits differ from those of all models, has a finite loss not far above theirs."""
    probes = [load_tensors(folder / PROBE) for folder in folders]
    if not all(len(probe["rows"]) for probe in probes):
        return _NOTHING
    theirs = [stored_loss(probe) for probe in probes]
    with _computing(model):
        loss = probe_loss(model, probes[-1])
    # A moving average is behind the weights: early in a run it may know no more than to guess among all tokens.
    guessing = [] if key == WEIGHT else [math.log(probes[-1]["logits"].shape[-1])]
    worst = largest([*theirs, *guessing])
    if not within(loss, worst + WORSE_NATS):
        raise CheckpointError(
            f"the average answers the stored batch with a loss of {loss:.4f}, where {worst:.4f} was expected at most",
            where=folders[-1],
            hint="these weights differ too much to be averaged; take fewer or later checkpoints",
        )
    losses = ", ".join(f"{one:.4f}" for one in theirs)
    return (
        f"an average has no logits to compare with: loss {loss:.4f} on the stored batch, where training had {losses}"
    )
