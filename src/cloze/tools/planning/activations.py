"""What a training pass holds in memory, by tracing it: forward and backward of the model without weights or data.

    trace = trace_pass(twin, block_size=128, rows=20, dtype=None, cast=torch.bfloat16, on_gpu=True)
    trace.peak(blocks=32, rows=640)          # bytes at the highest, beside the weights
    trace.activations(blocks=32)             # of them kept for the backward pass; trace.logits(rows=640)

Formulas (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4) are for
one architecture. Here the model itself runs on torch's meta device, which has shapes and no data: each storage counts
from the call that makes it until nothing refers to it, as in eager PyTorch; so recomputation, tied weights, the order
in which gradients appear and what the head needs are all as they will be. Every count is a + b * blocks + c * rows
(rows: positions that the head predicts), known from three small passes.

What a GPU does otherwise than the reference code is put in place (`cloze.tools.planning.device`). Workspaces of
kernels, fragmentation and what torch.compile saves are not seen, nor is the mask that keeps documents of a block
apart.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging as transformers_logging

from cloze.model.archs import decoder_start
from cloze.model.packed import model_inputs
from cloze.model.sparse_head import MaskedHead
from cloze.tools.planning.device import AsDevice
from cloze.tools.planning.meta_op_cache import Repeats
from cloze.training.loss import masked_loss_sum

_SHAPES = ((2, 2), (3, 2), (2, 3))  # blocks, and units of rows: three points of a plane. One block has shortcuts


class Untraceable(Exception):
    """The model's forward or backward cannot run without data; the message gives the reason."""


@dataclass(frozen=True)
class Trace:
    """One pass, event by event. `plane` [E, 3]: live bytes are plane @ (1, blocks, rows), without finished gradients;
    `finished` [E]: bytes of gradients finished by then; `just` [E]: bytes of the gradient finished at this event;
    `which` [E]: the number of its parameter in the model's order, -1 for other elements; `forward_end`: the event at
    which the backward pass begins."""

    plane: NDArray[np.float64]
    finished: NDArray[np.float64]
    just: NDArray[np.float64]
    which: NDArray[np.int64]
    forward_end: int

    def live(self, blocks: float, rows: float) -> NDArray[np.float64]:
        """Return [E] bytes of everything except weights and finished gradients."""
        return np.maximum(self.plane @ np.array([1.0, blocks, rows]), 0.0)

    def peak(self, blocks: float, rows: float, kept: float | NDArray[np.float64] = 1.0, copies: float = 0.0) -> float:
        """Return bytes at the highest. `kept`: the share of each finished gradient that stays until the pass ends, or
        one for each parameter; `copies`: how many times a gradient is copied when it is finished, to travel."""
        if isinstance(kept, np.ndarray):
            staying = np.cumsum(np.where(self.which >= 0, self.just * kept[self.which], 0.0))
        else:
            staying = kept * self.finished
        return float((self.live(blocks, rows) + staying + copies * self.just).max())

    def activations(self, blocks: float) -> float:
        """Return bytes kept for the backward pass when it begins, but for those that the head keeps for each
        position."""
        return float(self.live(blocks, 0.0)[self.forward_end])

    def logits(self, rows: float) -> float:
        """Return bytes that head and loss keep for `rows` positions, mostly scores for the vocabulary."""
        return float(self.plane[self.forward_end, 2]) * rows


def trace_pass(
    twin: Any,
    block_size: int,
    rows: int,
    cast: torch.dtype | None,
    on_gpu: bool,
    sparse: bool = True,
    again: Repeats | None = None,
) -> Trace:
    """Forward and backward of `twin`, a model on the meta device, in training mode, with what is trained and what is
    recomputed set up on it. `rows`: positions to predict in a block; `cast`: the type that autocast uses, None without
    it; `again`: what other traces found. Raises Untraceable."""
    runs = []
    again = again or Repeats()
    for blocks, units in _SHAPES:
        try:
            runs.append(_run(twin, block_size, blocks, units * rows, cast, on_gpu, sparse, again))
        except Exception as error:  # a forward that reads its data cannot be traced, with any error
            reason = str(error).strip().splitlines()[0][:80] if str(error).strip() else ""
            raise Untraceable(f"{type(error).__name__}: {reason}") from None
    if len({len(run.live) for run in runs}) != 1 or len({run.forward_end for run in runs}) != 1:
        raise Untraceable("the number of its operations depends on the size of the batch")
    live = [np.array(run.live, np.float64) for run in runs]
    (blocks, units), first = _SHAPES[0], runs[0]
    by_block = (live[1] - live[0]) / (_SHAPES[1][0] - blocks)
    by_row = (live[2] - live[0]) / (_SHAPES[2][1] - units) / rows
    plane = np.stack([live[0] - by_block * blocks - by_row * units * rows, by_block, by_row], 1)
    return Trace(
        plane,
        np.array(first.finished, np.float64),
        np.array(first.just, np.float64),
        np.array(first.which),
        first.forward_end,
    )


