"""What an engine holds on one rank, in the terms in which all engines are compared.

World(ranks=16, ranks_a_node=8, accumulation=1, precision="bf16").width(2)     # 2 bytes Parts(parameters=...,
optimizer=..., ...)                                      # bytes: see `cloze.tools.planning.memory.per_rank`
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class World:
    """`accumulation`: passes of a step; `precision`: "no", "bf16", "fp16" or "fp8"; `on_gpu`: whether ranks have
    memory apart from the host's."""

    ranks: int
    ranks_a_node: int
    accumulation: int
    precision: str
    on_gpu: bool = True

    def width(self, stage: int | None) -> int:
        """Return bytes of an element of the weights that the model computes with, and of its gradients."""
        return 4 if stage is None or self.precision == "no" else 2


@dataclass(frozen=True)
class Parts:
    """Bytes that an engine holds, but for activations. `parameters`, `optimizer`, `lasting`: always; `gradients`: when
    the pass ends; `waiting`: of them before the pass; `kept`: share of a finished gradient that stays, of all of them
    or one for each parameter; `copies`: of a finished gradient; `buffers`: in the pass; `step`: more in the
    optimizer's step than `gradients`; `start`: at the highest while the engine is made."""

    parameters: float
    optimizer: float
    lasting: float
    gradients: float
    waiting: float
    kept: float | NDArray[np.float64]
    copies: float
    buffers: float
    step: float
    start: float
    host: float
    nvme: float
