"""Which engine a run uses.

requested_engine(config.deepspeed).requested_support(config.deepspeed, "bf16")     # before the processes join
engine = engine_for(accelerator)                                                   # after that
"""

from __future__ import annotations

from accelerate import Accelerator

from cloze.training.engines.base import Engine
from cloze.training.engines.ddp import DDPEngine
from cloze.training.engines.deepspeed import DeepSpeedEngine
from cloze.training.engines.fsdp2 import FSDP2Engine

# The first engine that the run requests is used.
ENGINES: list[type[Engine]] = [
    DeepSpeedEngine,
    FSDP2Engine,
    DDPEngine,
]


def requested_engine(deepspeed: str | None) -> type[Engine]:
    """Return the engine that --deepspeed or the launcher's variables ask for."""
    return next(engine for engine in ENGINES if engine.requested(deepspeed))


def engine_for(accelerator: Accelerator) -> Engine:
    """Return the engine of the processes that have joined; it holds no model yet."""
    return next(engine for engine in ENGINES if engine.runs(accelerator))(accelerator)
