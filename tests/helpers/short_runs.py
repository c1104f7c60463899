"""Short runs and their curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed

SHORT = ["--max_steps", "4", "--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3"]


def train(prepared: Path, folder: Path, engine: str, world_size: int, *more: str) -> list[dict]:
    """Run and give the lines of metrics.jsonl."""
    argv = [
        "train",
        *TINY_MODEL_NO_DROPOUT,
        "--dataset_name",
        str(prepared),
        "--output_dir",
        str(folder / "run"),
        *more,
    ]
    succeed(cloze_ranks(argv, world_size, engine, folder / "log"))
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def curve(lines: list[dict]) -> np.ndarray:
    return np.array([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])
