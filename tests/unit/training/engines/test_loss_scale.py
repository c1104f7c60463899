"""What fp16 training remembers of its loss scale is put back, by torch's scaler and by DeepSpeed's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler
from manifests import CHECKPOINT

from cloze.checkpoint.schema import check_manifest
from cloze.training.engines.engine import loss_scale_state, restore_loss_scale


@pytest.fixture(autouse=True)
def rank_for_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's scaler asks for the rank of its process group before it logs an overflow."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)


def with_torch(scaler: torch.amp.GradScaler, precision: str = "fp16") -> SimpleNamespace:
    """What the two functions use of an engine that runs without DeepSpeed."""
    return SimpleNamespace(accelerator=SimpleNamespace(mixed_precision=precision, scaler=scaler), optimizer=None)


def with_deepspeed(scaler: DynamicLossScaler) -> SimpleNamespace:
    """What the two functions use of an engine of DeepSpeed."""
    accelerator = SimpleNamespace(mixed_precision="fp16", scaler=None)
    return SimpleNamespace(accelerator=accelerator, optimizer=SimpleNamespace(loss_scaler=scaler))


def with_zero0(config: LossScaleConfig) -> SimpleNamespace:
    """Return what the two functions use of a ZeRO-0 engine."""
    accelerator = SimpleNamespace(mixed_precision="fp16", scaler=None)
    return SimpleNamespace(accelerator=accelerator, optimizer=SimpleNamespace(loss_scale_config=config))


def zero0_scale(fixed: float = 0.0) -> LossScaleConfig:
    dynamic = {"init_scale": 2.0**4, "scale_window": 5, "min_scale": 1.0}
    return LossScaleConfig(torch.float16, fixed == 0.0, fixed, dynamic)


def torch_scaler(**values) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**16, "growth_interval": 5, **values})


def deepspeed_scaler(scale: float = 2.0**16) -> DynamicLossScaler:
    return DynamicLossScaler(
        scale, scale_window=5, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False, dtype=torch.half
    )


def used_torch_scaler() -> torch.amp.GradScaler:
    """A scaler after one overflow and three good steps."""
    scaler = torch_scaler()
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for factor in (float("inf"), 1.0, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler


def used_deepspeed_scaler() -> DynamicLossScaler:
    """A scaler after two overflows, of which the second halves the scale, and three good steps."""
    scaler = deepspeed_scaler()
    for overflow in (True, True, False, False, False):
        scaler.update_scale(overflow)
    return scaler


def test_torchs_scaler_goes_on_as_if_it_had_not_stopped():
    used, fresh = used_torch_scaler(), torch_scaler()
    assert used.get_scale() == 2.0**15
    restore_loss_scale(with_torch(fresh), loss_scale_state(with_torch(used)))
    assert fresh.state_dict() == used.state_dict()
    assert fresh.state_dict()["_growth_tracker"] == 3


def test_deepspeeds_scaler_goes_on_as_if_it_had_not_stopped():
    used, fresh = used_deepspeed_scaler(), deepspeed_scaler(2.0**4)
    saved = loss_scale_state(with_deepspeed(used))
    restore_loss_scale(with_deepspeed(fresh), saved)
    for overflow in (False, False, True, True, True):
        used.update_scale(overflow)
        fresh.update_scale(overflow)
        assert (fresh.cur_scale, fresh.cur_iter, fresh.cur_hysteresis) == (
            used.cur_scale,
            used.cur_iter,
            used.cur_hysteresis,
        )


def test_another_engines_scale_is_taken_over():
    to_torch, to_deepspeed = torch_scaler(), deepspeed_scaler()
    restore_loss_scale(with_torch(to_torch), loss_scale_state(with_deepspeed(used_deepspeed_scaler())))
    assert to_torch.get_scale() == used_deepspeed_scaler().cur_scale != 2.0**16
    restore_loss_scale(with_deepspeed(to_deepspeed), loss_scale_state(with_torch(used_torch_scaler())))
    assert to_deepspeed.cur_scale == 2.0**15


def test_zero_0_takes_over_a_scale_and_passes_it_on():
    used, fresh, again = used_deepspeed_scaler(), zero0_scale(), deepspeed_scaler()
    restore_loss_scale(with_zero0(fresh), loss_scale_state(with_deepspeed(used)))
    assert (fresh.cur_scale, fresh.cur_iter, fresh.last_overflow_iter) == (2.0**15, 5, 1)
    restore_loss_scale(with_deepspeed(again), loss_scale_state(with_zero0(fresh)))
    assert (again.cur_scale, again.cur_iter, again.last_overflow_iter) == (2.0**15, 5, 1)


@pytest.mark.parametrize("fixed", [with_zero0(zero0_scale(128.0)), with_deepspeed(LossScaler(128.0))])
def test_a_fixed_scale_is_stored_without_null_and_never_changes(fixed: SimpleNamespace):
    saved = loss_scale_state(fixed)
    assert saved["cur_scale"] == 128.0
    assert None not in saved.values()
    restore_loss_scale(fixed, loss_scale_state(with_deepspeed(used_deepspeed_scaler())))
    assert loss_scale_state(fixed) == saved
    dynamic = deepspeed_scaler()
    restore_loss_scale(with_deepspeed(dynamic), saved)
    assert (dynamic.cur_scale, dynamic.last_overflow_iter) == (128.0, -1)


def test_a_fixed_scale_with_null_from_an_older_version_is_read():
    saved = {"cur_scale": 128, "cur_iter": 3, "last_overflow_iter": None}
    check_manifest(CHECKPOINT | {"loss_scale": saved})
    for engine, scaler in ((with_deepspeed, deepspeed_scaler()), (with_zero0, zero0_scale())):
        restore_loss_scale(engine(scaler), saved)
        assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (128, 3, -1)


def test_a_checkpoint_of_another_precision_leaves_the_scale_as_it_is():
    scaler = torch_scaler()
    restore_loss_scale(with_torch(scaler), None)
    restore_loss_scale(with_torch(scaler), {})
    restore_loss_scale(with_torch(scaler, "bf16"), {"scale": 2.0})
    assert scaler.get_scale() == 2.0**16
    assert loss_scale_state(with_torch(scaler, "bf16")) is None


@pytest.mark.parametrize("number", [3, 3.0])
def test_numbers_that_json_has_made_floats_get_their_types_back(number: float):
    scaler = torch_scaler()
    restore_loss_scale(with_torch(scaler), {"scale": 2**10, "_growth_tracker": number, "growth_interval": 5.0})
    state = scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"], state["growth_interval"]) == (2.0**10, 3, 5)
    assert [type(state[key]) for key in ("scale", "_growth_tracker", "growth_interval")] == [float, int, int]
