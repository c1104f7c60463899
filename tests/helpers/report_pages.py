"""Run folders for the report, and what its page contains."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from cloze.tools.report.gather import gather_runs
from cloze.tools.report.page import render

CONFIG = {
    "model_type": "roberta",
    "learning_rate": 2e-5,
    "max_steps": 60,
    "output_dir": "/home/me/runs/x",
    "dataset_name": "/home/me/prepared",
    "deepspeed": "/home/me/zero2.json",
    "token": "hf_secret",
    "run_name": "host-17",
    "optim_args": None,
}
DATA = {
    "block_size": 128,
    "packing": "concat",
    "checksum": "0123456789abcdef0123456789abcdef",
    "tokenizer": {"name": "/home/me/tokenizers/mine", "vocab_size": 50265},
    "source": {"dataset_name": "/home/me/corpus.jsonl", "split": "train", "text_field": "text"},
    "splits": {"train": {"documents": 4000, "tokens": 900000, "blocks": 7031}},
}
SCORES = {
    "perplexity": 6.5,
    "perplexity_interval": [6.1, 6.9],
    "loss": 1.871802,
    "masked_accuracy": 0.61,
    "masked_tokens": 1234,
    "blocks": 99,
    "split": "validation",
    "mlm_probability": 0.15,
    "seed": 42,
    "draws": 1,
    "data_checksum": "abc",
    "bands": {
        "the 100 most frequent": {"loss": 0.5, "masked_accuracy": 0.875, "masked_tokens": 1000},
        "the next 900": {"loss": 2.0, "masked_tokens": 234},
        "all others": {"loss": None, "masked_tokens": 0},
    },
}
SESSIONS = [
    {"first_step": 0, "ranks": 1, "hosts": 1, "devices": {"AMD EPYC": 1}, "engine": "single process"},
    {"first_step": 20, "ranks": 8, "hosts": 2, "devices": {"NVIDIA H100": 8}, "engine": "DeepSpeed ZeRO-2",
     "precision": "bf16", "versions": {"torch": "2.99"}},
]  # fmt: skip


def lines_of(steps: int = 60, every: int = 5, offset: float = 0.0) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 8.4, "eval_perplexity": 4412.8, "eval_masked_accuracy": 0}]
    for step in range(every, steps + 1, every):
        lines.append(
            {
                "step": step,
                "epoch": step / 30,
                "samples_seen": step * 8,
                "loss": 8.0 - step / 20 + offset + 0.3 * math.sin(step),
                "learning_rate": 1e-3 * step / steps,
                "grad_norm": 1.0 + 0.5 * math.cos(step),
                "seconds": 2.0,
                "tokens_per_second": 1000.0 + step,
                "mfu": None,
                "memory_gib": 0.5,
            }
        )
        if step % 20 == 0:
            loss = 8.0 - step / 20 + offset
            lines.append({"step": step, "eval_loss": loss, "eval_perplexity": math.exp(loss)})
    return lines


def make_run(folder: Path, lines: Any = None, **files: Any) -> Path:
    """A run's folder; `files`: config, data, scores, sessions, in place of the ones above."""
    folder.mkdir(parents=True)
    told = lines_of() if lines is None else lines
    text = told if isinstance(told, str) else "".join(json.dumps(line) + "\n" for line in told)
    (folder / "metrics.jsonl").write_text(text)
    contents = {"config": CONFIG, "data": DATA, "scores": SCORES, "sessions": {"sessions": SESSIONS}} | files
    names = {"config": "config.yaml", "data": "data.json", "scores": "eval.json", "sessions": "sessions.json"}
    for key, name in names.items():
        if contents[key] is not None:
            (folder / name).write_text(json.dumps(contents[key]))
    (folder / "checkpoint-40").mkdir()
    (folder / "checkpoint-40" / "weights.safetensors").write_bytes(bytes(12_345))
    return folder


def page_of(*folders: Path) -> str:
    return render(gather_runs([str(one) for one in folders]))


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def curve_of(page: str, chart: str, kind: str, run: int = 0) -> dict[str, Any]:
    (found,) = (one for one in data_of(page)["charts"] if one["name"] == chart)
    return next(one for one in found["curves"] if (one["run"], one["kind"]) == (run, kind))
