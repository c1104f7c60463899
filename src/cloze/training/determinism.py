"""Bit-identical results: allow only operations whose result does not depend on a GPU's order of additions.

    use_same_bits(strict=False)              # before anything is computed
    settle_determinism(trial, per_device)    # before the engine wraps the model

torch's flash and memory-efficient attention use their deterministic backward pass only if
`torch.use_deterministic_algorithms` is strict. In strict mode an operation without a deterministic implementation
raises an error, otherwise it warns. So the model is tried with warnings before the mode becomes strict.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator

import torch

from cloze.config import TrainConfig
from cloze.distributed.collectives import gather
from cloze.errors import ConfigError, TrainingError
from cloze.training.find_batch_size import BatchProbe, borrowed
from cloze.utils.terminal.console import warn

_OP = re.compile(r"(\S+) does not have a deterministic implementation")


def use_same_bits(strict: bool) -> None:
    """Select deterministic operations (PyTorch, "Reproducibility"). An operation without a deterministic
    implementation warns, or raises RuntimeError if `strict`. cuBLAS reads its setting when it is first called."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers passes it to the flash attention packages
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def wants_same_bits(config: TrainConfig, on_gpu: bool) -> bool:
    """Return whether a run shall be bit-identical when repeated."""
    return config.full_determinism is True or (config.full_determinism == "auto" and on_gpu)


def settle_determinism(trial: BatchProbe, per_device: int) -> None:
    """Allow only deterministic operations if the model needs no operation without a deterministic implementation;
    every rank calls it.

    Otherwise `auto` warns that the run is not bit-identical, with the reason; true raises ConfigError. A model too
    large for a trial on one device is strict with true only.
    """
    config, device = trial.config, trial.device
    if not wants_same_bits(config, device.type == "cuda"):
        return
    found = gather(unrepeatable_operations(trial, per_device))
    operations = sorted({name for one in found for name in one or ()})
    if operations and config.full_determinism is True:
        what = f"{', '.join(operations)}: no deterministic implementation on this machine"
        raise ConfigError(
            what, where="--full_determinism", hint="take `auto` or false, or another --attn_implementation"
        )
    if operations:
        warn(f"not bit-identical because of {', '.join(operations)}, without a deterministic implementation here")
    elif None in found and config.full_determinism == "auto":
        warn("not bit-identical for certain: the whole model does not fit on one device to be tried")
    else:
        use_same_bits(strict=True)


def unrepeatable_operations(trial: BatchProbe, per_device: int) -> list[str] | None:
    """Return the operations of a forward and backward pass that have no deterministic implementation; None if there
    is not enough memory for a pass of the whole model."""
    try:
        with borrowed(trial.model, trial.device), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            trial.run(per_device)
    except torch.OutOfMemoryError:
        return None
    names = {operation_without(str(one.message)) for one in heard}
    return sorted(name for name in names if name is not None)


@contextlib.contextmanager
def named_operations() -> Iterator[None]:
    """Turn torch's error about an operation that the trial did not meet (in a compiled model, in evaluation, with
    another shape) into a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        name = operation_without(str(error))
        if name is None:
            raise
        hint = "resume with --full_determinism false"
        raise TrainingError(
            f"{name} has no deterministic implementation here", where="--full_determinism", hint=hint
        ) from error


def operation_without(text: str) -> str | None:
    """Return the operation that torch's warning or error says has no deterministic implementation, else None."""
    match = _OP.search(text)
    if match is not None:
        return match.group(1)
    return "cuBLAS" if "CuBLAS" in text and "deterministic" in text.lower() else None
