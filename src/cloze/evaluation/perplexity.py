"""Perplexity of a masked language model on fixed masks: the same number for any number of ranks and any batch size.

Masks are drawn from (seed, block number), so every measurement uses the same ones. The loss is the sum of the cross
entropies of all masked tokens over all blocks, divided once by their number; perplexity is its exponential. The sums
of each block are kept, for confidence intervals and paired comparisons of models.

    scores = score_blocks(logits_of, blocks, masking, per_device=8, accelerator=accelerator)
    scores.perplexity, scores.perplexity_interval, scores.masked_accuracy, scores.masked_tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray

from cloze.data.batches.loader import BlockSource, eval_batch_size, eval_batches
from cloze.data.batches.masking import IGNORE_INDEX, Masking
from cloze.evaluation.intervals import interval, ratio_and_error
from cloze.utils.terminal.console import progress

COLUMNS = LOSS, MASKED, RIGHT, RIGHT_IN_5, BYTES = range(5)  # of the table of blocks


class Interrupted(Exception):
    """A stop was requested while a model is being scored."""


@dataclass(frozen=True)
class TokenFacts:
    """Facts of each token of the vocabulary. `num_bytes` [V]: the UTF-8 bytes of its text; `band` [V]: its frequency
    band; and the names of the bands."""

    num_bytes: torch.Tensor
    band: torch.Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Sums over the masked tokens of each block, in float64.

    `table` [blocks, 5]: sum of losses (nats), masked tokens, correct predictions, tokens among the five best, and
    UTF-8 bytes (0 if unknown). `bands` [bands, 3]: sum of losses, tokens, correct predictions by frequency band.
    """

    table: NDArray[np.float64]
    bands: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))

    def _sum(self, column: int) -> float:
        return math.fsum(self.table[:, column])

    def _share(self, column: int) -> float:
        return self._sum(column) / self.masked_tokens if self.masked_tokens else math.nan

    @property
    def blocks(self) -> int:
        """Return the number of blocks scored."""
        return len(self.table)

    @property
    def masked_tokens(self) -> int:
        """Return the number of masked tokens."""
        return int(self._sum(MASKED))

    @property
    def loss(self) -> float:
        """Return the mean cross entropy of a masked token, in nats."""
        return self._share(LOSS)

    @property
    def loss_interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the loss, with blocks as the sample (see `cloze.evaluation.intervals`)."""
        return interval(*ratio_and_error(self.table[:, LOSS], self.table[:, MASKED]))

    @property
    def perplexity(self) -> float:
        """Return exp(loss); infinity if that overflows."""
        return perplexity(self.loss)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """Return exp of the loss's 95 % interval."""
        low, high = self.loss_interval
        return perplexity(low), perplexity(high)

    @property
    def masked_accuracy(self) -> float:
        """Return the share of masked tokens whose most likely prediction is right."""
        return self._share(RIGHT)

    @property
    def masked_accuracy_top5(self) -> float:
        """Return the share of masked tokens that are among the five most likely predictions."""
        return self._share(RIGHT_IN_5)

    @property
    def bits_per_byte(self) -> float | None:
        """Return the loss in bits per UTF-8 byte of the masked tokens' text, which is comparable between tokenizers;
        None if the bytes are unknown."""
        num_bytes = self._sum(BYTES)
        return self._sum(LOSS) / math.log(2) / num_bytes if num_bytes else None


def perplexity(loss: float) -> float:
    """Return exp(loss) of a mean cross entropy in nats; infinity if that overflows, NaN of a NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


@torch.no_grad()
def score_batch(
    logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, num_rows: int, facts: TokenFacts | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lines of the table [num_rows, 5] and bands [bands, 3], both float64, from logits [K, V], targets [K] and
    rows [K], the block (of `num_rows`) that each belongs to."""
    real = targets != IGNORE_INDEX
    logits, targets, rows = logits[real].float(), targets[real], rows[real]
    losses = F.cross_entropy(logits, targets, reduction="none").double()
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    right = best == targets[:, None]
    ones = torch.ones_like(losses)
    num_bytes = torch.zeros_like(losses) if facts is None else facts.num_bytes[targets].double()
    columns = torch.stack([losses, ones, right[:, 0].double(), right.any(-1).double(), num_bytes], dim=1)
    table = torch.zeros(num_rows, len(COLUMNS), dtype=torch.float64, device=logits.device)
    table.index_add_(0, rows, columns)
    bands = torch.zeros(len(facts.names) if facts else 0, 3, dtype=torch.float64, device=logits.device)
    if facts is not None:
        bands.index_add_(0, facts.band[targets], columns[:, [LOSS, MASKED, RIGHT]])
    return table, bands


@torch.no_grad()
def score_blocks(
    logits_of: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    blocks: BlockSource,
    masking: Masking,
    per_device: int,
    accelerator: Accelerator,
    stop_vote: Callable[[], int] | None = None,
    facts: TokenFacts | None = None,
    draws: int = 1,
) -> Scores:
    """Score every block, shared between the ranks. `logits_of`: a batch with input_ids [B, S] (on the CPU) -> logits
    [K, V] at its positions [K].

    Every rank calls it and gets the scores of all blocks. `draws`: masks per block, the first being those of a single
    draw. `stop_vote`: called before each batch; if it is above 0 on any rank, all ranks raise Interrupted.
    """
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    count = len(blocks)
    per_device = eval_batch_size(count, per_device, world)
    table = torch.zeros(count, len(COLUMNS), dtype=torch.float64)
    bands = torch.zeros(len(facts.names) if facts else 0, 3, dtype=torch.float64)
    steps = -(-count // (per_device * world))
    with progress("evaluate", total=steps * draws, unit="batches") as advance:
        for draw in range(draws):
            for step, batch in enumerate(eval_batches(blocks, masking, per_device, rank, world, draw)):
                if stop_vote is not None and _any_rank(stop_vote(), accelerator):
                    raise Interrupted
                rows = (batch["positions"] // blocks.block_size).to(device)
                found = score_batch(logits_of(batch), batch["targets"].to(device), rows, per_device, facts)
                first = (step * world + rank) * per_device
                here = max(0, min(per_device, count - first))
                table[first : first + here] += found[0][:here].cpu()
                bands += found[1].cpu()
                advance()
    if world > 1:
        table = accelerator.reduce(table.to(device), "sum").cpu()
        bands = accelerator.reduce(bands.to(device), "sum").cpu()
    return Scores(table.numpy(), bands.numpy())


def _any_rank(vote: int, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return vote > 0
    return bool(accelerator.reduce(torch.tensor(vote, device=accelerator.device), "sum").item())
