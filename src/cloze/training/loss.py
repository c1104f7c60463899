"""The loss of a global batch, independent of how the batch is split.

The loss of one optimizer step is the sum of the cross entropies of all masked tokens of the global batch, divided once
by their number over all ranks and micro-batches. An average of averages (`transformers.Trainer` 5.23 for most masked
language models) weights tokens by the size of their micro-batch and depends on the number of ranks.

Engines average gradients over ranks, so each rank's part is multiplied by the number of ranks:

    loss = masked_loss_sum(logits, targets) / num_masked_global * world_size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cloze.data.batches.masking import IGNORE_INDEX


def masked_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of cross entropies in nats, an fp32 scalar: 0, with a zero gradient, without targets.

    logits: [K, V]; targets: [K], IGNORE_INDEX for positions without a target.
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
