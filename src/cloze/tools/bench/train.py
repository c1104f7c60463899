"""`cloze bench train`: steps of Cloze beside those of transformers' Trainer and of a bare loop, on the same blocks.

Each peer is a process that waits while another takes its turn. A turn has one step on the CPU (about 50 ms of them if
they are shorter), and on a GPU at least 5 steps and about half a second. Turns are taken in pairs (`bench.pairs`), and
peers that are compared are neighbours. A row shows the median over turns, or over pairs for a ratio, with its 95 %
interval. `CPU, ms` is the CPU time per step of all threads and loader processes: on an idle machine close to the
step's time multiplied by the cores, and less if other programs use them. On the CPU, ratios of CPU times are shown
too, and all peers run with OMP_WAIT_POLICY=passive unless it is set, so that waiting costs no CPU time. A note names
each figure whose spread is too large to quote it. Models start from random weights, which cost the same.

On the CPU all take the same batch. With `--gpu` everything runs in bf16, `cloze train` with `--torch_compile false`
and (`compiled`) `true`, and each of `cloze train` and Trainer takes the batch at which it is fastest itself; the bare
loop and the compiled `cloze train` take the same batch as `cloze train`.

tokens/s leaves out padding; masked/s is 15 % of the tokens that are not special. With `--output` the table, every
turn and the search for batches are written after each size, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cloze.config import BenchConfig
from cloze.errors import ConfigError
from cloze.model.flops import peak_flops, step_flops
from cloze.tools.bench.folder import work_folder
from cloze.tools.bench.interleave import OutOfMemory, PeerFailed, Peers, Search, Turn, best_batch, peer_environment
from cloze.tools.bench.pairs import Estimate, estimate, ratios, remark, steps_in_turn, turns
from cloze.tools.bench.sizes import Shares, Size, chosen_sizes, make_data, shares_of
from cloze.tools.bench.table import Table
from cloze.utils.terminal.console import duration, progress, say, warn

PEERS = {
    "cloze": "cloze train",
    "bare": "bare PyTorch loop, sparse head",
    "compiled": "cloze train, compiled",
    "trainer": "transformers Trainer",
}
TURN_ORDER = ["bare", "cloze", "trainer", "compiled"]  # peers that are compared are neighbours
RATIOS = {  # (per token or per step, name) -> (numerator, denominator)
    ("token", "Trainer / cloze train"): ("trainer", "cloze"),
    ("token", "Trainer / cloze train, compiled"): ("trainer", "compiled"),
    ("step", "cloze train / bare loop"): ("cloze", "bare"),
}
GPU_SIZES = ["distilroberta-128", "distilroberta-512", "roberta-base-512", "roberta-large-512", "modernbert-base-1024"]
CPU_SIZES = ["distilroberta-128"]
CPU_BATCH = 8
CPU_ROUNDS, GPU_ROUNDS = 15, 6
WARM_UP_STEPS = 2
MLM_PROBABILITY = 0.15
COLUMNS = [
    "what", "blocks", "tokens/s", "masked/s", "step, ms", "95 %, from", "to", "CPU, ms", "MFU", "GiB", "recompiled",
]  # fmt: skip


@dataclasses.dataclass
class Measured:
    """One peer at one size: blocks per step, steps per turn, its turns, and graphs compiled before the first turn."""

    batch: int
    steps: int
    turns: list[Turn]
    graphs_before: int

    @property
    def seconds(self) -> list[float]:
        """Return the seconds per step of each turn."""
        return [turn.seconds for turn in self.turns]

    @property
    def cpu_seconds(self) -> list[float]:
        """Return the CPU seconds per step of each turn."""
        return [turn.cpu_seconds for turn in self.turns]

    @property
    def recompiled(self) -> int:
        """Return the number of graphs compiled after the warm-up."""
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
    for `--gpu` without a GPU."""
    if config.gpu and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here", where="--gpu", hint="without --gpu it measures the CPU")
    sizes = chosen_sizes(config, GPU_SIZES if config.gpu else CPU_SIZES)
    policy = peer_environment(config.gpu).get("OMP_WAIT_POLICY")
    cpu = f"CPU, {torch.get_num_threads()} threads, OMP_WAIT_POLICY={policy}"
    device = torch.cuda.get_device_name() if config.gpu else cpu
    table = Table(f"training steps on {device}, {'bf16' if config.gpu else 'fp32'}", COLUMNS)
    table.details = {"gpu": gpu_facts() if config.gpu else None, "sizes": {}}
    begin = time.monotonic()
    with work_folder(config.work_dir) as folder:
        for name, size in sizes.items():
            done = compare(config, name, size, folder / name)
            add_rows(table, done, config.gpu)
            table.details["sizes"][name] = details_of(done, config.gpu)
            table.write(Path(config.output) if config.output else None)
            say("bench", f"{name} is measured; {duration(time.monotonic() - begin)} since the start")
    return table


