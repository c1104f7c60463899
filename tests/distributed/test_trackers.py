"""What trackers really have of a run: read back from their files, after a failure and a second start.

Each is tried where its package is installed: `pip install wandb mlflow-skinny sqlalchemy alembic trackio`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sqlite3
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed

TOKEN = "hf_secretsecretsecret"
STEPS, FAILS_AT, SAVED_AT = 8, 6, 4

Curve = dict[str, list[tuple[int, float]]]


def environment(folder: Path) -> dict[str, str]:
    return {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TRACKIO_DIR": str(folder / "trackio"),
    }


def argv_of(prepared: Path, folder: Path, tracker: str) -> list[str]:
    return [
        "train", *TINY_MODEL_NO_DROPOUT, "--dataset_name", str(prepared), "--output_dir", str(folder / "run"),
        "--max_steps", str(STEPS), "--save_steps", str(SAVED_AT), "--logging_steps", "1", "--learning_rate", "1e-3",
        "--eval_strategy", "steps", "--eval_steps", "4", "--report_to", tracker, "--run_name", "mine",
        "--token", TOKEN, "--resume_from_checkpoint", "auto",
    ]  # fmt: skip


def before(argv: list[str], folder: Path, end: Callable[[], None] | None) -> Callable[[], None]:
    """What a rank does first: `end` happens when step FAILS_AT is about to begin."""

    def prepare() -> None:
        os.environ |= environment(folder)
        os.chdir(folder)  # some of mlflow's folders are made where one is
        sys.argv = ["cloze", *argv]
        if end is not None:
            from cloze.training import trainer

            plain = trainer.train_step

            def ending(run, batch):
                if batch.global_step == FAILS_AT:
                    end()
                return plain(run, batch)

            trainer.train_step = ending

    return prepare


def fail() -> None:
    raise RuntimeError("broken for the test")


def ask_to_stop() -> None:
    os.kill(os.getpid(), 15)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (7 bytes of header, then blocks of 32 KiB) of protobufs."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def wandb_runs(folder: Path) -> list[list[Any]]:
    files = sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    return [list(wandb_records(path)) for path in files]


def read_wandb(folder: Path) -> tuple[Curve, dict[str, Any], int, str]:
    curve: Curve = {}
    config: dict[str, Any] = {}
    ids, end = set(), ""
    for records in wandb_runs(folder):
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for name, value in items.items():
                    curve.setdefault(name, []).append((items["train/global_step"], value))
            for update in (*record.config.update, *record.run.config.update):
                config[update.key or update.nested_key[0]] = json.loads(update.value_json)
            if record.run.run_id:
                ids.add(record.run.run_id)
                assert (record.run.project, record.run.display_name) == ("huggingface", "mine")
            if record.WhichOneof("record_type") == "exit":
                end = {0: "finished", 1: "failed"}[record.exit.exit_code]
    return curve, config, len(ids), end


def read_mlflow(folder: Path) -> tuple[Curve, dict[str, Any], int, str]:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        runs = store.execute("select name, status from runs").fetchall()
        curve: Curve = {}
        for name, step, value in store.execute("select key, step, value from metrics order by timestamp, step"):
            curve.setdefault(name, []).append((step, value))
        config = dict(store.execute("select key, value from params").fetchall())
    assert {name for name, _ in runs} == {"mine"}
    return curve, config, len(runs), {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[runs[-1][1]]


def read_trackio(folder: Path) -> tuple[Curve, dict[str, Any], int, str]:
    with contextlib.closing(sqlite3.connect(folder / "trackio" / "huggingface.db")) as store:
        curve: Curve = {}
        rows = store.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        for _, _, step, metrics in rows:
            for name, value in json.loads(metrics).items():
                curve.setdefault(name, []).append((step, value))
        config = json.loads(store.execute("select config from configs").fetchone()[0])
    assert {row[1] for row in rows} == {"mine"}
    return curve, config, len({row[0] for row in rows}), ""


def read_tensorboard(folder: Path) -> tuple[Curve, dict[str, Any], int, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "run" / "mine"))
    reader.Reload()
    curve = {tag: [(p.step, p.value) for p in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    stored = list((folder / "run" / "mine").glob("*/hparams.yml"))
    return curve, yaml.safe_load(stored[0].read_text()), len(stored), ""


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


def need(tracker: str) -> None:
    for package in {"mlflow": ("mlflow", "sqlalchemy", "alembic")}.get(tracker, (tracker,)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed, so {tracker} cannot be tried")


@pytest.mark.slow
@pytest.mark.parametrize("tracker", sorted(READERS))
def test_a_failed_run_goes_on_in_the_same_run_of_the_tracker(prepared: Path, tmp_path: Path, tracker: str):
    need(tracker)
    argv, read = argv_of(prepared, tmp_path, tracker), READERS[tracker]
    for outcome in cloze_ranks(argv, 2, "ddp", tmp_path / "log", before(argv, tmp_path, fail)):
        assert "broken for the test" in outcome.output
    assert read(tmp_path)[3] in ("", "failed")
    succeed(cloze_ranks(argv, 2, "ddp", tmp_path / "log2", before(argv, tmp_path, None)))

    curve, config, runs, end = read(tmp_path)
    assert (runs, end) == (1, end and "finished")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name, key in [("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("train/epoch", "epoch"),
                      ("train/learning_rate", "learning_rate"), ("eval/loss", "eval_loss"),
                      ("eval/perplexity", "eval_perplexity")]:  # fmt: skip
        told = {step: pytest.approx(value, rel=1e-6) for step, value in curve[name]}
        assert told == {line["step"]: line[key] for line in lines if key in line}, name
    if tracker == "tensorboard":  # it forgets what comes again
        assert [step for step, _ in curve["train/loss"]] == list(range(1, STEPS + 1))
    assert float(config["learning_rate"]) == 1e-3
    assert "token" not in config
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_stopped_run_is_told_from_a_failed_one(prepared: Path, tmp_path: Path):
    need("wandb")
    need("mlflow")
    argv = argv_of(prepared, tmp_path, "wandb,mlflow")
    outcomes = cloze_ranks(argv, 1, "single", tmp_path / "log", before(argv, tmp_path, ask_to_stop))
    assert [outcome.code for outcome in outcomes] == [75]
    assert read_mlflow(tmp_path)[3] == "stopped"
    kinds = [record.WhichOneof("record_type") for record in wandb_runs(tmp_path)[0]]
    assert "preempting" in kinds
    assert [record.exit.exit_code for record in wandb_runs(tmp_path)[0] if record.WhichOneof("record_type") == "exit"]


@pytest.mark.slow
def test_a_tracker_that_does_not_start_is_one_line_before_training(prepared: Path, tmp_path: Path):
    need("mlflow")
    argv = argv_of(prepared, tmp_path, "mlflow")

    def elsewhere() -> None:
        before(argv, tmp_path, None)()
        os.environ["MLFLOW_TRACKING_URI"] = "nosuch://store"

    outcomes = cloze_ranks(argv, 2, "ddp", tmp_path / "log", elsewhere)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "cloze: error: --report_to: mlflow does not start" in outcomes[0].output
    assert "Traceback" not in outcomes[0].output
