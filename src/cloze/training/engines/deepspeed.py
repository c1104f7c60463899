"""DeepSpeed: ZeRO-0 to ZeRO-3, in fp32, bf16 or fp16, with offload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from cloze.config import TrainConfig
from cloze.data.batches.layout import Layout
from cloze.errors import ConfigError, TrainingError
from cloze.training.engines.base import Engine, Support
from cloze.training.engines.deepspeed_file import report_settings
from cloze.training.engines.deepspeed_schema import FILLED
from cloze.training.engines.gradients import use_exact_norms
from cloze.training.engines.loss_scale import norm_scale_of_step, start_with_scale
from cloze.training.engines.nvme_offload import (
    check_alignment,
    fit_buffers,
    forget_state,
    swapped_part,
    swapped_state,
)
from cloze.training.engines.optimizer_memory import deepspeed_bytes, optimizer_bytes
from cloze.training.engines.precision import PRECISIONS
from cloze.training.engines.sharded_state import Fragment
from cloze.training.engines.zero3 import asked_zero, check_zero, partition
from cloze.utils.environment import requests

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine(Engine):
    """DeepSpeed's optimizer steps fp32 weights of its own; ZeRO-0 in fp32 steps the model's."""

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self._config = accelerator.state.deepspeed_plugin.deepspeed_config
        self.settings = self._config["zero_optimization"]
        self._stage, self._precision = int(self.settings["stage"]), accelerator.mixed_precision
        self.support = _support(self._stage, self._precision)
        self.offloads = self.settings.get("offload_optimizer", {}).get("device", "none") != "none"

    @classmethod
    def requested(cls, deepspeed: str | None) -> bool:
        """Return whether --deepspeed or the launcher asks for DeepSpeed."""
        return deepspeed is not None or requests.wants_deepspeed()

    @classmethod
    def runs(cls, accelerator: Accelerator) -> bool:
        """Return whether accelerate was started with DeepSpeed."""
        return accelerator.distributed_type == DistributedType.DEEPSPEED

    @classmethod
    def requested_support(cls, deepspeed: str | None, precision: str) -> Support:
        """Return what the requested stage supports."""
        return _support(int((asked_zero(deepspeed) or {}).get("stage", 0)), precision)

    @classmethod
    def check_request(cls, config: TrainConfig, on_gpu: bool) -> None:
        """Check the DeepSpeed configuration, and what its stage needs of this machine."""
        report_settings(config, on_gpu)
        check_zero(config.deepspeed, on_gpu)

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, layout: Layout, max_grad_norm: float
    ) -> Engine:
        """Wrap model and optimizer. DeepSpeed copies its fp32 weights from rounded ones; restore the exact ones."""
        # The tensors themselves, not copies: DeepSpeed replaces them.
        weights = {name: p.detach() for name, p in model.named_parameters()} if self._precision != "no" else None
        super().prepare(model, optimizer, layout, max_grad_norm)
        check_alignment(self.zero)
        if weights is not None:
            self.set_weights(weights)
            for name, parameter in self.module.named_parameters():
                if not parameter.requires_grad:
                    self.frozen[name] = weights[name] if self.rank == 0 else None
        return self

    def wrap(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, layout: Layout) -> tuple[Any, Any]:
        """Complete DeepSpeed's settings, divide the model under ZeRO-3, and start DeepSpeed."""
        settings = self._config
        settings["train_micro_batch_size_per_gpu"] = layout.per_device
        settings["gradient_accumulation_steps"] = layout.accumulation
        settings["train_batch_size"] = layout.per_device * layout.accumulation * layout.world_size
        plain = self._stage == 0 and self._precision == "no"
        settings["gradient_clipping"] = 0.0 if plain else self._max_grad_norm
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
        settings.setdefault("zero_allow_untested_optimizer", True)
        settings.setdefault("steps_per_print", 10**9)
        fit_sizes(settings["zero_optimization"], model)
        use_exact_norms()
        if self._stage == 3:
            fit_buffers(settings, model, layout.world_size, _DTYPES[self._precision])
            partition(model, settings, _DTYPES[self._precision])
        with _deepspeed_errors():
            return self.accelerator.prepare(model, optimizer)

    def can_hold(self, parameter: torch.nn.Parameter) -> bool:
        """Return whether a parameter has dimensions, and with ZeRO-3 elements."""
        return parameter.ndim > 0 and (self._stage != 3 or parameter.numel() > 0)

    @property
    def zero(self) -> Any:
        """Return DeepSpeed's own optimizer inside accelerate's wrapper."""
        wrapped = type(self.optimizer).__module__.startswith("accelerate.")
        return self.optimizer.optimizer if wrapped else self.optimizer

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate gradients; DeepSpeed averages them, and multiplies the loss by fp16's loss scale."""
        self.model.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
        if self._precision == "fp16":
            start_with_scale(loss, self.zero)
        self.model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def take_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step with DeepSpeed, which clips; ZeRO-0 in fp32 is a plain optimizer that reports no norm."""
        zero, device = self.zero, self.accelerator.device
        if hasattr(zero, "_global_grad_norm") or hasattr(zero, "scaled_global_norm"):
            zero.check_grad_overflow = True  # bf16 too
            try:
                with norm_scale_of_step(zero) if self._precision == "fp16" else nullcontext(1.0) as scale:
                    self.model.step()  # type: ignore[operator]
            except Exception as error:  # DeepSpeed (0.19.8) raises a plain Exception
                if "minimum" not in str(error) or "scale" not in str(error):
                    raise
                what, hint = "no gradient is finite at fp16's smallest loss scale", "train in bf16"
                raise TrainingError(what, where="DeepSpeed", hint=f"{hint}, or lower the learning rate") from None
            norm = torch.as_tensor(self.model.get_global_grad_norm(), device=device) / scale  # type: ignore[operator]
            self._stepped = not bool(zero.overflow)
            return norm, torch.as_tensor(not self._stepped, device=device)
        grad_norm = self.clip()
        refused = ~torch.isfinite(grad_norm)
        self._stepped = not bool(refused)
        if self._stepped:
            self.model.step()  # type: ignore[operator]
        else:
            for parameter in self.params:
                parameter.grad = None
        return grad_norm, refused

    @property
    def partitioned(self) -> bool:  # type: ignore[override]
        """Return whether each rank holds only a part of the training state: ZeRO-1 and up."""
        return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in self.module.parameters())

    def locate(self, name: str, parameter: Any) -> Fragment | None:
        """Return the location of this rank's part of a parameter's fp32 weight, in memory or on a disk."""
        where = self._locate(parameter)
        return where and Fragment(name, self.shape_of(parameter), *where, swapped_state(self.zero, where[2]))

    def _locate(self, parameter: Any) -> tuple[int, int, torch.Tensor, int] | None:
        """Return (offset in the parameter, length, owner, start in the owner)."""
        zero = self.zero
        if hasattr(parameter, "ds_id"):  # ZeRO-3: every parameter in equal pieces, the last ones padded
            group, start, piece = zero.grad_position[zero.get_param_id(parameter)]
            offset = self.rank * parameter.ds_tensor.ds_numel
            length = min(piece, parameter.ds_numel - offset)
            return offset, length, zero.fp32_partitioned_groups_flat[group], start
        if hasattr(parameter, "_hp_mapping"):  # ZeRO-1/2, and ZeRO-1 in bf16 (DeepSpeed's BF16_Optimizer)
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            groups = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
            owner = groups[mapping.param_group_index]
            lp, hp = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            return lp.start, lp.numel, owner, hp.start
        if hasattr(zero, "fp16_groups") and hasattr(zero, "fp32_groups"):  # ZeRO-0 in bf16 or fp16: whole fp32 copies
            for half, full in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
                for low, high in zip(half, full, strict=True):
                    if low is parameter:
                        return 0, high.numel(), high, 0
        return 0, parameter.numel(), parameter, 0

    def shape_of(self, parameter: Any) -> tuple[int, ...]:
        """Return the parameter's shape, also if ZeRO-3 has released its elements."""
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Release the parameters that ZeRO-3 has prefetched before the block runs: a forward pass without a backward
        pass leaves some, and DeepSpeed refuses to gather those. Every rank calls it."""
        zero = self.zero
        if not hasattr(zero, "checkpoint_event_prologue"):  # DeepSpeed calls it before its own checkpoints
            yield
            return
        zero.checkpoint_event_prologue()
        yield
        zero.checkpoint_event_epilogue()

    def whole(self, parameter: Any) -> torch.Tensor:
        """Return the full value of a parameter, which ZeRO-3 gathers."""
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def refresh(self, parameter: Any, full: torch.Tensor) -> None:
        """Set the copy that the model computes with, under ZeRO-3 this rank's part of it."""
        if not hasattr(parameter, "ds_id"):
            super().refresh(parameter, full)
            return
        part = swapped_part(parameter)
        offset = min(self.rank * part.numel(), full.numel())
        own = full.reshape(-1)[offset : offset + part.numel()]
        part.zero_()
        part[: own.numel()].copy_(own)
        parameter.ds_secondary_tensor = None  # recompute ZeRO++'s second partition from the new weights
        if parameter.data.numel() == parameter.ds_numel:  # small parameters are kept whole as well
            parameter.data.copy_(full.view(parameter.data.shape))

    def forget(self) -> None:
        """Forget the optimizer's state, in memory and on a disk."""
        super().forget()
        forget_state(self.zero)

    @property
    def _scaler(self) -> Any:
        return getattr(self.zero, "loss_scaler", None) or getattr(self.zero, "loss_scale_config", None)

    def read_loss_scale(self) -> dict[str, int | float]:
        """Return the values of DeepSpeed's scaler."""
        return {key: value for key in _SCALER_FIELDS if (value := getattr(self._scaler, key, None)) is not None}

    def write_loss_scale(self, saved: dict[str, int | float], scale: float) -> None:
        """Set the values of DeepSpeed's scaler. A scale that the settings fix is left unchanged."""
        scaler = self._scaler
        if not (getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)):
            return
        for key in _SCALER_FIELDS:
            if key in saved and hasattr(scaler, key):
                setattr(scaler, key, type(getattr(scaler, key))(saved[key]))
        scaler.cur_scale = scale

    def bytes_to_come(self, elements: int, moments: int) -> int:
        """Return the bytes of a rank's optimizer tensors and fp32 weights, and under ZeRO-3 of the gradients."""
        if self.offloads and self.accelerator.device.type != "cpu":
            return 0
        whole = int(optimizer_bytes(elements, moments, self._stage, self._precision != "no"))
        whole += 4 * elements * (self._stage == 3)
        return whole if self._stage == 0 else -(-whole // self.world_size)

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes held, found by walking through DeepSpeed's objects."""
        return deepspeed_bytes(self.zero, self.inner, list(self.module.parameters()))


def _support(stage: int, precision: str) -> Support:
    """Return what a ZeRO stage supports. Under ZeRO-3 the layers' weights are divided and gathered in hooks: torchao
    cannot replace the layers for fp8, and torch.compile breaks graphs at the hooks."""
    return Support(
        f"DeepSpeed ZeRO-{stage}",
        precisions=tuple(name for name in PRECISIONS if stage != 3 or name != "fp8"),
        whole_parameters=stage == 0 and precision == "no",
        whole_model=stage != 3,
        compiles="backbone" if stage != 3 else None,
    )


@contextmanager
def _deepspeed_errors() -> Iterator[None]:
    """Raise ConfigError for settings that DeepSpeed rejects only once it has model and optimizer."""
    try:
        yield
    except Exception as error:
        if type(error) not in (AssertionError, NotImplementedError, ValueError, Exception):  # what DeepSpeed raises
            raise
        what, hint = f"it refuses these settings ({error})", "correct the DeepSpeed configuration"
        raise ConfigError(what, where="DeepSpeed", hint=hint) from error


def fit_sizes(zero: dict[str, Any], model: Any) -> None:
    """Fit the sizes in DeepSpeed's settings to a model. Leave `auto` sizes to DeepSpeed if the architecture has no
    `hidden_size` (perceiver), from which accelerate computes them. Limit gradient buckets to the size of the model."""
    if not (hasattr(model.config, "hidden_size") or hasattr(model.config, "hidden_sizes")):
        for name in FILLED:
            if zero.get(name) == "auto":
                del zero[name]
    if isinstance(zero.get("reduce_bucket_size"), int):
        whole = sum(parameter.numel() for parameter in model.parameters())
        zero["reduce_bucket_size"] = max(1, min(zero["reduce_bucket_size"], whole))
