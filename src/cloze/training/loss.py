"""The loss of a global batch, whatever it is split into.

The loss of one optimizer step is the sum of the cross entropies of all masked tokens of the global batch, divided once
by their number over all ranks and micro-batches. Averages of averages (what `transformers.Trainer` 5.23 computes for
most masked language models) weigh tokens by the luck of their micro-batch and change with the number of ranks.

Engines average gradients over ranks, so each rank's part is multiplied by the number of ranks:

    loss = masked_loss_sum(logits, targets) / num_masked_global * world_size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cloze.data.batches.masking import IGNORE_INDEX


def masked_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of cross entropies in fp32. logits: [K, V], targets: [K] with IGNORE_INDEX where nothing is predicted.

    Zero, with a zero gradient, where nothing is.
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