def untrained(twin: Any, block_size: int) -> list[str]:
    """Return names of parameters that get no gradient from the prediction (poolers, contact heads). Raises
    Untraceable."""
    reached: set[int] = set()
    handles = [
        p.register_post_accumulate_grad_hook(lambda q: reached.add(id(q)))
        for p in twin.parameters()
        if p.requires_grad
    ]
    try:
        _run(twin, block_size, 2, 2, None, True, False, Repeats())
    except Exception as error:  # a forward that looks at its data
        raise Untraceable(f"{type(error).__name__}: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, p in twin.named_parameters() if p.requires_grad and id(p) not in reached]


class _Ledger(TorchDispatchMode):
    """Follows every storage that is made in the block from its first use to its end."""

    def __init__(self, outside: list[torch.Tensor], again: Repeats):
        super().__init__()
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in outside}
        self._again = again
        self._now, self._finished = 0, 0
        self.live: list[int] = []
        self.finished: list[int] = []
        self.just: list[int] = []
        self.which: list[int] = []
        self.forward_end = 0

    def end_forward(self) -> None:
        """Note that the backward pass begins here."""
        self._event()
        self.forward_end = len(self.live) - 1

    def gradient(self, number: int, parameter: torch.Tensor) -> None:
        """Note that the gradient of the model's `number`-th parameter is finished."""
        assert parameter.grad is not None
        size = parameter.grad.numel() * parameter.grad.element_size()
        self._finished += size
        self._event(size, number)

    def _event(self, just: int = 0, which: int = -1) -> None:
        self.live.append(self._now - self._finished)
        self.finished.append(self._finished)
        self.just.append(just)
        self.which.append(which)

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self._now += size
        self._event()

    def _gone(self, key: int, size: int) -> None:
        self._now -= size
        self._known.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:  # `if mask.all()`: it is not
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        out = self._again.call(func, args, kwargs or {})
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._note(value)
        return out


def _run(
    twin: Any,
    block_size: int,
    blocks: int,
    rows: int,
    cast: torch.dtype | None,
    on_gpu: bool,
    sparse: bool,
    again: Repeats,
) -> _Ledger:
    meta = torch.device("meta")
    ids = torch.zeros((blocks, block_size), dtype=torch.long, device=meta)
    positions = torch.zeros((rows,), dtype=torch.long, device=meta)
    batch = {"input_ids": ids, "labels": ids}
    inputs = model_inputs(batch, meta, None, decoder_start(twin.config))
    ledger = _Ledger([*twin.parameters(), *twin.buffers(), ids, positions, *inputs.values()], again)
    device = AsDevice(on_gpu, cast)
    if twin.is_gradient_checkpointing:  # a mode of functions is not on where activations are computed anew
        how = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), device)}
        twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hooks(twin, ledger))
        head = MaskedHead(twin, sparse)
        stack.enter_context(ledger)
        stack.enter_context(device)
        stack.enter_context(meta)
        logits = head.logits(twin, inputs, positions)
        device.forget()
        loss = masked_loss_sum(logits, positions)
        ledger.end_forward()
        torch.autograd.backward([loss])  # the method would turn `device` off; the logits stay, as in `train_step`
    return ledger


@contextlib.contextmanager
def _hooks(twin: Any, ledger: _Ledger) -> Iterator[None]:
    """Record finished gradients during a traced pass; afterwards drop all gradients and remove the head's hook.
    Nothing is collected meanwhile: what waits for that would be freed at any event."""
    backbone = getattr(twin, twin.base_model_prefix, twin)
    before = dict(backbone._forward_hooks)
    handles = [
        p.register_post_accumulate_grad_hook(functools.partial(ledger.gradient, number))
        for number, p in enumerate(twin.parameters())
        if p.requires_grad
    ]
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()
        backbone._forward_hooks.clear()
        backbone._forward_hooks.update(before)
        twin.zero_grad(set_to_none=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress library messages about models without data, and restore the random state."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
