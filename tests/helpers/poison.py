"""Losses and gradients that are not finite, planted in a rank."""

from __future__ import annotations

import math

import torch

BAD = 4  # 0-based: "step 5" in messages


def poison(what: str = "loss", value: float = math.nan, steps: tuple[int, ...] = (BAD,), rank: int = 1):
    """To be called in a rank: the second micro-batch of some steps on one rank gives a loss, or a gradient, that is no
    number."""

    def install() -> None:
        from cloze.training import trainer

        plain_step, plain_loss = trainer.train_step, trainer.masked_loss_sum
        now = {"step": -1, "calls": 0, "rank": -1}

        def train_step(run, batch):
            now.update(step=batch.global_step, calls=0, rank=run.plan.layout.rank)
            return plain_step(run, batch)

        def masked_loss_sum(logits, labels):
            now["calls"] += 1
            loss = plain_loss(logits, labels)
            if now["step"] not in steps or now["rank"] != rank or now["calls"] != 2:
                return loss
            return loss * value if what == "loss" else loss + _BadGradient.apply(logits) * 0.0

        trainer.train_step, trainer.masked_loss_sum = train_step, masked_loss_sum

    return install


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        return torch.full(ctx.shape, math.inf, dtype=ctx.dtype)
