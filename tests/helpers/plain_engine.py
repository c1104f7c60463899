"""An engine of one process on the CPU, for tests of what is done with engines."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from cloze.data.batches.layout import Layout
from cloze.training.engines.base import Engine
from cloze.training.engines.ddp import DDPEngine


def plain_engine(module: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float = 0.0) -> Engine:
    """Return an engine that holds a module and its optimizer."""
    return DDPEngine(Accelerator(cpu=True)).prepare(module, optimizer, Layout(1, 1, 0, 1), max_grad_norm)
