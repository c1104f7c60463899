"""Parameters of shape [1], [] and [0, n] are trained, saved and resumed as any others, by every engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed

from cloze.checkpoint.format import read_manifest

STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-2"]
SHAPES = {"one": (1,), "scalar": (), "empty": (0, 4)}


def with_parameters(*names: str):
    """To be called in a rank: the model's logits pass through parameters of odd shapes."""

    def install() -> None:
        from cloze.training import build_model as run_model

        plain = run_model.build_model

        def build_model(*arguments):
            model, tokenizer = plain(*arguments)
            for name in names:
                model.lm_head.register_parameter(name, torch.nn.Parameter(torch.full(SHAPES[name], 0.5)))
            model.lm_head.register_forward_hook(
                lambda head, _, logits: logits * sum(getattr(head, name).sum() + 0.5 for name in names)
            )
            return model, tokenizer

        run_model.build_model = build_model

    return install


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(prepared: Path, output: Path, engine: str, names: tuple[str, ...], *more: str) -> list[float]:
    world = 1 if engine == "single" else 2
    argv = ["train", *TINY_MODEL_NO_DROPOUT, *STEPS, "--dataset_name", str(prepared), "--output_dir", str(output)]
    argv += ["--per_device_train_batch_size", str(8 // world), *more]
    succeed(cloze_ranks(argv, world, engine, output.with_name(f"{output.name}-log"), with_parameters(*names)))
    return losses(output)


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run without an interruption, with and without parameters of the shapes [] and [0, 4]."""
    folder = tmp_path_factory.mktemp("whole")
    train(prepared, folder / "ddp", "single", tuple(SHAPES))
    train(prepared, folder / "other", "single", ("one",))
    return {"ddp": folder / "ddp", "other": folder / "other"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_run_with_odd_shapes_is_resumed_by_every_engine(prepared: Path, tmp_path: Path, whole, engine: str):
    before = whole["ddp" if engine == "ddp" else "other"]
    names = tuple(SHAPES) if engine == "ddp" else ("one",)
    steps = read_manifest(before / "checkpoint-2")["parameters"]["lm_head.one"]["scalars"]
    assert steps == {"step": 2.0}
    resume = ["--resume_from_checkpoint", str(before / "checkpoint-2")]
    found = train(prepared, tmp_path / "run", engine, names, *resume)
    assert found == pytest.approx(losses(before)[2:], abs=1e-5)
    resume[1] = str(tmp_path / "run" / "checkpoint-4")
    train(prepared, tmp_path / "back", "single", names, *resume)


@pytest.mark.parametrize(
    ("engine", "name", "shape"),
    [("zero2", "scalar", "[]"), ("fsdp2", "scalar", "[]"), ("zero3", "empty", "[0, 4]")],
)
def test_engines_that_cannot_hold_a_shape_say_so(prepared: Path, tmp_path: Path, engine: str, name: str, shape: str):
    argv = ["train", *TINY_MODEL_NO_DROPOUT, *STEPS, "--dataset_name", str(prepared)]
    argv += ["--output_dir", str(tmp_path / "run")]
    outcomes = cloze_ranks(argv, 1, engine, tmp_path / "log", with_parameters(name))
    assert outcomes[0].code == 2
    assert f"lm_head.{name}, of shape {shape}" in outcomes[0].output
    assert "Traceback" not in outcomes[0].output
