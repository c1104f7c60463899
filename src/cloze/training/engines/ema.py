"""An exponential moving average of the fp32 weights, kept beside the optimizer's moments.

It lies in the optimizer's state under the key "ema", of the same shape as the weights that a rank holds: so it is
partitioned as the moments are, goes into checkpoints with them, and is read back by any engine on any number of ranks.

    average = MovingAverage(engine.fragments(), engine.state)
    before = average.begin()                            # the weights that the average starts with
    grad_norm, refused = take_a_step()
    average.update(before, decay_at(0.999, global_step), refused)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cloze.checkpoint.format import EMA
from cloze.training.engines.nvme_offload import on_disk
from cloze.training.engines.sharded_state import Fragment, average_on_disk, local


def decay_at(decay: float | None, global_step: int) -> float | None:
    """The decay of step `global_step` (0-based): min(decay, (1 + step) / (10 + step)); None where there is none.

    The average starts with the initial weights, which this forgets at once instead of after 1 / (1 - decay) steps
    (num_updates of TensorFlow's tf.train.ExponentialMovingAverage; averages of iterates: Polyak and Juditsky, 1992).
    """
    return None if decay is None else min(decay, (1 + global_step) / (10 + global_step))


class MovingAverage:
    """What this rank holds of the average, by its fragments of the weights and the optimizer's state."""

    def __init__(self, held: Iterable[Fragment], state: dict[torch.Tensor, dict[str, Any]]):
        self._state, self._owners = state, {fragment.owner: fragment.swap for fragment in held}

    @torch.no_grad()
    def begin(self) -> dict[torch.Tensor, torch.Tensor]:
        """Before a step: the weights, where there is no average yet. Optimizers make their state in their first step,
        and take it for made where there is any: so the average is put there after it."""
        found = {}
        for owner, swap in self._owners.items():
            if EMA not in self._state.get(owner, {}):
                copy = owner.detach().clone() if swap is None else average_on_disk(swap).copy_(on_disk(swap, owner))
                found[owner] = copy
        return found

    @torch.no_grad()
    def update(self, before: dict[torch.Tensor, torch.Tensor], decay: float, refused: torch.Tensor) -> None:
        """After a step: average = decay * average + (1 - decay) * weights. `refused`: a scalar on the device; where it
        is true the average stays as it is, and nobody waits for it."""
        share = torch.where(refused, 0.0, 1.0 - decay)
        for owner, swap in self._owners.items():
            if owner in before:
                self._state[owner][EMA] = before[owner]
            average = local(self._state[owner][EMA])
            average.lerp_(_weights(owner, swap), share.to(device=average.device, dtype=average.dtype))


def _weights(owner: torch.Tensor, swap: Any) -> torch.Tensor:
    return local(owner) if swap is None else on_disk(swap, owner)
