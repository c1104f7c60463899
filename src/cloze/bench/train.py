"""`cloze bench train`: steps of Cloze beside those of transformers' Trainer and of a bare loop, on the same blocks.

Each peer is a process that waits while another takes its steps, in turns (A B C C B A ...), so that a machine whose
speed drifts slows all of them; ratios are taken turn by turn. Models start from random weights, which cost the same.

On the CPU all take the same batch. With `--gpu` everything runs in bf16, `cloze train` with `--torch_compile false`
and (`compiled`) `true`, and each of `cloze train` and Trainer takes the batch at which it is fastest itself; the bare
loop, from which Cloze's `overhead` is counted, and the compiled `cloze train` take the one of `cloze train`.

tokens/s leaves out padding; masked/s is 15 % of the tokens that are not special. With `--output` the table, every
turn and the search for batches are written after each size, so that a run that is cut short keeps what it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cloze.bench.folder import work_folder
from cloze.bench.sizes import Shares, Size, chosen_sizes, make_data, shares_of
from cloze.bench.table import Table
from cloze.bench.turns import OutOfMemory, PeerFailed, Peers, Search, Turn, best_batch
from cloze.config import BenchConfig
from cloze.console import duration, say, warn
from cloze.errors import ConfigError
from cloze.model.flops import peak_flops, step_flops

PEERS = {
    "cloze": "cloze train",
    "bare": "bare PyTorch loop, sparse head",
    "compiled": "cloze train, compiled",
    "trainer": "transformers Trainer",
}
GPU_SIZES = ["distilroberta-128", "distilroberta-512", "roberta-base-512", "roberta-large-512", "modernbert-base-1024"]
CPU_SIZES = ["distilroberta-128"]
CPU_BATCH = 8
CPU_ROUNDS, CPU_STEPS = 5, 5
GPU_ROUNDS, GPU_TURN_SECONDS = 3, 1.0
WARM_UP_STEPS = 2
MLM_PROBABILITY = 0.15
COLUMNS = [
    "what", "blocks", "tokens/s", "masked/s", "step, ms", "fastest", "slowest", "MFU", "GiB", "x Trainer",
    "recompiled",
]  # fmt: skip


@dataclasses.dataclass
class Measured:
    """One peer at one size: its batch, its turns, and how often torch.compile worked after the warm-up."""

    batch: int
    turns: list[Turn]
    graphs_before: int

    @property
    def seconds(self) -> list[float]:
        """Seconds per step of each turn."""
        return [turn.seconds for turn in self.turns]

    @property
    def recompiled(self) -> int:
        """Graphs made after the warm-up."""
        return max((turn.graphs for turn in self.turns), default=self.graphs_before) - self.graphs_before


@dataclasses.dataclass
class Comparison:
    """One size: what each peer did, the searches for their batches, and those that failed, with their last words."""

    name: str
    size: Size
    shares: Shares
    measured: dict[str, Measured] = dataclasses.field(default_factory=dict)
    searches: dict[str, Search] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


def bench_train(config: BenchConfig) -> Table:
    """Measure the sizes that are asked for, and return one table. Raises ConfigError for a size that is not known, and
    for `--gpu` where there is none."""
    if config.gpu and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here", where="--gpu", hint="without --gpu it measures the CPU")
    sizes = chosen_sizes(config, GPU_SIZES if config.gpu else CPU_SIZES)
    device = torch.cuda.get_device_name() if config.gpu else f"CPU, {torch.get_num_threads()} threads"
    table = Table(f"training steps on {device}, {'bf16' if config.gpu else 'fp32'}", COLUMNS)
    table.details = {"gpu": gpu_facts() if config.gpu else None, "sizes": {}}
    begin = time.monotonic()
    with work_folder(config.work_dir) as folder:
        for name, size in sizes.items():
            done = compare(config, name, size, folder / name)
            add_rows(table, done, config.gpu)
            table.details["sizes"][name] = details_of(done)
            table.write(Path(config.output) if config.output else None)
            say("bench", f"{name} is measured; {duration(time.monotonic() - begin)} since the start")
    return table


def compare(config: BenchConfig, name: str, size: Size, folder: Path, search: bool | None = None) -> Comparison:
    """One size: find the batches (`search`; default: on a GPU), warm up, then take turns."""
    prepared = make_data(folder / "data", size, config.packing)
    names = [peer for peer in PEERS if peer != "compiled" or config.gpu]
    settings = {
        "prepared": str(folder / "data"),
        "folder": str(folder),
        "model_type": size.model_type,
        "config_overrides": size.config_overrides,
        "gpu": config.gpu,
    }
    done = Comparison(name, size, shares_of(prepared))
    with Peers(names, settings, config.gpu) as peers:
        for peer in names:
            with _failures(done, peer):
                batch = _batch_for(config, peers, done, peer, config.gpu if search is None else search)
                before = peers.run(peer, batch, WARM_UP_STEPS)
                done.measured[peer] = Measured(batch, [], before.graphs)
                say("bench", f"{name}: {PEERS[peer]}: {batch} blocks of {size.block_size} a step")
        steps = {peer: config.steps or _steps(config.gpu, done, peer) for peer in done.measured}
        for number in range(config.rounds or (GPU_ROUNDS if config.gpu else CPU_ROUNDS)):
            order = list(done.measured)
            for peer in reversed(order) if number % 2 else order:
                with _failures(done, peer):
                    done.measured[peer].turns.append(peers.run(peer, done.measured[peer].batch, steps[peer]))
    return done


@contextlib.contextmanager
def _failures(done: Comparison, peer: str) -> Iterator[None]:
    """Leave out a peer that fails, or whose batch does not fit any more; the others continue."""
    try:
        yield
    except (PeerFailed, OutOfMemory) as error:
        done.failed[peer] = str(error)
        done.measured.pop(peer, None)
        last = (str(error).splitlines() or ["no word"])[-1]
        warn(f"{done.name}: {PEERS[peer]} failed ({type(error).__name__}: {last})")


def _batch_for(config: BenchConfig, peers: Peers, done: Comparison, peer: str, search: bool) -> int:
    if config.per_device_train_batch_size:
        return config.per_device_train_batch_size
    if not search:
        return CPU_BATCH
    if peer in ("compiled", "bare") and "cloze" in done.measured:
        return done.measured["cloze"].batch
    done.searches[peer] = best_batch(peers, peer, done.size.block_size)
    return done.searches[peer].batch


def _steps(gpu: bool, done: Comparison, peer: str) -> int:
    """On a GPU as many as take a second, by the search."""
    search = done.searches.get(peer) or done.searches.get("cloze")
    if not gpu or search is None:
        return CPU_STEPS
    return min(50, max(CPU_STEPS, round(GPU_TURN_SECONDS / search.seconds)))


def add_rows(table: Table, done: Comparison, gpu: bool) -> None:
    """A row for each peer, and one for what Cloze's step takes more than the bare loop's."""
    block_size, peak = done.size.block_size, peak_flops("bf16") if gpu else None
    flops = step_flops(done.size.empty_model(), block_size, block_size, MLM_PROBABILITY)  # of one block
    for peer, label in PEERS.items():
        if peer in done.failed:
            table.add(f"{done.name}: {label}: failed", *[None] * (len(COLUMNS) - 1))
        if peer not in done.measured:
            continue
        one = done.measured[peer]
        step = median(one.seconds)
        places = one.batch * block_size
        mfu = f"{flops * one.batch / step / peak:.1%}" if peak and flops else None
        gain = ratio(done, "trainer", peer)
        table.add(
            f"{done.name}: {label}", one.batch, places * done.shares.real / step,
            places * done.shares.maskable * MLM_PROBABILITY / step, step * 1e3, min(one.seconds) * 1e3,
            max(one.seconds) * 1e3, mfu, max(turn.peak_bytes for turn in one.turns) / 2**30,
            round(median(gain), 3) if gain else None, one.recompiled,
        )  # fmt: skip
    more = ratio(done, "cloze", "bare", per_token=False)
    if more:
        shown = [f"{value - 1:+.1%}" for value in (median(more), min(more), max(more))]
        table.add(f"{done.name}: overhead of cloze train over the bare loop", None, None, None, *shown, *[None] * 4)


def ratio(done: Comparison, slow: str, fast: str, per_token: bool = True) -> list[float]:
    """Turn by turn, how many times as long one took as another, for a token or for a step."""
    if slow not in done.measured or fast not in done.measured:
        return []
    first, second = done.measured[slow], done.measured[fast]
    scale = second.batch / first.batch if per_token else 1.0
    return [scale * ours / theirs for ours, theirs in zip(first.seconds, second.seconds, strict=False)]


def details_of(done: Comparison) -> dict[str, Any]:
    """Everything that was measured, for the JSON file."""
    return {
        "model_type": done.size.model_type,
        "config_overrides": done.size.config_overrides,
        "vocab_size": done.size.vocab_size,
        "block_size": done.size.block_size,
        "shares": dataclasses.asdict(done.shares),
        "peers": {
            peer: {
                "blocks": one.batch,
                "seconds_per_step_of_each_turn": one.seconds,
                "peak_bytes": [turn.peak_bytes for turn in one.turns],
                "recompiled": one.recompiled,
            }
            for peer, one in done.measured.items()
        },
        "tokens_per_second_by_blocks": {peer: search.tried for peer, search in done.searches.items()},
        "overhead_of_each_turn": [value - 1 for value in ratio(done, "cloze", "bare", per_token=False)],
        "failed": done.failed,
    }


def gpu_facts() -> dict[str, Any]:
    """The GPU's name, memory, driver and CUDA version, as torch and the driver's own file tell."""
    properties = torch.cuda.get_device_properties(0)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "peak_bf16_tflops": (peak_flops("bf16") or 0) / 1e12 or None,
    }
