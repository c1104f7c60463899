"""A run is strict about the same bits, or says which operation stands in the way; `put_` is one on a CPU too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from corpus import TINY_MODEL
from ranks import cloze_ranks

from cloze.training.determinism import operation_without


class _Put(torch.autograd.Function):
    """Identity, by an operation without a deterministic implementation in the backward pass."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone().put_(torch.zeros(1, dtype=torch.long), gradient.reshape(-1)[:1])


def on_gpu_with(puts: Callable[[int], bool]) -> Callable[[], None]:
    """To be called in a rank: `auto` means the same bits, as on a GPU; the model's n-th training pass uses put_ if
    `puts(n)`; each step prints whether torch is strict."""

    def install() -> None:
        from cloze.training import build_model as run_model
        from cloze.training import determinism, prepare_model, trainer

        build, step, passes = run_model.build_model, trainer.train_step, []
        wants = determinism.wants_same_bits

        def build_model(*arguments):
            model, tokenizer = build(*arguments)

            def hook(head, _, logits):
                passes.append(head.training)
                return _Put.apply(logits) if head.training and puts(sum(passes)) else logits

            model.lm_head.register_forward_hook(hook)
            return model, tokenizer

        def train_step(run, batch):
            strict = not torch.is_deterministic_algorithms_warn_only_enabled()
            os.write(1, f"strict: {strict}\n".encode())  # what others print is not shown
            return step(run, batch)

        run_model.build_model, trainer.train_step = build_model, train_step
        determinism.wants_same_bits = prepare_model.wants_same_bits = lambda config, on_gpu: wants(config, True)

    return install


def train(prepared: Path, folder: Path, puts: Callable[[int], bool], *more: str):
    argv = ["train", *TINY_MODEL, "--dataset_name", str(prepared), "--output_dir", str(folder / "run")]
    argv += ["--max_steps", "3", "--save_strategy", "no", *more]
    return cloze_ranks(argv, 1, "single", folder / "log", on_gpu_with(puts))[0]


def test_a_model_of_deterministic_operations_is_trained_strictly(prepared: Path, tmp_path: Path):
    outcome = train(prepared, tmp_path, lambda n: False)
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("strict: True") == 3
    assert "bit-identical" not in outcome.output


def test_an_operation_without_a_deterministic_implementation_is_named(prepared: Path, tmp_path: Path):
    outcome = train(prepared, tmp_path, lambda n: True)
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("not bit-identical because of put_") == 1
    assert outcome.output.count("strict: False") == 3


def test_it_is_refused_before_the_first_step_if_that_is_asked_for(prepared: Path, tmp_path: Path):
    outcome = train(prepared, tmp_path, lambda n: True, "--full_determinism", "true")
    assert outcome.code == 2, outcome.output
    assert "--full_determinism: put_: no deterministic implementation" in outcome.output
    assert "strict:" not in outcome.output


def test_one_that_the_trial_did_not_meet_is_one_line(prepared: Path, tmp_path: Path):
    outcome = train(prepared, tmp_path, lambda n: n > 2)
    assert outcome.code == 2, outcome.output
    assert "put_ has no deterministic implementation here" in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "cumsum_cuda does not have a deterministic implementation, but you set 'torch...",
            "cumsum_cuda",
        ),
        ("Deterministic behavior was enabled with ... but this operation uses CuBLAS and ...", "cuBLAS"),
        ("Flash Attention defaults to a non-deterministic algorithm. To explicitly enable determinism call", None),
    ],
)
def test_what_torch_says_is_understood(text: str, name: str | None):
    assert operation_without(text) == name
