"""DDP, or a single process: torch's optimizer steps the fp32 weights that the model computes with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from cloze.training.engines.base import Engine, Support
from cloze.training.engines.optimizer_memory import optimizer_bytes
from cloze.utils.environment import processes


class DDPEngine(Engine):
    """Every rank holds the whole state, and gradients are averaged."""

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.support = _support(self.world_size)
        self._stateless = False  # whether the optimizer has taken a step and keeps no state
        self._held = torch.zeros((), dtype=torch.bool, device=accelerator.device)

    @classmethod
    def requested(cls, deepspeed: str | None) -> bool:
        """Return true: DDP is the default."""
        return True

    @classmethod
    def runs(cls, accelerator: Accelerator) -> bool:
        """Return true: DDP is the default."""
        return True

    @classmethod
    def requested_support(cls, deepspeed: str | None, precision: str) -> Support:
        """Return full support."""
        return _support(processes.world_size())

    def attach(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Take the objects, and let fused optimizers skip steps by themselves."""
        super().attach(model, optimizer)
        fused = all(group.get("fused") for group in self.inner.param_groups)
        self.deferred = self.accelerator.scaler is None and fused

    def forward_context(self, is_last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients with the last micro-batch only."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate gradients; torch averages them."""
        scaler = self.accelerator.scaler
        (scaler.scale(loss) if scaler is not None else loss).backward()

    def take_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step with torch's optimizer.

        Fused optimizers keep weights and moments if `found_inf` is 1, as in loss scaling, so that the host does not
        wait for the norm. The first step, which creates the optimizer's state, is called by the host or not at all: a
        skipped one would leave SGD's new momentum uninitialised, and the next step would use it.
        """
        for parameter in self.params:  # a missing gradient counts as zero, as in ZeRO: moments and decay are updated
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        scaler, optimizer = self.accelerator.scaler, self.inner
        if scaler is not None:
            scaler.unscale_(optimizer)
        grad_norm = self.clip()
        refused = ~torch.isfinite(grad_norm)
        if self.deferred:
            refused = refused | self._held
            if self.hold_after_refusal:
                self._held = refused
            on_device = self._stateless or any(optimizer.state.values())
            optimizer.found_inf = refused.float() if on_device else None  # type: ignore[attr-defined]
            self._stepped = on_device or not bool(refused)
        else:
            self._stepped = not bool(refused)
        if self._stepped:
            scaler.step(optimizer) if scaler is not None else optimizer.step()
            self._stateless = not any(optimizer.state.values())
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return grad_norm, refused

    def bytes_to_come(self, elements: int, moments: int) -> int:
        """Return the bytes of optimizer tensors, and of the buckets in which gradients are sent."""
        half = self.accelerator.mixed_precision != "no"
        return int(optimizer_bytes(elements, moments, None, half)) + 4 * elements * (self.world_size > 1)


def _support(world_size: int) -> Support:
    return Support("DDP" if world_size > 1 else "single process", only_gradients=True)
