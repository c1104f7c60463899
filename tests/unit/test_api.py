"""`import cloze` in a notebook: the commands as functions, and a kernel that is left as it was."""

from __future__ import annotations

import doctest
import gc
import inspect
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from corpus import TINY_CALL as TINY
from ranks import cloze_ranks, succeed

import cloze
from cloze.config import TrainConfig
from cloze.config.commands import COMMANDS
from cloze.config.parser import from_values, parse
from cloze.errors import ConfigError
from cloze.tools.api import functions

COMMAND_NAMES = [name for name in cloze.__all__ if name in COMMANDS]


def losses(run: cloze.Run) -> list[float]:
    return [line["loss"] for line in run.metrics]


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> cloze.Run:
    """A run with a checkpoint and without a consolidated model."""
    return cloze.train(dataset_name=prepared, output_dir=tmp_path_factory.mktemp("api") / "run", **TINY)


def test_import_cloze_loads_nothing_beside_the_standard_library():
    script = (
        "import sys\nbefore = set(sys.modules)\nimport cloze\n"
        "print(*[name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names])\n"
        "cloze.train, cloze.Run\n"
        "print({'torch', 'transformers', 'accelerate', 'jsonargparse'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cloze\nset()\n", "")


def test_no_module_of_the_package_has_the_name_of_a_function():
    """The import system sets a submodule as an attribute of its package, in the place of the function."""
    folder = Path(cloze.__file__).parent
    assert {path.stem for path in folder.iterdir()} & set(cloze.__all__) == set()
    assert type(cloze) is type(sys)


def test_every_name_of_the_package_is_there_and_says_what_it_is():
    for name in cloze.__all__:
        assert inspect.getdoc(getattr(cloze, name)), name
        assert name in dir(cloze)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cloze.trian  # noqa: B018


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_a_function_takes_the_flags_of_its_command(name: str):
    parameters = inspect.signature(getattr(cloze, name)).parameters
    flags = inspect.signature(COMMANDS[name][0]).parameters
    assert set(parameters) - set(flags) == {"config"} | ({"num_processes"} if name == "train" else set())
    assert set(flags) <= set(parameters)
    for flag in flags:
        assert parameters[flag].default == flags[flag].default


def test_values_are_what_the_same_flags_on_the_command_line_are(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 7\nlr_scheduler_type: cosine\noutput_dir: there\nmodel_type: bert\n")
    values = {"config": recipe, "output_dir": tmp_path, "bf16": True, "learning_rate": 1e-5, "model_type": None}
    values |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "torch_compile": "auto", "use_cpu": False, "max_steps": 3}
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--bf16", "--learning_rate", "1e-5"]
    argv += ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--max_steps", "3", "--model_type", "null"]
    assert from_values("train", values) == parse(["train", *argv])[1]
    assert from_values("train", values) == TrainConfig(
        output_dir=str(tmp_path), seed=7, lr_scheduler_type="cosine", bf16=True, learning_rate=1e-5, max_steps=3,
        lr_scheduler_kwargs={"num_cycles": 2},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"learning_rat": 1e-4}, "cloze train: unknown option learning_rat; did you mean learning_rate?"),
        ({"max_seq_length": 128}, "cloze train: unknown option max_seq_length; use --block_size"),
        ({"eval_strategy": "sometimes"}, "sometimes; see cloze train --help"),
        ({"learning_rate": "fast"}, "fast"),
        ({"max_steps": [1]}, "cloze train: max_steps cannot be [1]"),
        ({"seed": None}, "cloze train: seed cannot be None"),
        ({"mlm_probability": 2.0}, "--mlm_probability"),
        ({"dataset_name": "nowhere"}, "nowhere: no such folder"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"num_processes": 0}, "num_processes: must be at least 1"),
    ],
)
def test_what_cannot_be_used_is_a_line_without_a_wall(prepared: Path, tmp_path: Path, values: dict, expected: str):
    """Neither a traceback through the library nor an end of the kernel."""
    with pytest.raises(cloze.ClozeError) as caught:
        cloze.train(**{"dataset_name": prepared, "output_dir": tmp_path / "run", **TINY, **values})
    assert expected in str(caught.value)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert len([frame for frame in frames if "cloze" in frame.filename and "test_api" not in frame.filename]) <= 3
    assert caught.value._render_traceback_() == [f"cloze: error: {caught.value}"]
    assert not (tmp_path / "run").exists()


