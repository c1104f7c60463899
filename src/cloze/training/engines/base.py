"""The interface of an engine: it holds model and optimizer, and computes gradients and steps.

    engine = engine_for(accelerator)                     # cloze.training.engines.choose_engine; nothing is wrapped yet
    engine.prepare(model, optimizer, layout, max_grad_norm)
    for micro_batch in micro_batches:
        with engine.forward_context(is_last):
            logits = engine.model(input_ids=...).logits
            engine.backward(loss, is_last)
    grad_norm, refused = engine.step(learning_rate)      # both on the device

A new engine is a subclass and a line in `choose_engine.ENGINES`. The methods here suit an engine that keeps every
parameter whole, and in fp32, on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from cloze.checkpoint.format import WEIGHT
from cloze.config import TrainConfig
from cloze.data.batches.layout import Layout
from cloze.errors import ConfigError
from cloze.model.compiled import compile_backbone
from cloze.training.engines.ema import MovingAverage
from cloze.training.engines.gradients import gradient_norm
from cloze.training.engines.optimizer_memory import bytes_of
from cloze.training.engines.precision import PRECISIONS, precision_name
from cloze.training.engines.sharded_state import Fragment, inner_optimizer


@dataclass(frozen=True)
class Support:
    """What an engine supports, known before its processes join.

    `name`: for messages and manifests; `whole_parameters`: whether the optimizer steps each parameter as one tensor;
    `whole_model`: whether a rank ever holds all weights or all gradients; `compiles`: what torch.compile is applied
    to, `backbone` or `layers`, None if unsupported; `only_gradients`: ranks exchange only gradients, once a step.
    """

    name: str
    precisions: tuple[str, ...] = PRECISIONS
    whole_parameters: bool = True
    whole_model: bool = True
    compiles: str | None = "backbone"
    only_gradients: bool = False

    def check_precision(self, precision: str) -> None:
        """Raise ConfigError for a precision that the engine does not support."""
        if precision not in self.precisions:
            what = f"{self.name} does not support {precision_name(precision)}"
            hint = "use bf16 or fp32, or another engine (launch/accelerate/multi_gpu.yaml)"
            raise ConfigError(what, where="--precision", hint=hint)


class Engine(ABC):
    """A model and its optimizer, and how they take one step.

    `deferred`: whether the device itself skips a step that is not finite, so that the host may read the outcome later.
    `hold_after_refusal`: whether later steps are skipped too until the host has read it. `frozen`: fp32 weights of
    parameters that are not trained, if the engine's own copies are in half precision; all ranks have the names, only
    rank 0, which writes them, the tensors. `group_names`: the parameters of each optimizer group.
    """

    support: Support
    needs_own_processes = False  # whether a run in the caller's process is refused
    partitioned = False  # whether each rank holds only a part of the training state
    offloads = False  # whether the optimizer's state is kept in host memory
    settings: dict[str, Any] | None = None  # beside the flags, the same on all ranks

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.deferred = self.hold_after_refusal = False
        self.frozen: dict[str, torch.Tensor | None] = {}
        self._average: MovingAverage | None = None
        self._stepped = False  # whether the last step was taken (or it is refused on the device)

    @classmethod
    @abstractmethod
    def requested(cls, deepspeed: str | None) -> bool:
        """Return whether the launcher's variables or --deepspeed ask for this engine, before its processes join."""

    @classmethod
    @abstractmethod
    def runs(cls, accelerator: Accelerator) -> bool:
        """Return whether the processes that have joined run this engine."""

    @classmethod
    @abstractmethod
    def requested_support(cls, deepspeed: str | None, precision: str) -> Support:
        """Return what the requested engine supports. `deepspeed`: --deepspeed."""

    @classmethod
    def check_request(cls, config: TrainConfig, on_gpu: bool) -> None:
        """Raise ConfigError for settings that are invalid or unsupported here; warn of those without effect."""
        return

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, layout: Layout, max_grad_norm: float
    ) -> Engine:
        """Wrap model and optimizer. `max_grad_norm`: 0 for no clipping. Raises ConfigError for parameter shapes and
        settings that the engine does not support."""
        self.support.check_precision(self.accelerator.mixed_precision)
        self._check_shapes(model)
        self.group_names = _group_names(model, optimizer)
        model.train()
        self._max_grad_norm = max_grad_norm
        self.attach(*self.wrap(model, optimizer, layout))
        return self

    def _check_shapes(self, model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if not self.can_hold(parameter):
                what = f"{self.support.name} cannot hold {name}, of shape {list(parameter.shape)}"
                hint = "train with DDP (launch/accelerate/multi_gpu.yaml)"
                raise ConfigError(what, where=type(model).__name__, hint=hint)

    def wrap(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, layout: Layout
    ) -> tuple[torch.nn.Module, Any]:
        """Return model and optimizer as the engine needs them."""
        return self.accelerator.prepare(model, optimizer)

    def attach(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Take wrapped objects as this engine's own."""
        self.model, self.optimizer = model, optimizer
        self.module = self.accelerator.unwrap_model(model)
        self.params = [p for p in self.module.parameters() if p.requires_grad]

    def can_hold(self, parameter: torch.nn.Parameter) -> bool:
        """Return whether the engine supports the shape of a parameter."""
        return True

    def compile(self, model: Any, mode: str) -> str:
        """Compile the model before it is wrapped; return what is compiled, in words. `mode`: of torch.compile."""
        compile_backbone(model, mode)
        return f"the {model.base_model_prefix}"

    def forward_context(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context for forward and backward of a micro-batch. `is_last`: of its step."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate gradients; with the last micro-batch of a step they are averaged over the ranks."""

    def step(self, learning_rate: float, ema_decay: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the learning rate, take a step, and update the moving average of the weights with `ema_decay`, None
        without one. Skipped steps do not update it. Return what `take_step` returns."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if ema_decay is None:
            return self.take_step()
        if self._average is None:
            self._average = MovingAverage(self.fragments(), self.state)
        before = self._average.begin()
        grad_norm, refused = self.take_step()
        if self._stepped:
            self._average.update(before, ema_decay, refused)
        return grad_norm, refused

    @abstractmethod
    def take_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, update the weights, clear the gradients; return the norm of the gradients before clipping, and whether
        the step was skipped because the norm is not finite. Both are scalars on the device, equal on all ranks.
        Clipping multiplies the gradients by min(1, max_grad_norm / (norm + 1e-6))."""

    def clip(self) -> torch.Tensor:
        """Clip the gradients; return their norm before clipping."""
        norm = gradient_norm(self.params, self.partitioned)
        if self._max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.params, self._max_grad_norm, norm)
        return norm

    @property
    def inner(self) -> torch.optim.Optimizer:
        """Return the torch optimizer inside all wrappers."""
        return inner_optimizer(self.optimizer)

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Return the inner optimizer's state by the tensor that owns it."""
        return self.inner.state

    def fragments(self) -> list[Fragment]:
        """Return this rank's fragments of all trained parameters. A parameter without elements has no fragment."""
        found = (self.locate(name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        return [one for one in found if one is not None and one.length > 0]

    def locate(self, name: str, parameter: Any) -> Fragment | None:
        """Return this rank's part of a parameter; None, or a length below 1, if it has none."""
        return Fragment(name, self.shape_of(parameter), 0, parameter.numel(), parameter, 0)

    def shape_of(self, parameter: Any) -> tuple[int, ...]:
        """Return the shape of the whole parameter."""
        return tuple(parameter.shape)

    def at_rest(self) -> AbstractContextManager[Any]:
        """Return the context in which every rank may call `whole`."""
        return nullcontext()

    def whole(self, parameter: Any) -> torch.Tensor:
        """Return the full value of a parameter that the model computes with; every rank calls it inside `at_rest`."""
        return parameter.detach()

    @torch.no_grad()
    def refresh(self, parameter: Any, full: torch.Tensor) -> None:
        """Set the copy that the model computes with. `full`: the whole fp32 weight, on any device."""
        parameter.data.copy_(full.view(parameter.data.shape))

    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load whole fp32 weights by name and reset the optimizer's state: the start of a run."""
        self.forget()
        for one in self.fragments():
            one.view(WEIGHT, self.state).copy_(weights[one.name].reshape(-1)[one.offset : one.offset + one.length])
        for name, parameter in self.module.named_parameters():
            self.refresh(parameter, weights[name])

    def forget(self) -> None:
        """Reset the optimizer's state, before the first step or before loading one."""
        self.state.clear()

    def loss_scale_state(self) -> dict[str, int | float] | None:
        """Return the state of fp16's loss scale; None in other precisions."""
        return self.read_loss_scale() if self.accelerator.mixed_precision == "fp16" else None

    def restore_loss_scale(self, saved: dict[str, int | float] | None) -> None:
        """Restore what `loss_scale_state` returned; if another engine saved it, only the scale.

        Values are converted to the types of a new scaler: torch's kernels reject 2000.0 for 2000, which older
        checkpoints contain.
        """
        if self.accelerator.mixed_precision == "fp16" and saved:
            saved = {key: value for key, value in saved.items() if value is not None}
            self.write_loss_scale(saved, saved.get("scale", saved.get("cur_scale", 2.0**16)))

    def read_loss_scale(self) -> dict[str, int | float]:
        """Return the values of the scaler, torch's here; `scale` or `cur_scale` is the loss scale."""
        return dict(self.accelerator.scaler.state_dict())

    def write_loss_scale(self, saved: dict[str, int | float], scale: float) -> None:
        """Give the scaler this loss scale, and those saved values that it has."""
        fresh = self.accelerator.scaler.state_dict()
        known = {key: type(fresh[key])(value) for key, value in saved.items() if key in fresh}
        self.accelerator.scaler.load_state_dict({**fresh, **known, "scale": float(scale)})

    @abstractmethod
    def bytes_to_come(self, elements: int, moments: int) -> int:
        """Return the bytes that a rank will hold in addition to whole weights and gradients, for `elements` trained
        elements with `moments` optimizer tensors each."""

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes of `parameters`, `gradients` and `optimizer` (fp32 weights that are not parameters,
        moments, EMA) on the compute device, and of `host`, in host memory. Each storage counts once."""
        seen: set[int] = set()
        module = list(self.module.parameters())
        owners = [p for group in self.inner.param_groups for p in group["params"]]
        state = [value for entries in self.state.values() for value in entries.values() if torch.is_tensor(value)]
        return {
            "parameters": bytes_of([p.data for p in module], seen),
            "gradients": bytes_of([p.grad for p in module if p.grad is not None], seen),
            "optimizer": bytes_of([*owners, *state], seen),
            "host": 0,
        }


def _group_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
