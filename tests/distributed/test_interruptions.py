"""Asked to stop, in any phase, however often: one checkpoint, a code a scheduler can read, the same run after."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from corpus import TINY_MODEL, make_prepared
from ranks import Outcome, at_call, cloze_ranks, sent, succeed

from cloze.checkpoint.format import verify_checkpoint

FLAGS = [*TINY_MODEL, "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3"]
FLAGS += ["--eval_strategy", "steps", "--eval_steps", "3", "--per_device_train_batch_size", "2"]


def flags(prepared: Path, output: Path, *more: str) -> list[str]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    return ["train", *FLAGS, *where, *more]


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    succeed(cloze_ranks(flags(prepared, folder / "run"), 2, "zero2", folder / "log"))
    return folder / "run"


def metrics(run: Path) -> list[tuple]:
    """What is the same in two runs of all lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        tuple(
            (k, v)
            for k, v in line.items()
            if k
            not in (
                "tokens_per_second",
                "masked_tokens_per_second",
                "tflops",
                "mfu",
                "memory_gib",
                "seconds",
                "data_wait",
            )
        )
        for line in lines
    ]


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    names = sorted(path.name for path in (one / "checkpoint-6").glob("*.safetensors"))
    assert len(names) == 4
    for name in names:
        assert filecmp.cmp(one / "checkpoint-6" / name, other / "checkpoint-6" / name, shallow=False), name
    assert not [path.name for path in other.glob("checkpoint-*") if path.suffix]


PHASES = {
    "loading": ("cloze.training.setup", "load_state", 1),
    "training": ("cloze.training.trainer", "masked_loss_sum", 3),
    "evaluating": ("cloze.evaluation.perplexity", "score_batch", 2),
    "saving": ("cloze.training.checkpointing.saver", "write_tensors", 1),
}


def interrupted(run: Path, outcomes: list[Outcome], code: int = 75) -> Path:
    """Check that all ranks stopped as they should; the checkpoint they speak of."""
    codes = [outcome.code for outcome in outcomes]
    assert set(codes) in ({code}, {75, code}), outcomes[0].output + outcomes[1].output
    lines = [line for line in outcomes[0].output.splitlines() if line.startswith("cloze: ")]
    assert len(lines) == 1, lines
    assert "is saved, resume with --resume_from_checkpoint auto" in lines[0]
    name = next(word for word in lines[0].split() if word.startswith("checkpoint-"))
    verify_checkpoint(run / name)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "stopped"
    return run / name


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))],
    ids=lambda n: n.name,
)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_one_rank_in_any_phase(prepared: Path, whole: Path, tmp_path: Path, phase: str, number: int):
    """It comes twice; the second does no harm."""
    argv, run = flags(prepared, tmp_path / "run"), tmp_path / "run"
    if phase == "loading":
        before = at_call("cloze.training.trainer", "train_step", 4, sent(signal.SIGUSR1))
        assert interrupted(run, cloze_ranks(argv, 2, "zero2", tmp_path / "a", before)).name == "checkpoint-4"
    module, name, call = PHASES[phase]
    outcomes = cloze_ranks(argv, 2, "zero2", tmp_path / "b", at_call(module, name, call, sent(number, number)))
    saved = interrupted(run, outcomes, 130 if number == signal.SIGINT else 75)
    expected = {"loading": 5, "training": 3, "evaluating": 3, "saving": 3}[phase]
    assert saved.name == f"checkpoint-{expected}"
    succeed(cloze_ranks(argv, 2, "zero2", tmp_path / "c"))
    assert_same_run(whole, run)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"


