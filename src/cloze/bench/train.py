"""`cloze bench train`: steps of Cloze beside those of transformers' Trainer and of a bare loop, on the same blocks.

Each peer is a process that waits while another takes its steps, in turns (A B C A B C ...), so that a machine whose
speed drifts slows all of them; ratios are taken turn by turn. Models start from random weights, which cost the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch

from cloze.bench.prepare import work_folder
from cloze.bench.table import Table
from cloze.config import BenchConfig, PrepareConfig, TokenizerConfig
from cloze.console import progress, say
from cloze.data.prepare import prepare
from cloze.data.train_tokenizer import train_tokenizer
from cloze.errors import ConfigError
from cloze.model.flops import peak_flops, step_flops
from cloze.model.load import apply_overrides, parse_overrides
from cloze.sample import write_corpus

PEERS = {"cloze": "cloze train", "trainer": "transformers Trainer", "bare": "bare PyTorch loop, sparse head"}
WARM_UP_STEPS = 3
_BASE = "vocab_size=50265,max_position_embeddings=514"
_LARGE = "hidden_size=1024,num_hidden_layers=24,num_attention_heads=16,intermediate_size=4096"


@dataclass(frozen=True)
class Size:
    """A model and a length of block. `gpu_batch`: blocks per step on a GPU."""

    model_type: str
    config_overrides: str
    block_size: int
    gpu_batch: int


SIZES = {
    "distilroberta-128": Size("roberta", f"{_BASE},num_hidden_layers=6", 128, 256),
    "distilroberta-512": Size("roberta", f"{_BASE},num_hidden_layers=6", 512, 64),
    "roberta-base-512": Size("roberta", _BASE, 512, 64),
    "roberta-large-512": Size("roberta", f"{_BASE},{_LARGE}", 512, 32),
    "modernbert-base-1024": Size("modernbert", "vocab_size=50368", 1024, 32),
    "tiny-32": Size("roberta", "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64", 32, 8),
}


def bench_train(config: BenchConfig) -> Table:
    """Measure the sizes that are asked for, and return one table. Raises ConfigError for a size that is not known."""
    on_gpu = torch.cuda.is_available()
    default = [name for name in SIZES if name != "tiny-32"] if on_gpu else ["distilroberta-128"]
    names = [name.strip() for name in config.sizes.split(",")] if config.sizes else default
    unknown = [name for name in names if name not in SIZES]
    if unknown:
        raise ConfigError(f"no size {unknown[0]}", where="--sizes", hint=f"the sizes are: {', '.join(SIZES)}")
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        f"training steps on {device}, {'bf16' if on_gpu else 'fp32'}; {config.rounds} turns of {config.steps} steps",
        ["what", "tokens/s", "min", "max", "step, ms", "MFU", "peak, GiB", "x Trainer"],
    )
    with work_folder(config.work_dir) as folder:
        for name in names:
            measure(config, name, SIZES[name], folder / name, table)
    return table


def measure(config: BenchConfig, name: str, size: Size, folder: Path, table: Table) -> None:
    """One size: a row for each peer."""
    batch = config.per_device_train_batch_size or (size.gpu_batch if torch.cuda.is_available() else 8)
    prepared = make_data(folder, size.block_size)
    settings = {
        "prepared": str(prepared),
        "folder": str(folder),
        "model_type": size.model_type,
        "config_overrides": size.config_overrides,
        "batch": batch,
    }
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    peaks: dict[str, float] = {}
    say("bench", f"{name}: {batch} blocks of {size.block_size} a step")
    with Peers(settings) as peers, progress("bench", total=config.rounds, unit="turns") as advance:
        for peer in PEERS:
            peers.run(peer, WARM_UP_STEPS)
        for _ in range(config.rounds):
            for peer in PEERS:
                found = peers.run(peer, config.steps)
                seconds[peer].append(found["seconds"] / config.steps)
                peaks[peer] = found["peak_bytes"] / 2**30
            advance()
    tokens, flops, peak = batch * size.block_size, _flops(size, batch), peak_flops("bf16")
    for peer, label in PEERS.items():
        times = seconds[peer]
        ratio = median(theirs / ours for theirs, ours in zip(seconds["trainer"], times, strict=True))
        mfu = f"{flops / median(times) / peak:.1%}" if peak else None
        rates = [tokens / one for one in (median(times), max(times), min(times))]
        table.add(f"{name}: {label}", *rates, median(times) * 1e3, mfu, peaks[peer], round(ratio, 3))


def make_data(folder: Path, block_size: int) -> Path:
    """Blocks of the sample corpus, with a tokenizer trained on it."""
    folder.mkdir(parents=True)
    source = {"dataset_name": str(folder / "corpus.jsonl"), "text_field": "answers.text"}
    write_corpus(folder / "corpus.jsonl")
    tokenizer, prepared = str(folder / "tokenizer"), folder / "prepared"
    train_tokenizer(TokenizerConfig(**source, output=tokenizer, vocab_size=4000, model_max_length=block_size))  # type: ignore[arg-type]
    prepare(PrepareConfig(**source, tokenizer_name=tokenizer, output=str(prepared), block_size=block_size))  # type: ignore[arg-type]
    return prepared


def _flops(size: Size, batch: int) -> float:
    from transformers import AutoConfig, AutoModelForMaskedLM

    model_config = AutoConfig.for_model(size.model_type)
    apply_overrides(model_config, parse_overrides(size.config_overrides))
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(model_config)
    return step_flops(model, batch * size.block_size, size.block_size, 0.15) or 0.0


class Peers:
    """The processes of one comparison; they end with the `with` block."""

    def __init__(self, settings: dict[str, Any]):
        self._settings = json.dumps(settings)
        self._running: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Peers:
        for peer in PEERS:
            words = [sys.executable, "-m", "cloze.bench.peers", peer, self._settings]
            log = open(Path(json.loads(self._settings)["folder"]) / f"{peer}.log", "w")
            self._running[peer] = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        return self

    def run(self, peer: str, steps: int) -> dict[str, float]:
        """Let one take so many steps. Raises RuntimeError with its last words where it failed."""
        process = self._running[peer]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("REPORT "):
                return dict(json.loads(line.removeprefix("REPORT ")))
        log = Path(json.loads(self._settings)["folder"]) / f"{peer}.log"
        raise RuntimeError(f"{peer} ended: {log.read_text()[-2000:]}")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()
