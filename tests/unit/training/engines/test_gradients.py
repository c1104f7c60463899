"""The norm of the gradient is the exact one, and a step that is refused leaves no trace."""

from __future__ import annotations

import json
import math

import pytest
import torch
from plain_engine import plain_engine

from cloze.config import TrainConfig
from cloze.training.engines.base import Engine
from cloze.training.engines.gradients import gradient_norm, sum_of_squares, use_exact_norms
from cloze.training.optim.optimizers import build_optimizer


def with_gradients(*gradients: torch.Tensor) -> list[torch.nn.Parameter]:
    found = []
    for gradient in gradients:
        found.append(torch.nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype)))
        found[-1].grad = gradient
    return found


def exact(*tensors: torch.Tensor) -> float:
    return math.sqrt(math.fsum(value * value for tensor in tensors for value in tensor.double().flatten().tolist()))


def test_the_norm_is_the_exact_one_where_torchs_own_is_not():
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(300, 3001, generator=generator) * 1e-3
    small = [torch.randn(shape, generator=generator) for shape in ((5,), (1024,), (3, 1025), (0,), (1,), ())]
    wanted = exact(large, *small)
    assert float(gradient_norm(with_gradients(large, *small), divided=False)) == pytest.approx(wanted, rel=2e-7)
    alone = exact(large)
    assert float(sum_of_squares([large]).sqrt()) == pytest.approx(alone, rel=1e-7)
    assert float(sum_of_squares([large.t()]).sqrt()) == pytest.approx(alone, rel=1e-7)
    assert abs(float(torch.nn.utils.get_total_norm([large])) / alone - 1) > 2e-6  # else this is not needed any more


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 1023, 1024, 1025, 2047, 2048, 2049])
def test_the_sum_of_squares_is_right_for_parts_of_any_size_around_rows_of_1024(size: int, dtype: torch.dtype):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(8).round().to(dtype)
    wanted = sum(value * value for value in values.tolist())  # exact for integers
    for cut in {0, 1, size // 2, size - 1, size}:
        found = sum_of_squares([values[:cut], values[cut:].view(1, -1)])
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(wanted, rel=3e-7)
    assert float(sum_of_squares([values[0]])) == pytest.approx(values[0].item() ** 2, rel=3e-7)


def test_the_sum_of_squares_of_fp64_values_is_not_that_of_rounded_ones():
    assert float(sum_of_squares([torch.tensor([1e100, 3.0], dtype=torch.float64)])) == pytest.approx(1e200)


def test_a_parameter_without_a_gradient_does_not_count_in_the_norm():
    parameters = [torch.nn.Parameter(torch.ones(3)), *with_gradients(torch.tensor([3.0]), torch.tensor(4.0))]
    norm = gradient_norm(parameters, divided=False)
    assert (norm.item(), norm.dtype, norm.shape) == (5.0, torch.float32, ())


def test_the_norm_of_a_share_without_elements_is_zero():
    assert sum_of_squares([torch.empty(0), torch.empty(0, 3)]).item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_is_not_finite_if_any_element_is_not(bad: float):
    gradient = torch.ones(5000)
    gradient[4999] = bad
    assert not math.isfinite(float(gradient_norm(with_gradients(torch.ones(3), gradient), divided=False)))


def test_deepspeeds_norms_of_whole_weights_are_exact_too():
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.fp16 import unfused_optimizer

    use_exact_norms()
    large = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = float(large.double().norm())
    assert unfused_optimizer.get_weight_norm([large]) == pytest.approx(wanted, rel=2e-7)
    assert unfused_optimizer.get_weight_norm(large, mpu=None) == pytest.approx(wanted, rel=2e-7)
    assert float(bf16_optimizer.get_global_norm_of_tensors(input_tensors=[large])) == pytest.approx(wanted, rel=2e-7)
    assert unfused_optimizer.get_weight_norm([torch.tensor([math.nan])]) == -1


OPTIMIZERS = {
    "adamw_torch_fused": None,
    "sgd": "momentum=0.9,dampening=0.5",
    "sgd without momentum": None,
    "rmsprop": "momentum=0.9,centered=true",
    "stable_adamw": None,
    "muon": None,
}


def engine_of(optim: str, arguments: str | None) -> Engine:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    model.config = type("Config", (), {"get_text_config": lambda self: None})()
    config = TrainConfig(dataset_name="", output_dir="", optim=optim, optim_args=arguments, weight_decay=0.1)
    optimizer, _ = build_optimizer(model, config, offload=False)
    engine = plain_engine(model, optimizer, max_grad_norm=1.0)
    assert not engine.offloads
    return engine


def take(engine: Engine, seed: int, bad: float | None = None, ema: float | None = None) -> bool:
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if bad is not None:
            parameter.grad.view(-1)[0] = bad
    return bool(engine.step(0.1, ema)[1])


def held(engine: Engine) -> list[torch.Tensor]:
    state = engine.optimizer.state
    found = [p.detach().clone() for p in engine.module.parameters()]
    for p in engine.module.parameters():
        found += [value.clone() for _, value in sorted(state[p].items()) if torch.is_tensor(value)]
    return found


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_run_whose_first_steps_are_refused_is_one_that_never_saw_them(optim: str, ema: float | None):
    plain, disturbed = (engine_of(optim.split(" ")[0], OPTIMIZERS[optim]) for _ in range(2))
    for bad in (math.nan, math.inf):
        assert take(disturbed, 9, bad, ema)
        assert not any(disturbed.optimizer.state.values()), "a refused step made state"
    for seed in (1, 2):
        assert not take(plain, seed, ema=ema)
        assert not take(disturbed, seed, ema=ema)
    assert take(disturbed, 8, math.nan, ema)
    for one, other in zip(held(plain), held(disturbed), strict=True):
        assert torch.equal(one, other)


def test_all_steps_after_a_refused_first_one_are_held_if_the_run_is_to_stop():
    engine = engine_of("sgd", "momentum=0.9")
    engine.hold_after_refusal = True
    before = held(engine)
    assert take(engine, 1, math.nan)
    assert take(engine, 2)
    assert all(torch.equal(one, other) for one, other in zip(before, held(engine), strict=True))


def scaled(scaler: torch.amp.GradScaler) -> Engine:
    engine = engine_of("adamw_torch_fused", None)
    engine.accelerator.scaler = scaler
    engine.accelerator.state._mixed_precision = "fp16"
    engine.deferred = False
    return engine


@pytest.fixture
def fp16_state():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def backward(engine: Engine, factor: float = 1.0) -> bool:
    loss = engine.module(torch.ones(2, 64)).square().sum() * factor
    engine.backward(loss, is_last=True)
    return bool(engine.step(0.1)[1])


@pytest.mark.parametrize("stored", [lambda value: value, float])
def test_a_loss_scale_is_restored_with_its_types(fp16_state, stored):
    """Also from checkpoints that hold every value as a floating-point number."""
    engine = scaled(torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3))
    assert not backward(engine)
    saved = json.loads(json.dumps({key: stored(value) for key, value in engine.loss_scale_state().items()}))
    other = scaled(torch.amp.GradScaler("cpu"))
    other.restore_loss_scale(saved)
    for _ in range(2):
        assert not backward(other)
    assert other.accelerator.scaler.get_scale() == 2.0**11  # the third step since it changed
    assert other.loss_scale_state()["growth_interval"] == 3


