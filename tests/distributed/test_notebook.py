"""The tutorial as a notebook runs it, and several real processes from a notebook, with the losses of the launcher."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import ranks
from accelerate import notebook_launcher
from corpus import TINY_CALL, TINY_MODEL_NO_DROPOUT
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from ranks import cloze_ranks, free_port, succeed, wait_for
from repository import ROOT

import cloze

TUTORIAL = ROOT / "launch" / "tutorial.ipynb"
TINY = {**TINY_CALL, "use_cpu": True}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in cloze.Run(folder).metrics]


def flags(prepared: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {"dataset_name": str(prepared), "output_dir": str(output), **TINY, **more}


def argv(values: dict[str, Any]) -> list[str]:
    return ["train", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


@pytest.fixture
def handlers_restored() -> Iterator[None]:
    """torch's launcher leaves its own."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_restored")
def test_notebook_launcher_gives_the_losses_of_accelerate_launch(prepared: Path, tmp_path: Path):
    """Two forks of this process. Dropout is on: each rank has to be the rank that it is."""
    ranks.warm_up()
    notebook_launcher(
        cloze.train, args=(flags(prepared, tmp_path / "run"),), num_processes=2, use_port=str(free_port())
    )
    succeed(cloze_ranks(argv(flags(prepared, tmp_path / "launched")), 2, "ddp", tmp_path / "log"))
    assert len(losses(tmp_path / "run")) == 6
    assert losses(tmp_path / "run") == losses(tmp_path / "launched")


def test_num_processes_trains_in_processes_of_their_own(prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    """The kernel prints what they say."""
    succeed(cloze_ranks(argv(flags(prepared, tmp_path / "launched")), 2, "ddp", tmp_path / "log"))
    capfd.readouterr()
    run = cloze.train(**flags(prepared, tmp_path / "run"), num_processes=2)
    assert losses(run.folder) == losses(tmp_path / "launched")
    assert "2 ranks on 1 host, DDP, fp32, cpu, gloo" in capfd.readouterr().out
    assert "RANK" not in os.environ


@pytest.mark.slow
def test_deepspeed_never_joins_the_kernel_and_its_errors_come_back_as_one_line(prepared: Path, tmp_path: Path):
    import torch

    settings = {"deepspeed": ROOT / "ds_configs" / "zero2.json", "config_overrides": TINY_MODEL_NO_DROPOUT[3]}
    one = cloze.train(**flags(prepared, tmp_path / "one", **settings))
    two = cloze.train(
        **flags(prepared, tmp_path / "two", **settings) | {"per_device_train_batch_size": 1}, num_processes=2
    )
    assert not torch.distributed.is_initialized()
    for a, b in zip(losses(one.folder), losses(two.folder), strict=True):
        assert abs(a / b - 1) < 1e-5
    with pytest.raises(cloze.ClozeError, match="holds a run already") as caught:
        cloze.train(**flags(prepared, tmp_path / "two"), num_processes=2)
    assert "\n" not in str(caught.value)


INTERRUPTED = """
import json, os, signal, sys, threading, time
import cloze

def press():
    metrics = sys.argv[2] + "/metrics.jsonl"
    while not os.path.exists(metrics) or len(open(metrics).readlines()) < 3:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    flags = json.loads(sys.argv[1])
    threading.Thread(target=press, daemon=True).start()
    try:
        cloze.train(flags, num_processes=2)
    except KeyboardInterrupt as stop:
        print("KeyboardInterrupt:", stop)
    print(repr(cloze.train(flags, num_processes=2, resume_from_checkpoint="auto", hang_timeout=100)))
"""


@pytest.mark.slow
def test_ctrl_c_reaches_processes_of_their_own_which_save_and_end(prepared: Path, tmp_path: Path):
    values = flags(prepared, tmp_path / "run", max_steps=200, save_steps=500)
    script = tmp_path / "cells.py"
    script.write_text(INTERRUPTED)
    words = [sys.executable, str(script), json.dumps(values), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=550)
    assert "KeyboardInterrupt: interrupted: stopped after step" in done.stdout, done.stdout + done.stderr
    assert f"Run('{tmp_path / 'run'}': finished, step 200" in done.stdout
    undisturbed = flags(prepared, tmp_path / "whole", max_steps=200, save_steps=500)
    succeed(cloze_ranks(argv(undisturbed), 2, "ddp", tmp_path / "log"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


AFTER_THREADS = """
import json, sys
import torch
from accelerate import notebook_launcher
import cloze

if __name__ == "__main__":
    torch.set_num_threads(2)
    one, two = map(json.loads, sys.argv[1:3])
    cloze.train(one)                                            # with OpenMP's threads, in this process
    torch.randn(500, 500).requires_grad_().mm(torch.randn(500, 500)).sum().backward()
    notebook_launcher(cloze.train, args=(two,), num_processes=2, use_port=sys.argv[3])
    print(cloze.evaluate(two["output_dir"], two["dataset_name"]))
"""


@pytest.mark.slow
def test_forks_of_a_kernel_that_has_computed_with_threads_do_not_hang(prepared: Path, tmp_path: Path):
    one, two = flags(prepared, tmp_path / "one"), flags(prepared, tmp_path / "two")
    script = tmp_path / "cells.py"
    script.write_text(AFTER_THREADS)
    words = [sys.executable, str(script), json.dumps(one), json.dumps(two), str(free_port())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    succeed(cloze_ranks(argv(two | {"output_dir": str(tmp_path / "launched")}), 2, "ddp", tmp_path / "log"))
    assert losses(tmp_path / "two") == losses(tmp_path / "launched")
    assert "Evaluation(perplexity" in done.stdout


KILLED = """
import json, sys
import cloze

if __name__ == "__main__":
    flags = json.loads(sys.argv[1])
    cloze.train(flags, num_processes=2, hub_token=sys.stdin.readline().strip())
"""


@pytest.mark.slow
def test_a_caller_that_is_killed_leaves_no_token_on_the_disk(prepared: Path, tmp_path: Path):
    """Its processes have the token, in their environment, and end with it; its temporary folder stays."""
    temporary, script, run = tmp_path / "temporary", tmp_path / "cells.py", tmp_path / "run"
    temporary.mkdir()
    script.write_text(KILLED)
    words = [sys.executable, str(script), json.dumps(flags(prepared, run, max_steps=100_000))]
    caller = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(temporary)}, text=True
    )
    caller.stdin.write("hf_planted\n")
    caller.stdin.flush()
    wait_for(lambda: (run / "metrics.jsonl").exists())
    started = psutil.Process(caller.pid).children(recursive=True)
    assert sum("hf_planted" in process.environ().values() for process in started) >= 2
    assert not any("hf_planted" in word for process in started for word in process.cmdline())
    caller.kill()
    caller.wait()
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left
    assert list(temporary.glob("cloze-*/train.yaml"))
    files = [file for folder in (temporary, run) for file in folder.rglob("*") if file.is_file()]
    assert [file for file in files if b"hf_planted" in file.read_bytes()] == []


CHECKED = """
print(json.dumps({"before": before, "perplexity": evaluation.perplexity, "answers": answers,
                  "status": run.status, "shown": repr([prepared, run, evaluation])}))
"""


def cells() -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(TUTORIAL.read_text())["cells"] if cell["cell_type"] == "code"
    ]


@contextlib.contextmanager
def kernel(folder: Path, corpus: str) -> Iterator[tuple[NotebookClient, KernelManager]]:
    """A real Jupyter kernel, with its notebook in `folder`."""
    environment = os.environ | {"CLOZE_TUTORIAL_CORPUS": corpus, "CLOZE_TUTORIAL_FOLDER": str(folder / "tutorial")}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "JUPYTER_RUNTIME_DIR": str(folder / "jupyter")}
    environment |= {"IPYTHONDIR": str(folder / "ipython")}
    if corpus == "galaxies":
        environment["OMP_NUM_THREADS"] = "1"
    client = NotebookClient(
        nbformat.read(TUTORIAL, as_version=4), timeout=3000, resources={"metadata": {"path": folder}}
    )
    manager = client.create_kernel_manager()
    with client.setup_kernel(env=environment):
        yield client, manager


