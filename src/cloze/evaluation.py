"""Perplexity of a masked language model on fixed masks: the same number for any number of ranks and any batch size.

Masks are drawn from (seed, block number), so they are the same every time a model is measured. The loss is the sum of
the cross entropies of all masked tokens over all blocks, divided once by their number; perplexity is its exponential.

    scores = score_blocks(logits_of, blocks, masking, per_device=8, accelerator=accelerator)
    scores.perplexity, scores.masked_accuracy, scores.masked_tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from cloze.console import progress
from cloze.data.loader import BlockSource, eval_batches
from cloze.data.masking import IGNORE_INDEX, Masking


class Interrupted(Exception):
    """Somebody wants the processes to stop while a model is being scored."""


@dataclass(frozen=True)
class Scores:
    """Sums over all masked tokens of all blocks, in double precision."""

    loss_sum: float
    correct: int
    masked_tokens: int
    blocks: int

    @property
    def loss(self) -> float:
        """Mean cross entropy of a masked token, in nats."""
        return self.loss_sum / self.masked_tokens if self.masked_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that overflows."""
        return perplexity(self.loss)

    @property
    def masked_accuracy(self) -> float:
        """Share of masked tokens whose most likely prediction is right."""
        return self.correct / self.masked_tokens if self.masked_tokens else math.nan


def perplexity(loss: float) -> float:
    """exp(loss) of a mean cross entropy in nats; infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def score_batch(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits: [K, V], targets: [K] -> [3] float64: sum of losses, number right, number of masked tokens."""
    rows = targets != IGNORE_INDEX
    losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none").double()
    right = logits.argmax(-1) == targets
    return torch.stack([losses.sum(), right.sum().double(), rows.sum().double()])


@torch.no_grad()
def score_blocks(
    logits_of: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    blocks: BlockSource,
    masking: Masking,
    per_device: int,
    accelerator: Accelerator,
    stop_vote: Callable[[], int] | None = None,
) -> Scores:
    """Score every block once, shared between the ranks. `logits_of`: a batch with input_ids [B, S] (on
    the CPU) -> logits [K, V] at its positions [K].

    Every rank calls it, and every rank gets the scores of all blocks. `stop_vote`: asked before each batch; where it
    is above 0 on any rank, Interrupted is raised on all of them.
    """
    total = torch.zeros(3, dtype=torch.float64)
    world = accelerator.num_processes
    steps = -(-len(blocks) // (per_device * world))
    with progress("evaluate", total=steps, unit="batches") as advance:
        for batch in eval_batches(blocks, masking, per_device, accelerator.process_index, world):
            if stop_vote is not None and _any_rank(stop_vote(), accelerator):
                raise Interrupted
            logits = logits_of(batch)
            total += score_batch(logits, batch["targets"].to(accelerator.device)).cpu()
            advance()
    if world > 1:
        total = accelerator.reduce(total.to(accelerator.device), "sum").cpu()
    loss_sum, correct, masked = total.tolist()
    return Scores(loss_sum, int(correct), int(masked), len(blocks))


def _any_rank(vote: int, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return vote > 0
    return bool(accelerator.reduce(torch.tensor(vote, device=accelerator.device), "sum").item())
