"""The device never waits for the host: nothing is read back between log lines, and results come a step late."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import weights_of
from corpus import TINY_MODEL
from poison import poison
from ranks import cloze_ranks, succeed
from torch.utils._python_dispatch import TorchDispatchMode

FLAGS = [*TINY_MODEL, "--max_steps", "8", "--save_steps", "100", "--logging_steps", "100", "--learning_rate", "1e-3"]
FLAGS += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]


class Counting(TorchDispatchMode):
    """A stand-in for a GPU's sync debug mode: counts what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # item(), float(), bool(), int()
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def counting(file: Path):
    """To be called in a rank: what each training step and its place in the log window read back is written down."""

    def install() -> None:
        from cloze.training import trainer

        mode = Counting()
        for name in ("tolist", "numpy", "cpu"):
            plain = getattr(torch.Tensor, name)

            def counted(self, *args, _plain=plain, _name=name, **kwargs):
                if threading.current_thread() is threading.main_thread():  # not the loader's
                    mode.found.append(_name)
                return _plain(self, *args, **kwargs)

            setattr(torch.Tensor, name, counted)
        plain_step, plain_add = trainer.train_step, trainer.Window.add

        def train_step(run, batch):
            mode.found.clear()
            with mode:
                return plain_step(run, batch)

        def add(self, *values):
            with mode:
                plain_add(self, *values)
            with open(file, "a") as lines:
                lines.write(json.dumps(mode.found) + "\n")

        trainer.train_step, trainer.Window.add = train_step, add

    return install


@pytest.mark.parametrize("flags", [[], ["--optim", "sgd"], ["--bf16"]], ids=["adamw", "sgd", "bf16"])
def test_a_step_reads_nothing_back_from_the_device(prepared: Path, tmp_path: Path, flags: list[str]):
    argv = ["train", *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run"), *flags]
    succeed(cloze_ranks([*argv, "--save_strategy", "no"], 1, "ddp", tmp_path / "log", counting(tmp_path / "reads")))
    reads = [json.loads(line) for line in (tmp_path / "reads").read_text().splitlines()]
    # Until the optimizer has a state the host looks at the norm, so that a refused first step leaves none.
    assert reads[0] == ["aten._local_scalar_dense.default"]
    assert reads[1:] == [[]] * 7


def late(then):
    """To be called in a rank: results are read a step late, as on a GPU."""

    def install() -> None:
        from cloze.training import setup

        plain = setup.configure_async_steps

        def configure_async_steps(engine, config):
            plain(engine, config)
            return int(engine.deferred)

        setup.configure_async_steps = configure_async_steps
        then()

    return install


@pytest.mark.parametrize("bad", [pytest.param(4, id=""), pytest.param(5, id="at a save", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["stop", "skip", "rollback"])
def test_a_bad_step_that_is_noticed_late_does_no_harm(prepared: Path, tmp_path: Path, what: str, bad: int):
    """The step after it is on its way before anybody knows: the run ends up as if it had been noticed at once. Before
    a checkpoint everything is known: the one of step 6 is never saved with a step in it that was refused."""
    found = {}
    for name, install in (("late", late(poison(steps=(bad,)))), ("at once", poison(steps=(bad,)))):
        folder = tmp_path / name / "run"
        argv = ["train", *FLAGS, "--save_steps", "3", "--dataset_name", str(prepared), "--output_dir", str(folder)]
        outcomes = cloze_ranks([*argv, "--on_nonfinite", what], 2, "ddp", tmp_path / name / "log", install)
        assert f"loss is nan at step {bad + 1} (rank 1, samples {8 * bad + 6}-{8 * bad + 7})" in outcomes[0].output
        assert [one.code for one in outcomes] == ([2, 2] if what == "stop" else [0, 0]), outcomes[0].output
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
        found[name] = checkpoints, weights_of(folder / checkpoints[-1])
    (names, here), (expected_names, expected) = found["late"], found["at once"]
    assert names == expected_names
    assert all(torch.equal(here[name], expected[name]) for name in expected)