def test_positions_are_few():
    with pytest.raises(ConfigError, match=r"cloze\.evaluate: .*by position: model, data"):
        cloze.evaluate("model", "data", "validation")


class Kernel:
    """What a process has one of."""

    def __init__(self) -> None:
        self.values = {
            "handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
            "wakeup": signal.set_wakeup_fd(-1),
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
            "environment": dict(os.environ),
            "filters": list(warnings.filters),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "fill": torch.utils.deterministic.fill_uninitialized_memory,
            "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
            "threads": torch.get_num_threads(),
            "accelerate": {name: id(value) for name, value in AcceleratorState._shared_state.items()},
            "group": torch.distributed.is_initialized(),
            "folder": os.getcwd(),
        }
        signal.set_wakeup_fd(self.values["wakeup"])


@pytest.mark.parametrize("has_own", [False, True], ids=["", "that has an Accelerator"])
def test_training_leaves_the_kernel_as_it_was(prepared: Path, tmp_path: Path, run: cloze.Run, has_own: bool):
    own = Accelerator(cpu=True, gradient_accumulation_steps=3) if has_own else None
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    threads, before = set(threading.enumerate()), Kernel()
    again = cloze.train(dataset_name=prepared, output_dir=tmp_path / "run", full_determinism=True, **TINY)
    assert Kernel().values == before.values
    for _ in range(50):  # the loader's thread ends with its next look
        if set(threading.enumerate()) <= threads:
            break
        time.sleep(0.1)
    assert set(threading.enumerate()) <= threads
    assert losses(again) == losses(run)
    cloze.evaluate(again, prepared, use_cpu=True)
    assert Kernel().values == before.values
    assert own is None or own.gradient_state.num_steps == own.gradient_accumulation_steps == 3


def test_a_run_in_a_notebook_is_the_run_of_the_command_line(prepared: Path, tmp_path: Path, run: cloze.Run):
    flags = {"dataset_name": prepared, "output_dir": tmp_path / "run", **TINY}
    argv = ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    succeed(cloze_ranks(argv, 1, "single", tmp_path / "log"))
    assert losses(cloze.Run(tmp_path / "run")) == losses(run)


