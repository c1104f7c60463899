"""Find the largest micro-batch that fits into memory (`--auto_find_batch_size`).

    layout = fit_memory(layout, BatchProbe(model, head, masking, data, config, engine))

Forward and backward of one and of two blocks on the bare model give a line, from which follows the number of blocks
that leaves room for the optimizer and a tenth of the memory. It is tried as well, and the smallest of all ranks is
used. The global batch does not change, only its split into passes, as if given by hand. Gradients, buffers and random
state are restored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cloze.config import TrainConfig
from cloze.data.batches.layout import Layout
from cloze.data.batches.make_batch import fixed_capacity, make_batch
from cloze.data.batches.masking import Masking
from cloze.data.train_data import TrainData
from cloze.distributed.collectives import gather, raise_on_any_rank
from cloze.errors import ConfigError
from cloze.model.compiled import eagerly
from cloze.model.sparse_head import MaskedHead
from cloze.training.engines.base import Engine
from cloze.training.loss import masked_loss_sum
from cloze.training.run_schedule import split_batch
from cloze.utils.memory import PeakMemory, free_memory
from cloze.utils.terminal.console import say

SAFE_SHARE = 0.9  # of the free memory; the rest is for fragmentation, buckets and kernels' workspaces
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class BatchProbe:
    """The objects to run a micro-batch. `model` is bare, in fp32, with `head` and recomputation set up on it."""

    model: Any
    head: MaskedHead
    masking: Masking
    data: TrainData
    config: TrainConfig
    engine: Engine

    def batch(self, num_blocks: int) -> dict[str, torch.Tensor]:
        """Return a training micro-batch of the run's first blocks, repeated: input_ids, labels [num_blocks, S]."""
        ids, segments = self.data.first_blocks(self.config.seed), None
        rows = np.arange(num_blocks) % len(ids)
        if self.data.has_documents:  # one document per block: masks have the same shape
            segments = np.ones((num_blocks, ids.shape[1]), np.int32)
        rate = max(self.config.mlm_probability, self.config.mlm_probability_end or 0.0)
        capacity = fixed_capacity(num_blocks * ids.shape[1], rate, self.config.mask_unit)
        return make_batch(ids[rows], segments, self.masking, np.arange(num_blocks), num_blocks, capacity)

    def run(self, num_blocks: int) -> None:
        """Run forward and backward of a micro-batch, and clear the gradients."""
        device = self.device
        batch = self.batch(num_blocks)
        dtype = _AUTOCAST.get(self.engine.accelerator.mixed_precision)
        keeps = self.engine.support.whole_model  # otherwise no rank holds all gradients at once
        hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in self._trained() if not keeps]
        try:
            with eagerly(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                logits = self.head.masked_logits(self.model, batch, device)
            masked_loss_sum(logits, batch["targets"].to(device)).backward()
        finally:
            for hook in hooks:
                hook.remove()
            self.model.zero_grad(set_to_none=True)

    @property
    def device(self) -> torch.device:
        """Return the device of this rank."""
        return self.engine.accelerator.device

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def _let_go(parameter: torch.Tensor) -> None:
    parameter.grad = None


@contextlib.contextmanager
def borrowed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Move the model to a device in training mode for a trial; restore weights, buffers and random states after it."""
    before, was_training = next(model.parameters()).device, model.training
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    weights = [(p, p.data) for p in model.parameters()]
    try:
        model.to(device).train()
        yield
    finally:
        for parameter, data in weights:  # the previous storage, which may be a mapped file
            parameter.data = data
        model.train(was_training).to(before)
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), (value for _, value in buffers), strict=True):
                buffer.copy_(value)
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
            torch.cuda.empty_cache()


def fit_memory(layout: Layout, trial: BatchProbe) -> Layout:
    """Return the same global batch in as few passes as memory allows, if requested; every rank calls it.

    Raises ConfigError on every rank if not even one block fits.
    """
    if not trial.config.auto_find_batch_size:
        return layout
    device = trial.device
    share = -(-layout.global_batch // layout.world_size)
    with borrowed(trial.model, device):
        peak_bytes(trial, 1)  # libraries allocate workspaces and threads in the first pass
        free = _free(device)
        blocks = most_blocks(lambda n: peak_bytes(trial, n), free - bytes_to_come(trial), share)
    problem = None
    if blocks < 1:
        hint = "use --gradient_checkpointing, --bf16, a smaller --block_size, or ZeRO with a batch size given by hand"
        problem = ConfigError("not even one block fits into memory", where="--auto_find_batch_size", hint=hint)
    raise_on_any_rank(problem)
    found = split_batch(layout, layout.global_batch, min(gather(blocks)))
    split = f"{found.world_size} x {found.per_device} x {found.accumulation} (ranks x batch x accumulation)"
    say("memory", f"{split} fit; {free / 2**30:.1f} GiB were free on this rank")
    return found


def most_blocks(peak: Callable[[int], int | None], available: int, share: int) -> int:
    """Return the most blocks, up to `share`, whose pass fits into a safe share of `available` bytes; 0 if none do.

    `peak`: number of blocks -> peak bytes of a pass, None if memory runs out.
    """
    allowed = SAFE_SHARE * available
    taken: dict[int, int] = {}

    def fits(blocks: int) -> bool:
        found = peak(blocks)
        if found is not None:
            taken[blocks] = found
        return found is not None and found <= allowed

    if not fits(1):
        return 0
    good, bad = 1, share + 1
    straight = True
    while -(-share // good) > -(-share // (bad - 1)):  # otherwise more blocks would not save a pass
        if len(taken) == 1 or not straight:
            guess = min((good + bad) // 2, 2 * good)
        else:  # extrapolate a line through two points, in limited steps
            (n, bytes_n), (m, bytes_m) = sorted(taken.items())[-2:]
            guess = good + int((allowed - bytes_m) * (m - n) / max(bytes_m - bytes_n, 1))
            guess = max(good + 1, min(guess, bad - 1, 4 * good))
        if fits(guess):
            good = guess
        else:
            bad, straight = guess, False
    return good


def peak_bytes(trial: BatchProbe, num_blocks: int) -> int | None:
    """Return the peak bytes of a pass on the device in addition to the model; None if memory runs out."""
    device = trial.device
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
            trial.run(num_blocks)
            return torch.cuda.max_memory_allocated(device) - held
        with PeakMemory() as peak:
            trial.run(num_blocks)
        return peak.grown
    except (RuntimeError, MemoryError) as error:  # torch has its own class for CUDA only
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in str(error):
            return None
        raise


def bytes_to_come(trial: BatchProbe) -> int:
    """Return the bytes that the engine will hold in addition to weights and gradients: two moments per trained
    element, in fp32, the moving average if one is kept, and the engine's own buffers."""
    elements = sum(p.numel() for p in trial.model.parameters() if p.requires_grad)
    return trial.engine.bytes_to_come(elements, 2 + (trial.config.ema_decay is not None))


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
