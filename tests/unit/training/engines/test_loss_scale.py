"""What fp16 training remembers of its loss scale is put back, by torch's scaler and by DeepSpeed's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler
from manifests import CHECKPOINT

from cloze.checkpoint.schema import check_manifest
from cloze.training.engines.base import Engine
from cloze.training.engines.ddp import DDPEngine
from cloze.training.engines.deepspeed import DeepSpeedEngine


@pytest.fixture(autouse=True)
def rank_for_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's scaler asks for the rank of its process group before it logs an overflow."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)


def engine_with(kind: type[Engine], precision: str, scaler: torch.amp.GradScaler | None, optimizer: object) -> Engine:
    """Return an engine that has nothing but a loss scale."""
    engine = kind.__new__(kind)
    engine.accelerator, engine.optimizer = SimpleNamespace(mixed_precision=precision, scaler=scaler), optimizer
    return engine


def with_torch(scaler: torch.amp.GradScaler, precision: str = "fp16") -> Engine:
    return engine_with(DDPEngine, precision, scaler, None)


def with_deepspeed(scaler: DynamicLossScaler) -> Engine:
    return engine_with(DeepSpeedEngine, "fp16", None, SimpleNamespace(loss_scaler=scaler))


def with_zero0(config: LossScaleConfig) -> Engine:
    return engine_with(DeepSpeedEngine, "fp16", None, SimpleNamespace(loss_scale_config=config))


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
    with_torch(fresh).restore_loss_scale(with_torch(used).loss_scale_state())
    assert fresh.state_dict() == used.state_dict()
    assert fresh.state_dict()["_growth_tracker"] == 3


def test_deepspeeds_scaler_goes_on_as_if_it_had_not_stopped():
    used, fresh = used_deepspeed_scaler(), deepspeed_scaler(2.0**4)
    saved = with_deepspeed(used).loss_scale_state()
    with_deepspeed(fresh).restore_loss_scale(saved)
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
    with_torch(to_torch).restore_loss_scale(with_deepspeed(used_deepspeed_scaler()).loss_scale_state())
    assert to_torch.get_scale() == used_deepspeed_scaler().cur_scale != 2.0**16
    with_deepspeed(to_deepspeed).restore_loss_scale(with_torch(used_torch_scaler()).loss_scale_state())
    assert to_deepspeed.cur_scale == 2.0**15


def test_zero_0_takes_over_a_scale_and_passes_it_on():
    used, fresh, again = used_deepspeed_scaler(), zero0_scale(), deepspeed_scaler()
    with_zero0(fresh).restore_loss_scale(with_deepspeed(used).loss_scale_state())
    assert (fresh.cur_scale, fresh.cur_iter, fresh.last_overflow_iter) == (2.0**15, 5, 1)
    with_deepspeed(again).restore_loss_scale(with_zero0(fresh).loss_scale_state())
    assert (again.cur_scale, again.cur_iter, again.last_overflow_iter) == (2.0**15, 5, 1)


@pytest.mark.parametrize("fixed", [with_zero0(zero0_scale(128.0)), with_deepspeed(LossScaler(128.0))])
def test_a_fixed_scale_is_stored_without_null_and_never_changes(fixed: SimpleNamespace):
    saved = fixed.loss_scale_state()
    assert saved["cur_scale"] == 128.0
    assert None not in saved.values()
    fixed.restore_loss_scale(with_deepspeed(used_deepspeed_scaler()).loss_scale_state())
    assert fixed.loss_scale_state() == saved
    dynamic = deepspeed_scaler()
    with_deepspeed(dynamic).restore_loss_scale(saved)
    assert (dynamic.cur_scale, dynamic.last_overflow_iter) == (128.0, -1)


def test_a_fixed_scale_with_null_from_an_older_version_is_read():
    saved = {"cur_scale": 128, "cur_iter": 3, "last_overflow_iter": None}
    check_manifest(CHECKPOINT | {"loss_scale": saved})
    for engine, scaler in ((with_deepspeed, deepspeed_scaler()), (with_zero0, zero0_scale())):
        engine(scaler).restore_loss_scale(saved)
        assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (128, 3, -1)


def test_a_checkpoint_of_another_precision_leaves_the_scale_as_it_is():
    scaler = torch_scaler()
    with_torch(scaler).restore_loss_scale(None)
    with_torch(scaler).restore_loss_scale({})
    with_torch(scaler, "bf16").restore_loss_scale({"scale": 2.0})
    assert scaler.get_scale() == 2.0**16
    assert with_torch(scaler, "bf16").loss_scale_state() is None


@pytest.mark.parametrize("number", [3, 3.0])
def test_numbers_that_json_has_made_floats_get_their_types_back(number: float):
    scaler = torch_scaler()
    with_torch(scaler).restore_loss_scale({"scale": 2**10, "_growth_tracker": number, "growth_interval": 5.0})
    state = scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"], state["growth_interval"]) == (2.0**10, 3, 5)
    assert [type(state[key]) for key in ("scale", "_growth_tracker", "growth_interval")] == [float, int, int]