def test_a_loss_scale_of_deepspeed_gives_its_value(fp16_state):
    engine = scaled(torch.amp.GradScaler("cpu"))
    engine.restore_loss_scale({"cur_scale": 1024.0, "cur_iter": 7.0})
    assert engine.accelerator.scaler.get_scale() == 1024.0


def test_a_first_step_that_overflows_in_fp16_makes_no_state_and_lowers_the_scale(fp16_state):
    engine = scaled(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert backward(engine, math.inf)
    assert not any(engine.optimizer.state.values())
    assert engine.accelerator.scaler.get_scale() == 2.0**9
    assert not backward(engine)


def test_a_parameter_without_a_gradient_has_a_gradient_of_zero():
    """Its moments decay and its weight does, as under ZeRO, whose flat gradients have zeros there."""
    ran = {}
    for given in (None, 0.0):
        engine = engine_of("adamw_torch_fused", None)
        for number in range(3):
            for index, parameter in enumerate(engine.module.parameters()):
                left_out = number == 1 and index < 2
                parameter.grad = torch.ones_like(parameter) if not left_out else None
                if left_out and given is not None:
                    parameter.grad = torch.zeros_like(parameter)
            engine.step(0.1)
        ran[given] = [parameter.detach().clone() for parameter in engine.module.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(ran[None], ran[0.0], strict=True))