def test_ctrl_c_twice_stops_at_once(prepared: Path, whole: Path, tmp_path: Path):
    """While a rank hangs: nobody can agree on anything, and the second Ctrl-C does not wait for it."""
    argv, run = flags(prepared, tmp_path / "run"), tmp_path / "run"

    def press_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.3)
        time.sleep(100)

    begin = time.monotonic()
    outcomes = cloze_ranks(
        argv, 2, "zero2", tmp_path / "a", at_call("cloze.training.trainer", "train_step", 4, press_twice)
    )
    assert outcomes[1].code == 130
    assert "interrupted twice" in outcomes[1].output
    assert time.monotonic() - begin < 60
    verify_checkpoint(run / "checkpoint-2")
    succeed(cloze_ranks(argv, 2, "zero2", tmp_path / "b"))
    assert_same_run(whole, run)


def test_a_signal_while_the_corpus_is_prepared(tmp_path: Path):
    """There is nothing to agree on yet: it ends at once, and what is finished is kept."""
    corpus = make_prepared(tmp_path / "made").parent
    argv = ["train", *FLAGS, "--dataset_name", str(corpus / "corpus.jsonl"), "--text_field", "answers.text"]
    argv += ["--tokenizer_name", str(corpus / "tokenizer"), "--prepared_cache_dir", str(tmp_path / "cache")]
    argv += ["--output_dir", str(tmp_path / "run"), "--eval_strategy", "no", "--num_proc", "1"]
    before = at_call("cloze.data.prepare.pipeline", "do_units", 1, sent(signal.SIGTERM), rank=0)
    outcomes = cloze_ranks(argv, 1, "ddp", tmp_path / "a", before)
    assert outcomes[0].code == 75
    assert "SIGTERM: stopped before training began" in outcomes[0].output
    assert "Traceback" not in outcomes[0].output
    succeed(cloze_ranks(argv, 1, "ddp", tmp_path / "b"))


def test_a_signal_while_waiting_for_a_rank_that_is_gone(prepared: Path, tmp_path: Path):
    """The processes cannot join: a request to stop ends the one that waits, long before the time-out."""
    argv = flags(prepared, tmp_path / "run")

    def leave_or_get_a_signal() -> None:
        if os.environ["RANK"] == "1":
            os._exit(0)
        joining = at_call("cloze.training.setup", "start", 1, later, rank=0)
        joining()

    def later() -> None:
        threading.Timer(2.0, sent(signal.SIGTERM)).start()

    begin = time.monotonic()
    outcomes = cloze_ranks(argv, 2, "zero2", tmp_path / "log", leave_or_get_a_signal, timeout=60)
    assert outcomes[0].code == 75, outcomes[0].output
    assert "SIGTERM: stopped while waiting for other processes to join" in outcomes[0].output
    assert time.monotonic() - begin < 45


def test_the_end_of_a_slurm_jobs_time(prepared: Path, whole: Path, tmp_path: Path):
    """SLURM tells the job when it ends; the run stops before, with a checkpoint."""
    argv, run = flags(prepared, tmp_path / "run"), tmp_path / "run"

    def in_a_job() -> None:
        os.environ |= {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": str(int(time.time()) + 100)}

    outcomes = cloze_ranks([*argv, "--save_before_time_limit", "200"], 2, "zero2", tmp_path / "a", in_a_job)
    assert interrupted(run, outcomes).name == "checkpoint-1"
    assert "the job's time ends in 200 s: stopped after step 1" in outcomes[0].output
    succeed(cloze_ranks([*argv, "--save_before_time_limit", "50"], 2, "zero2", tmp_path / "b", in_a_job))
    assert_same_run(whole, run)


def test_consolidating_stops_without_leaving_anything(whole: Path, tmp_path: Path):
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    before = at_call("cloze.export.consolidation.model_folder", "write_weights", 1, sent(signal.SIGTERM), rank=0)
    outcomes = cloze_ranks(["consolidate", str(tmp_path)], 1, "ddp", tmp_path / "log", before)
    assert outcomes[0].code == 75
    assert "Traceback" not in outcomes[0].output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "log"]
    succeed(cloze_ranks(["consolidate", str(tmp_path)], 1, "ddp", tmp_path / "log"))
    assert (tmp_path / "model" / "model.safetensors").is_file()
