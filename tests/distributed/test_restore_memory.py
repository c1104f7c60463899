"""Loading a checkpoint takes, on every rank, its own share plus one tensor: measured, where ranks and engines are not
those that wrote it."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import cloze_ranks, in_fresh_process, succeed

# 4 layers, 18 M parameters of which the embeddings are 8.2 M: 33 MB is the largest tensor.
WIDE = ["--model_type", "roberta", "--config_overrides"]
WIDE += ["hidden_size=512,num_hidden_layers=3,num_attention_heads=8,intermediate_size=2048,vocab_size=16000"]
LARGEST, PARAMETERS = 16000 * 512, 18_000_000
FLAGS = [*WIDE, "--max_steps", "1", "--per_device_train_batch_size", "3", "--logging_steps", "1"]
M_MMAP_THRESHOLD = -3  # malloc.h
SLACK = 20e6  # the checkpoint's description, chunks of checksums, pieces below 1 MB


def measured(folder: Path) -> Callable[[], None]:
    """To be called in a rank: write down how much memory `load_state` took at the highest."""

    def install() -> None:
        from cloze.training import setup
        from cloze.utils.memory import PeakMemory

        ctypes.CDLL(None).mallopt(
            M_MMAP_THRESHOLD, 1 << 20
        )  # what is freed goes back to the system, and is not counted
        plain = setup.load_state

        def load_state(training, pieces):
            with PeakMemory() as peak:
                found = plain(training, pieces)
            (folder / f"memory-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak.grown))
            return found

        setup.load_state = load_state

    return install


def resume(argv: list[str], world_size: int, engine: str, folder: Path) -> None:
    succeed(cloze_ranks(argv, world_size, engine, folder / "log", measured(folder)))


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    argv = ["train", *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(folder / "run")]
    succeed(cloze_ranks(argv, 2, "zero3", folder / "log"))
    return folder / "run"


@pytest.mark.parametrize(("engine", "world_size"), [("zero3", 3), pytest.param("zero2", 2, marks=pytest.mark.slow)])
def test_a_rank_needs_its_share_and_one_tensor(prepared, run: Path, tmp_path: Path, engine, world_size, figure):
    argv = ["train", *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(run)]
    argv += ["--resume_from_checkpoint", "auto"]
    in_fresh_process(resume, argv, world_size, engine, tmp_path)
    share = 2 * 4 * PARAMETERS / world_size  # two moments; the weights have their place already
    for rank in range(world_size):
        grown = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        figure(f"loading on {world_size} ranks of {engine}: MB above a rank's share of 18 M parameters' moments",
               (grown - share) / 1e6)  # fmt: skip
        assert grown < share + 4 * LARGEST + SLACK