def run_cell(client: NotebookClient, source: str) -> str:
    """Run a cell, and return what it printed."""
    cell = nbformat.v4.new_code_cell(source)
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)
    return "".join(output["text"] for output in cell.outputs if output.output_type == "stream")


def execute(folder: Path, corpus: str) -> dict[str, Any]:
    """Run the notebook as Jupyter does, cell by cell in one kernel."""
    with kernel(folder, corpus) as (client, _):
        begin = time.monotonic()
        for number, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, number)
        print(f"{time.monotonic() - begin:.0f} s")
        outputs = [output for cell in client.nb.cells for output in cell.get("outputs", [])]
        printed = "".join(output.get("text", "") for output in outputs)
        assert "dry run: nothing was sent to my-name/my-first-cloze" in printed
        assert "\x1b[" not in printed  # no view of a terminal
        return json.loads(run_cell(client, CHECKED).splitlines()[-1])


def test_the_tutorial_trains_measures_and_fills_in_a_jupyter_kernel(tmp_path: Path):
    """On the part of the sample corpus that is about galaxies."""
    found = execute(tmp_path, "galaxies")
    assert found["status"] == "finished"
    assert found["perplexity"] < found["before"] / 5
    assert "spiral" in [token for _, token, _ in found["answers"]]
    assert "Prepared(" in found["shown"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_as_it_stands_learns_what_galaxy_the_milky_way_is(tmp_path: Path):
    found = execute(tmp_path, "sample")
    assert found["perplexity"] < 10 < 1000 < found["before"]
    assert found["answers"][0][1:] == ["spiral", "The Milky Way is a spiral galaxy."]


def test_the_tutorial_is_kept_without_outputs_and_can_be_switched_to_the_real_corpus():
    notebook = json.loads(TUTORIAL.read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    for number, cell in enumerate(cells()):
        compile(cell, f"cell {number}", "exec")
    assert 'source = {"preset": "eli5_category"' in "".join(cells())


def test_the_stop_button_of_a_notebook_saves_and_the_same_cell_goes_on(prepared: Path, tmp_path: Path):
    """The kernel is interrupted as Jupyter does it, in the middle of training, and trains on."""
    values = flags(prepared, tmp_path / "run", max_steps=120, save_steps=500)
    call = f"run = cloze.train({values}, resume_from_checkpoint='auto')"
    metrics = tmp_path / "run" / "metrics.jsonl"

    def press(manager: KernelManager) -> None:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            time.sleep(0.02)
        asyncio.run(manager.interrupt_kernel())

    with kernel(tmp_path, "galaxies") as (client, manager):
        run_cell(client, "import cloze")
        threading.Thread(target=press, args=[manager], daemon=True).start()
        with pytest.raises(CellExecutionError, match="interrupted: stopped after step"):
            run_cell(client, call)
        assert 0 < len(losses(tmp_path / "run")) < 120
        assert "resume " in run_cell(client, call)
        run_cell(client, f"cloze.train({values | {'output_dir': str(tmp_path / 'whole')}})")
    assert cloze.Run(tmp_path / "run").status == "finished"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