def compare(config: BenchConfig, name: str, size: Size, folder: Path, search: bool | None = None) -> Comparison:
    """Compare all loops for one size: find the batches (`search`; default: on a GPU), warm up, then interleave."""
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
                peers.run(peer, batch, WARM_UP_STEPS)
                last = peers.run(peer, batch, 1)
                steps = steps_in_turn(config.gpu, last.seconds)
                done.measured[peer] = Measured(batch, steps, [], last.graphs)
                say("bench", f"{name}: {PEERS[peer]}: steps of {batch} blocks of {size.block_size}, {steps} per turn")
        pairs = config.rounds or (GPU_ROUNDS if config.gpu else CPU_ROUNDS)
        order = list(turns([peer for peer in TURN_ORDER if peer in done.measured], pairs))
        with progress("bench", total=len(order), unit="turns") as advance:
            for peer in order:
                if peer in done.measured:
                    with _failures(done, peer):
                        one = done.measured[peer]
                        one.turns.append(peers.run(peer, one.batch, one.steps))
                advance(1)
    return done


@contextlib.contextmanager
def _failures(done: Comparison, peer: str) -> Iterator[None]:
    """Drop a peer that fails or whose batch no longer fits; continue with the others."""
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


def add_rows(table: Table, done: Comparison, gpu: bool) -> None:
    """Add a row for each peer and each ratio, and a note for each figure that should not be quoted."""
    block_size, peak = done.size.block_size, peak_flops("bf16") if gpu else None
    flops = step_flops(done.size.empty_model(), block_size, block_size, MLM_PROBABILITY)  # of one block
    for peer, label in PEERS.items():
        if peer in done.failed:
            table.add(f"{done.name}: {label}: failed", *[None] * (len(COLUMNS) - 1))
        if peer not in done.measured:
            continue
        one = done.measured[peer]
        step, places = estimate(one.seconds), one.batch * block_size
        mfu = f"{flops * one.batch / step.median / peak:.1%}" if peak and flops else None
        table.add(
            f"{done.name}: {label}", one.batch, places * done.shares.real / step.median,
            places * done.shares.maskable * MLM_PROBABILITY / step.median, *_cells(step, lambda value: value * 1e3),
            median(one.cpu_seconds) * 1e3, mfu, max(turn.peak_bytes for turn in one.turns) / 2**30,
            one.recompiled,
        )  # fmt: skip
        table.notes += remark(f"{done.name}: {label}: step", step, "s", "turns")
    for name, found in ratios_of(done, gpu).items():
        table.add(f"{done.name}: {name}", None, None, None, *_cells(found, "{:.3f} x".format), *[None] * 4)
        table.notes += remark(f"{done.name}: {name}", found, "x")


def _cells(found: Estimate, shown: Callable[[float], Any]) -> list[Any]:
    return [shown(found.median), *(map(shown, found.interval) if found.interval else (None, None))]


def ratios_of(done: Comparison, gpu: bool) -> dict[str, Estimate]:
    """Return the ratios between peers by name: of wall time, and on the CPU also of CPU time."""
    found = {}
    for (unit, name), (slow, fast) in RATIOS.items():
        if slow in done.measured and fast in done.measured:
            one, other = done.measured[slow], done.measured[fast]
            scale = other.batch / one.batch if unit == "token" else 1.0
            found[f"time per {unit}, {name}"] = estimate(ratios(one.seconds, other.seconds, scale))
            if not gpu:
                found[f"CPU time per {unit}, {name}"] = estimate(ratios(one.cpu_seconds, other.cpu_seconds, scale))
    return found


def details_of(done: Comparison, gpu: bool) -> dict[str, Any]:
    """Return all measurements for the JSON file."""
    return {
        "model_type": done.size.model_type,
        "config_overrides": done.size.config_overrides,
        "vocab_size": done.size.vocab_size,
        "block_size": done.size.block_size,
        "shares": dataclasses.asdict(done.shares),
        "peers": {
            peer: {
                "blocks": one.batch,
                "steps_per_turn": one.steps,
                "seconds_per_step_of_each_turn": one.seconds,
                "cpu_seconds_per_step_of_each_turn": one.cpu_seconds,
                "peak_bytes": [turn.peak_bytes for turn in one.turns],
                "recompiled": one.recompiled,
            }
            for peer, one in done.measured.items()
        },
        "tokens_per_second_by_blocks": {peer: search.tried for peer, search in done.searches.items()},
        "ratios": {name: found.as_json() for name, found in ratios_of(done, gpu).items()},
        "failed": done.failed,
    }


def gpu_facts() -> dict[str, Any]:
    """Return the GPU's name, memory, driver and CUDA version, as torch and the driver's own file tell."""
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
