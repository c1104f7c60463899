"""The batch of one step of a run, exactly as it was trained on, rebuilt from the run's folder and its data.

Order and masks are pure functions of (seed, sample number), so no step before it has to be repeated and nothing about
it had to be stored, so the cause of a loss that is not finite can be found afterwards.

    batch = rebuild(Path("runs/mine"), step=1200)
    batch.samples, batch.blocks             # [G] int64: sample numbers and the blocks they are
    batch.input_ids, batch.labels           # [G, S] int64, as the model got them
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.checkpoint.safetensors_writer import Entry, write_tensors
from cloze.config import ReplayConfig, TrainConfig
from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import BlockOrder, step_batches
from cloze.data.batches.masking import IGNORE_INDEX
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.train_data import masking_rule, open_data, words_for
from cloze.errors import ConfigError, DataError
from cloze.training.nonfinite import excluded_steps
from cloze.training.run_schedule import plan_run, warmup_of
from cloze.utils import run_files
from cloze.utils.atomic_files import disk_errors
from cloze.utils.foreign.json_yaml import read_json, read_yaml
from cloze.utils.terminal.console import say, show

SHOWN, SAME = "⟦{} → {}⟧", "⟦{}⟧"


@dataclass(frozen=True)
class Replayed:
    """One global batch: samples, blocks [G] int64; input_ids, labels [G, S] int64. `epoch`: passes done before it."""

    samples: NDArray[np.int64]
    blocks: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    epoch: float
    tokenizer: str
    excluded: bool

    @property
    def checksum(self) -> str:
        """Return the SHA-256 of samples, inputs and labels, as little-endian int64."""
        parts = (self.samples, self.input_ids, self.labels)
        return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()


def rebuild(run: Path, step: int, data: str | None = None) -> Replayed:
    """Return the batch of `step`, counted from 1 as in metrics.jsonl. `data`: where the prepared data are now.

    Raises ConfigError for a folder that is no run, a step that it does not have, or streamed data; DataError if the
    data are not those the run was trained on.
    """
    config, global_batch, checksum = read_run(run)
    if config.streaming_train:
        raise ConfigError(
            "the batches of a stream depend on all that came before",
            where=run,
            hint="only runs on prepared data can be replayed",
        )
    if data is not None:
        config.dataset_name = data
    found = open_data(config)
    if found.manifest["checksum"] != checksum or found.blocks is None:
        raise DataError(
            "not the data of this run: its checksum is another one",
            where=config.dataset_name,
            hint="give the prepared folder with --data",
        )
    layout = Layout(global_batch, 1, 0, 1, None, *warmup_of(config))
    plan = plan_run(config, layout, len(found.blocks), found.block_size)
    if not 1 <= step <= plan.total_steps:
        raise ConfigError(f"the run has steps 1 to {plan.total_steps:,}", where="--step", hint="give one of them")
    words = words_for(config, found)
    masking = masking_rule(config, found.manifest, plan.total_samples, words)
    order = BlockOrder(layout, len(found.blocks), config.seed)
    batch = step_batches(found.blocks, masking, layout, plan.total_samples, step - 1, order).micro_batches[0]
    samples = layout.samples(step - 1, 0)
    here = (samples >= 0) & (samples < plan.total_samples)
    return Replayed(
        samples=samples[here],
        blocks=order.blocks_of(step - 1)[0][here],
        input_ids=batch["input_ids"].numpy()[here],
        labels=batch["labels"].numpy()[here],
        epoch=plan.epoch(step - 1),
        tokenizer=found.tokenizer,
        excluded=step - 1 in excluded_steps(run),
    )


def read_run(run: Path) -> tuple[TrainConfig, int, str]:
    """Return a run's configuration, its global batch in blocks, and the checksum of its data. ConfigError if it is no
    run."""
    try:
        values = read_yaml(run / run_files.CONFIG)
        identity = read_json(run / run_files.IDENTITY)
        return TrainConfig(**values), int(identity["global_batch_size"]), str(identity["data"])
    except (OSError, ValueError, TypeError, KeyError, DataError) as error:
        raise ConfigError(
            f"not a run's folder, or a damaged one ({type(error).__name__})",
            where=run,
            hint="give the output_dir of `cloze train`",
        ) from None


def replay(config: ReplayConfig) -> None:
    """Rebuild a batch, print it decoded, and store it where asked. Raises ConfigError, DataError, DiskError."""
    batch = rebuild(Path(config.run), config.step, config.data)
    masked = int((batch.labels != IGNORE_INDEX).sum())
    say(
        "replay",
        f"step {config.step:,} of {config.run}: samples {batch.samples[0]}-{batch.samples[-1]}, epoch "
        f"{batch.epoch:.3f}, {masked:,} masked tokens; sha256 {batch.checksum[:12]}",
    )
    if batch.excluded:
        say("replay", "this batch was left out after a rollback (--on_nonfinite)")
    tokenizer = load_tokenizer(batch.tokenizer)
    for row in range(min(config.samples, len(batch.samples))):
        show(f"{'':12} sample {batch.samples[row]}, block {batch.blocks[row]}:")
        show(f"{'':14}{decoded(tokenizer, batch.input_ids[row], batch.labels[row])}")
    if len(batch.samples) > config.samples:
        show(f"{'':12} and {len(batch.samples) - config.samples:,} more (--samples)")
    if config.output is not None:
        store(Path(config.output), batch)


def decoded(tokenizer: Any, input_ids: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """Return one block [S] as text; each masked token is shown with what the model sees instead."""
    parts, begin = [], 0
    for place in [*np.flatnonzero(labels != IGNORE_INDEX).tolist(), len(labels)]:
        parts.append(tokenizer.decode(input_ids[begin:place].tolist()))
        if place < len(labels):
            was, seen = (tokenizer.decode([int(ids[place])]) for ids in (labels, input_ids))
            space = " " if was.startswith(" ") else ""
            parts.append(space + (SAME if was == seen else SHOWN).format(was.strip(), seen.strip()))
        begin = place + 1
    return " ".join("".join(parts).split())


def store(path: Path, batch: Replayed) -> None:
    """Write the batch as safetensors: samples, blocks [G], input_ids, labels [G, S], all int64."""
    tensors = {name: torch.from_numpy(getattr(batch, name)) for name in ("samples", "blocks", "input_ids", "labels")}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape), lambda t=tensor: t) for name, tensor in tensors.items()]  # type: ignore[misc]
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, entries)
    say("replay", f"written to {path}")