def press_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Ctrl-C in the middle of a step, so many seconds in a row."""
    from cloze.training import trainer

    plain = trainer.train_step

    def pressed(run: Any, batch: Any) -> Any:
        if batch.global_step == step - 1:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1.2 if times > 1 else 0.05)
        return plain(run, batch)

    monkeypatch.setattr(trainer, "train_step", pressed)


def test_ctrl_c_saves_a_checkpoint_and_the_same_call_goes_on(
    prepared: Path, tmp_path: Path, run: cloze.Run, monkeypatch: pytest.MonkeyPatch
):
    flags = {"dataset_name": prepared, "output_dir": tmp_path / "run", **TINY}
    before = Kernel()
    with monkeypatch.context() as patch:
        press_at(patch, step=4)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted: stopped after step 4.*checkpoint-4 is saved"):
            cloze.train(**flags)
    assert Kernel().values == before.values
    stopped = cloze.Run(tmp_path / "run")
    assert (stopped.status, stopped.checkpoints[-1].name) == ("stopped", "checkpoint-4")
    assert losses(cloze.train(**flags, resume_from_checkpoint="auto")) == losses(run)
    assert stopped.status == "finished"


def test_a_second_ctrl_c_does_not_wait_and_does_not_end_the_kernel(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    press_at(monkeypatch, step=5, times=2)
    before = Kernel()
    with pytest.raises(KeyboardInterrupt, match="interrupted twice"):
        cloze.train(dataset_name=prepared, output_dir=tmp_path / "run", **TINY)
    assert Kernel().values == before.values
    assert [path.name for path in cloze.Run(tmp_path / "run").checkpoints] == ["checkpoint-3"]


def test_an_error_that_a_notebook_remembers_does_not_hold_the_model(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from cloze.training import trainer

    models = []

    def refuse(run: Any, batch: Any) -> Any:
        models.append(weakref.ref(run.engine.module))
        raise ConfigError("no")

    monkeypatch.setattr(trainer, "train_step", refuse)
    with pytest.raises(ConfigError) as caught:
        cloze.train(dataset_name=prepared, output_dir=tmp_path / "run", **TINY)
    gc.collect()
    assert caught.value.what == "no"
    assert [model() for model in models] == [None]


def test_training_outside_of_the_main_thread_says_what_to_do(prepared: Path, tmp_path: Path):
    found: list[BaseException] = []

    def call() -> None:
        try:
            cloze.train(dataset_name=prepared, output_dir=tmp_path / "run", **TINY)
        except cloze.ClozeError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert [str(error) for error in found] == [
        "cloze.train: training listens to signals, which only the main thread can; give num_processes=1"
    ]


def test_a_run_is_evaluated_filled_and_consolidated_as_it_is(prepared: Path, run: cloze.Run):
    measured = cloze.evaluate(run, prepared)
    assert measured.interval[0] < measured.perplexity < measured.interval[1]
    assert 0 <= measured.masked_accuracy <= 1
    text = "One <mask> two [MASK] three."
    answers = cloze.fill(run, text, top_k=2)
    assert [score for score, _, _ in answers[:2]] == sorted((a.score for a in answers[:2]), reverse=True)
    assert [a.text for a in answers[:2]] == [f"One {a.token} two [MASK] three." for a in answers[:2]]
    assert [a.text for a in answers[2:]] == [f"One <mask> two {a.token} three." for a in answers[2:]]
    model = cloze.consolidate(run)
    assert model == run / "model"
    assert cloze.evaluate(model, data=prepared).perplexity == pytest.approx(measured.perplexity, rel=1e-6)
    assert cloze.fill(model, text, top_k=2) == answers
    assert cloze.evaluate(run, prepared, metric="pll").perplexity > 1


def test_results_say_what_they_are(prepared: Path, run: cloze.Run, tmp_path: Path):
    folder = cloze.Prepared(prepared, {"block_size": 32, "splits": {"train": {"blocks": 1200}}})
    assert repr(folder) == f"Prepared('{prepared}': blocks of 32 tokens: train 1,200)"
    assert os.fspath(folder) == str(prepared)
    assert repr(run) == f"Run('{run.folder}': finished, step 6, loss {losses(run)[-1]:.4f})"
    values = {"perplexity": 4.05, "perplexity_interval": [3.76, 4.37], "masked_accuracy": 0.68, "masked_tokens": 3774}
    assert repr(cloze.Evaluation(values)) == (
        "Evaluation(perplexity 4.0500 (95 %: 3.7600 to 4.3700), masked accuracy 0.6800, 3,774 masked tokens)"
    )
    with pytest.raises(ConfigError, match="holds no run"):
        cloze.Run(tmp_path)


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(functions).failed == 0
    assert doctest.testmod(functions).attempted == 2


@pytest.mark.slow
def test_type_checkers_see_the_flags_and_the_results(tmp_path: Path):
    file = tmp_path / "notebook.py"
    file.write_text(
        "import cloze\n"
        "run = cloze.train('recipe.yaml', output_dir='x', max_steps=3, num_processes=2)\n"
        "reveal_type(run)\nreveal_type(cloze.fill(run, 'a <mask>')[0].token)\n"
        "cloze.train(output_dir='x', learning_rat=1)\n"
        "cloze.evaluate(run, draws='many')\n"
    )
    done = subprocess.run([sys.executable, "-m", "mypy", str(file)], capture_output=True, text=True)
    lines = [line.removeprefix(f"{file}:") for line in done.stdout.splitlines()]
    assert lines[0] == '3: note: Revealed type is "cloze.checkpoint.run_folder.Run"'
    assert lines[1] == '4: note: Revealed type is "str"'
    assert lines[2].startswith('5: error: Unexpected keyword argument "learning_rat" for "train"; did you mean')
    assert any(line.startswith('6: error: Argument "draws" to "evaluate" has incompatible type') for line in lines)


def test_a_run_is_evaluated_on_its_own_validation_split_by_default(
    prepared: Path, run: cloze.Run, capsys: pytest.CaptureFixture
):
    assert cloze.evaluate(run, use_cpu=True).values == cloze.evaluate(run, prepared, use_cpu=True).values
    assert f"{prepared}, which {run.folder} was trained on" in capsys.readouterr().out
