"""Forward, backward and step, the same three calls for a single process, DDP, FSDP2 and DeepSpeed.

engine = prepare_engine(accelerator, model, optimizer, config)
for micro_batch in micro_batches:
    logits = engine.model(input_ids=...).logits
    engine.backward(loss, is_last=...)
grad_norm, refused = engine.step(learning_rate)      # both on the device
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from cloze.data.batches.layout import Layout
from cloze.distributed.fsdp_plugin import is_fsdp
from cloze.distributed.world import engine_name, zero_stage
from cloze.errors import ConfigError, TrainingError
from cloze.training.engines.deepspeed_schema import FILLED
from cloze.training.engines.ema import MovingAverage
from cloze.training.engines.fsdp2 import shard
from cloze.training.engines.gradients import gradient_norm, use_exact_norms
from cloze.training.engines.loss_scale import norm_scale_of_step, start_with_scale
from cloze.training.engines.nvme_offload import check_alignment, fit_buffers
from cloze.training.engines.sharded_state import inner_optimizer, set_weights, zero_optimizer
from cloze.training.engines.zero3 import partition

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """A model and its optimizer as wrapped by accelerate, and how they take one step.

    `deferred`: whether a step with bad numbers is refused on the device itself, so that the host may learn of it
    later. `hold_after_refusal`: whether all steps after it are refused too until the host has learned of it. `frozen`:
    see `cloze.training.checkpointing.snapshot.Training`.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, max_grad_norm: float):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.module = accelerator.unwrap_model(model)
        self.zero_stage = zero_stage(accelerator)
        self._scaled_by_deepspeed = self.zero_stage is not None and accelerator.mixed_precision == "fp16"
        self._max_grad_norm = max_grad_norm
        self._params = [p for p in self.module.parameters() if p.requires_grad]
        fused = all(group.get("fused") for group in inner_optimizer(optimizer).param_groups)
        self.deferred = self.zero_stage is None and accelerator.scaler is None and fused
        self.hold_after_refusal = False
        self.frozen: dict[str, torch.Tensor | None] = {}
        self._average: MovingAverage | None = None
        self._stepped = False  # whether the last step was taken (or it is refused on the device)
        self._stateless = False  # whether the optimizer has taken a step and keeps no state
        self._held = torch.zeros((), dtype=torch.bool, device=accelerator.device)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate gradients; with the last micro-batch of a step they are averaged over the ranks."""
        if self.zero_stage is not None:
            self.model.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
            if self._scaled_by_deepspeed:
                start_with_scale(loss, zero_optimizer(self.optimizer))
            self.model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]
            return
        scaler = self.accelerator.scaler
        (scaler.scale(loss) if scaler is not None else loss).backward()

    def forward_context(self, is_last: bool) -> Any:
        """Where forward and backward of a micro-batch run: DDP and FSDP2 exchange gradients with the last one only."""
        if self.zero_stage is None and not is_last:
            return self.accelerator.no_sync(self.model)
        return nullcontext()

    def step(self, learning_rate: float, ema_decay: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`take_step`, and then the moving average of the weights: `ema_decay` is its decay at this step, None where
        none is kept. A step that was refused is none for the average either."""
        if ema_decay is None:
            return self.take_step(learning_rate)
        if self._average is None:
            self._average = MovingAverage(self.module, self.optimizer, self.accelerator.process_index)
        before = self._average.begin()
        grad_norm, refused = self.take_step(learning_rate)
        if self._stepped:
            self._average.update(before, ema_decay, refused)
        return grad_norm, refused

    def take_step(self, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, update the weights, clear the gradients; return the norm of the gradients before clipping, and whether
        the step was refused: where the norm is NaN or infinite the weights stay as they are. Scalars on the device,
        the same on every rank. Clipping multiplies the gradients by min(1, max_grad_norm / (norm + 1e-6)).

        Fused optimizers leave weights and moments alone if `found_inf` is 1, as they do for loss scaling, so that the
        host does not wait for the norm. Only a step that makes the optimizer's state is called by the host or not at
        all: SGD would leave the momentum it made uninitialised, and take it for a real one in the next step.
        """
        for group in inner_optimizer(self.optimizer).param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self.zero_stage is not None:
            return self._deepspeed_step()
        for parameter in self._params:  # no gradient is a zero gradient, as ZeRO has it: moments and decay go on
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        scaler, optimizer = self.accelerator.scaler, inner_optimizer(self.optimizer)
        if scaler is not None:
            scaler.unscale_(optimizer)
        grad_norm = self._clip()
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

    def _deepspeed_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        zero, device = zero_optimizer(self.optimizer), self.accelerator.device
        if hasattr(zero, "_global_grad_norm") or hasattr(zero, "scaled_global_norm"):
            zero.check_grad_overflow = True  # bf16 too
            try:
                with norm_scale_of_step(zero) if self._scaled_by_deepspeed else nullcontext(1.0) as scale:
                    self.model.step()  # type: ignore[operator]
            except Exception as error:  # DeepSpeed (0.19.8) has no class of its own for it
                if "minimum" not in str(error) or "scale" not in str(error):
                    raise
                what, hint = "no gradient is finite at fp16's smallest loss scale", "train in bf16"
                raise TrainingError(what, where="DeepSpeed", hint=f"{hint}, or lower the learning rate") from None
            norm = torch.as_tensor(self.model.get_global_grad_norm(), device=device) / scale  # type: ignore[operator]
            self._stepped = not bool(zero.overflow)
            return norm, torch.as_tensor(not self._stepped, device=device)
        grad_norm = self._clip()  # ZeRO-0 in fp32 is a plain optimizer, which reports no norm
        refused = ~torch.isfinite(grad_norm)
        self._stepped = not bool(refused)
        if self._stepped:
            self.model.step()  # type: ignore[operator]
        else:
            for parameter in self._params:
                parameter.grad = None
        return grad_norm, refused

    def _clip(self) -> torch.Tensor:
        norm = gradient_norm(self._params, is_fsdp(self.accelerator))
        if self._max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._params, self._max_grad_norm, norm)
        return norm


def prepare_engine(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    max_grad_norm: float,
) -> Engine:
    """Wrap model and optimizer for the world that was launched. `max_grad_norm`: 0 for no clipping.

    Raises ConfigError for shapes of parameters and for settings that the engine does not support.
    """
    stage = zero_stage(accelerator)
    check_fp8(stage, accelerator.mixed_precision)
    _check_shapes(accelerator, model)
    if stage is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = layout.per_device
        settings["gradient_accumulation_steps"] = layout.accumulation
        settings["train_batch_size"] = layout.per_device * layout.accumulation * layout.world_size
        plain = stage == 0 and accelerator.mixed_precision == "no"
        settings["gradient_clipping"] = 0.0 if plain else max_grad_norm
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
        settings.setdefault("zero_allow_untested_optimizer", True)
        settings.setdefault("steps_per_print", 10**9)
        fit_sizes(settings["zero_optimization"], model)
        use_exact_norms()
    model.train()
    rounds = stage is not None and accelerator.mixed_precision != "no"
    # The tensors themselves, not copies: DeepSpeed puts others in their place.
    weights = {name: p.detach() for name, p in model.named_parameters()} if rounds else None
    if stage == 3:
        fit_buffers(settings, model, layout.world_size, _DTYPES[accelerator.mixed_precision])
        partition(model, settings, _DTYPES[accelerator.mixed_precision])
    prepare = partial(shard, accelerator) if is_fsdp(accelerator) else accelerator.prepare
    with _deepspeed_errors() if stage is not None else nullcontext():
        wrapped, wrapped_optimizer = prepare(model, optimizer)
    engine = Engine(accelerator, wrapped, wrapped_optimizer, max_grad_norm)
    check_alignment(zero_optimizer(engine.optimizer))
    if weights is not None:  # DeepSpeed makes its fp32 weights from half precision ones: put the exact ones back
        set_weights(engine.module, engine.optimizer, accelerator.process_index, weights)
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                engine.frozen[name] = weights[name] if accelerator.is_main_process else None
    return engine


def _check_shapes(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Raise ConfigError for a parameter that the engine cannot divide: one without dimensions, or with ZeRO-3 without
    elements, trained or not."""
    stage = zero_stage(accelerator)
    if stage is None and not is_fsdp(accelerator):
        return
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0 or (stage == 3 and parameter.numel() == 0):
            what = f"{engine_name(accelerator)} cannot hold {name}, of shape {list(parameter.shape)}"
            hint = "train with DDP (launch/accelerate/multi_gpu.yaml)"
            raise ConfigError(what, where=type(model).__name__, hint=hint)


@contextmanager
def _deepspeed_errors() -> Iterator[None]:
    """Raise ConfigError for settings that DeepSpeed refuses only once it has model and optimizer."""
    try:
        yield
    except Exception as error:
        if type(error) not in (AssertionError, NotImplementedError, ValueError, Exception):  # it raises these
            raise
        what, hint = f"it refuses these settings ({error})", "correct the DeepSpeed configuration"
        raise ConfigError(what, where="DeepSpeed", hint=hint) from error


def check_fp8(stage: int | None, precision: str) -> None:
    """Raise ConfigError for fp8 with ZeRO-3: torchao replaces layers, whose weights are divided by then."""
    if stage == 3 and precision == "fp8":
        hint = "use bf16, or another engine: ZeRO-1, ZeRO-2, DDP"
        raise ConfigError("fp8 does not go together with ZeRO-3", where="--precision", hint=hint)


def fit_sizes(zero: dict[str, Any], model: Any) -> None:
    """Make the sizes in DeepSpeed's settings fit a model: leave those that are `auto` to DeepSpeed if the architecture
    has no `hidden_size` (perceiver), from which accelerate would work them out; and allocate no bucket for gradients
    that is larger than the model."""
    if not (hasattr(model.config, "hidden_size") or hasattr(model.config, "hidden_sizes")):
        for name in FILLED:
            if zero.get(name) == "auto":
                del zero[name]
    if isinstance(zero.get("reduce_bucket_size"), int):
        whole = sum(parameter.numel() for parameter in model.parameters())
        zero["reduce_bucket_size"] = max(1, min(zero["reduce_bucket_size"], whole))


def uses_offload(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed keeps the optimizer in host memory."""
    if zero_stage(accelerator) is None:
        return False
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return settings.get("offload_optimizer", {}).get("device", "none") != "none"


def loss_scale_state(engine: Engine) -> dict[str, int | float] | None:
    """Return what fp16 training must remember of its loss scale; None in other precisions."""
    if engine.accelerator.mixed_precision != "fp16":
        return None
    if engine.accelerator.scaler is not None:
        return dict(engine.accelerator.scaler.state_dict())
    scaler = _zero_loss_scaler(engine)
    return {key: value for key in _ZERO_SCALER_FIELDS if (value := getattr(scaler, key, None)) is not None}


def restore_loss_scale(engine: Engine, saved: dict[str, int | float] | None) -> None:
    """Restore what `loss_scale_state` returned, or only the value of a scale that another engine saved. A scale that
    DeepSpeed's settings fix is left unchanged.

    Every value gets the type that a new scaler has it in: torch's kernels refuse 2000.0 for 2000, which is what
    checkpoints of older versions hold.
    """
    if engine.accelerator.mixed_precision != "fp16" or not saved:
        return
    saved = {key: value for key, value in saved.items() if value is not None}
    scale = saved.get("scale", saved.get("cur_scale", 2.0**16))
    if engine.accelerator.scaler is not None:
        fresh = engine.accelerator.scaler.state_dict()
        engine.accelerator.scaler.load_state_dict(
            {**fresh, **{k: type(fresh[k])(v) for k, v in saved.items() if k in fresh}, "scale": float(scale)}
        )
        return
    scaler = _zero_loss_scaler(engine)
    if not (getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)):
        return
    for key in _ZERO_SCALER_FIELDS:
        if key in saved and hasattr(scaler, key):
            setattr(scaler, key, type(getattr(scaler, key))(saved[key]))
    scaler.cur_scale = scale


_ZERO_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _zero_loss_scaler(engine: Engine) -> Any:
    zero = zero_optimizer(engine.optimizer)
    return getattr(zero, "loss_scaler", None) or getattr(zero, "loss_scale_config", None)
