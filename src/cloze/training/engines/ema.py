"""An exponential moving average of the fp32 weights.

It is kept in the optimizer's state under the key "ema", in the shape of a rank's weights. It is therefore partitioned
and checkpointed like the moments, and any engine on any number of ranks can load it.

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
    """Return the decay of step `global_step` (0-based): min(decay, (1 + step) / (10 + step)); None if `decay` is.

    The average starts with the initial weights, which small early decays forget before 1 / (1 - decay) steps
    (num_updates of TensorFlow's tf.train.ExponentialMovingAverage; averages of iterates: Polyak and Juditsky, 1992).
    """
    return None if decay is None else min(decay, (1 + global_step) / (10 + global_step))


class MovingAverage:
    """This rank's part of the average: its fragments of the weights, and the optimizer's state."""

    def __init__(self, held: Iterable[Fragment], state: dict[torch.Tensor, dict[str, Any]]):
        self._state, self._owners = state, {fragment.owner: fragment.swap for fragment in held}

    @torch.no_grad()
    def begin(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return, before a step, the weights that have no average yet. The average is added after the step, because
        optimizers create their state in their first step and skip that if the state is not empty."""
        found = {}
        for owner, swap in self._owners.items():
            if EMA not in self._state.get(owner, {}):
                copy = owner.detach().clone() if swap is None else average_on_disk(swap).copy_(on_disk(swap, owner))
                found[owner] = copy
        return found

    @torch.no_grad()
    def update(self, before: dict[torch.Tensor, torch.Tensor], decay: float, refused: torch.Tensor) -> None:
        """Update after a step: average = decay * average + (1 - decay) * weights. `refused`: a scalar on the device;
        if true, the average does not change. The host does not wait for it."""
        share = torch.where(refused, 0.0, 1.0 - decay)
        for owner, swap in self._owners.items():
            if owner in before:
                self._state[owner][EMA] = before[owner]
            average = local(self._state[owner][EMA])
            average.lerp_(_weights(owner, swap), share.to(device=average.device, dtype=average.dtype))


def _weights(owner: torch.Tensor, swap: Any) -> torch.Tensor:
    return local(owner) if swap is None else on_disk(swap, owner)
