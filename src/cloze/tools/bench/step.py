"""`cloze bench step`: measure the parts of one optimizer step of `cloze train`.

    cloze bench step --sizes distilroberta-128
    accelerate launch --config_file launch/accelerate/cpu.yaml -m cloze bench step --sizes tiny-32

It is `cloze train` itself that runs; the parts it works with (loader, backbone, head, engine) are made to note the
time at their beginnings and ends. How each row is measured:

- data: waiting for the loader, and what comes before the forward pass (copies to the device, counts, seeds);
- backbone, head and loss, backward, optimizer (clip and update): wall clock from the end of the part before to the end
  of this one. On a GPU all its work is waited for at every such place (torch.cuda.synchronize), so that the sum is
  more than a step takes when nothing is waited for; that one, measured in turns with it, is the last row;
- communication: the collectives that the loop itself calls, by wall clock, plus what the exchange of gradients adds to
  a step. Under DDP the latter is a difference: normal steps minus steps under `no_sync`, in pairs. So it is the
  time that training waits, not the time that cables are busy: what hides behind the backward pass is not in it. The
  rows above are of steps under `no_sync` then. With DeepSpeed and FSDP2 it cannot be taken apart, and is in the other
  rows;
- rest: everything else: logging, the loop, wrappers.

Figures are medians over steps or pairs (`bench.pairs`), and means over ranks. A turn has one step on the CPU and 5 on
a GPU. A note warns if the last row or the gradient exchange has too large a spread to quote it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cloze.config import BenchConfig, TrainConfig
from cloze.distributed.collectives import gather
from cloze.errors import ConfigError, Stopped
from cloze.tools.bench.folder import work_folder
from cloze.tools.bench.pairs import estimate, remark, steps_in_turn, sums, turns
from cloze.tools.bench.sizes import Size, chosen_sizes, make_data
from cloze.tools.bench.table import Table
from cloze.tools.bench.train import gpu_facts
from cloze.training import trainer

PARTS = ["data", "backbone", "head and loss", "backward", "optimizer", "communication", "rest"]
WARM_UP_STEPS = 3
ROUNDS = 15
GPU_TOKENS = 32_768  # of a step, if no batch is given


class Enough(Stopped):
    """All turns are measured: a clean end, which other ranks do not report as a failure."""


class Clock:
    """Turns of steps: `as it runs`, `apart` (with notes of the time between parts), and under DDP `no exchange`."""

    def __init__(self, rounds: int, steps: int):
        self.rounds, self.steps = rounds, steps
        self.apart: list[dict[str, float]] = []  # seconds of each part, a step each
        self.whole: dict[str, list[float]] = defaultdict(list)  # kind of turn -> seconds per step, a turn each
        self.kind = "warm-up"
        self._left = WARM_UP_STEPS
        self._turns: Iterator[str] = iter(())
        self._run: Any = None
        self._part: dict[str, float] = {}
        self._last = self._begin = 0.0

    def now(self) -> float:
        """Return the time, when everything that was asked for is done."""
        if torch.cuda.is_available() and self._run is not None and self._run.engine.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def note(self, part: str) -> None:
        """Record the time since the last call as time of `part`."""
        if self.kind == "apart":
            now = self.now()
            self._part[part] = self._part.get(part, 0.0) + now - self._last
            self._last = now

    def step_begins(self, run: Any) -> None:
        """End a turn and begin the next, between two steps. Raises Enough after the last one."""
        if self._run is None:
            self._run = run
            kinds = ["as it runs", "apart", *(["no exchange"] if exchanges(run) else [])]
            self._turns = turns(kinds, self.rounds)
            attach(run, self)
        if self.kind == "apart" and self._part:
            self.apart.append(self._part)
            self._part = {}
        if self._left == 0:
            if self.kind in ("as it runs", "no exchange"):
                self.whole[self.kind].append((self.now() - self._begin) / self.steps)
            self.kind = next(self._turns, "")
            if not self.kind:
                raise Enough("measured")
            self._left = self.steps
            self._begin = self._last = self.now()
        self._left -= 1


def exchanges(run: Any) -> bool:
    """Return whether gradients, and nothing else, are exchanged, so that it can be left out."""
    return run.engine.world_size > 1 and run.engine.support.only_gradients


def attach(run: Any, clock: Clock) -> None:
    """Let the parts of a run record when they begin and end. Time before a part begins belongs to another part."""
    engine, accelerator = run.engine, run.engine.accelerator
    _around(run.head, "logits", clock, before="data", after=None)
    _around(engine, "backward", clock, before="head and loss", after="backward")
    _around(engine, "step", clock, before="rest", after="optimizer")
    if run.plan.layout.world_size > 1:
        _around(accelerator, "reduce", clock, before="data", after="communication")
    model = engine.module
    backbone = getattr(model, model.base_model_prefix, model)
    backbone.register_forward_pre_hook(lambda *_: clock.note("rest"), prepend=True)
    backbone.register_forward_hook(lambda *_: clock.note("backbone"), prepend=True)
    usual = engine.forward_context

    def context(is_last: bool) -> Any:
        alone = exchanges(run) and clock.kind in ("apart", "no exchange")
        return usual(is_last and not alone)

    engine.forward_context = context


def _around(owner: Any, name: str, clock: Clock, before: str, after: str | None) -> None:
    plain: Callable[..., Any] = getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        clock.note(before)
        result = plain(*arguments, **named)
        if after is not None:
            clock.note(after)
        return result

    setattr(owner, name, noted)


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Measure the parts of each step of `cloze train` in this process."""
    plain_step, plain_loader = trainer.train_step, trainer.TrainLoader

    class Loader(plain_loader):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[Any]:
            batches = super().__iter__()
            while True:
                clock.note("rest")
                batch = next(batches, None)
                clock.note("data")
                if batch is None:
                    return
                yield batch

    def step(run: Any, *arguments: Any, **named: Any) -> Any:
        clock.step_begins(run)
        return plain_step(run, *arguments, **named)

    trainer.train_step, trainer.TrainLoader = step, Loader  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        trainer.train_step, trainer.TrainLoader = plain_step, plain_loader  # type: ignore[misc]


def bench_step(config: BenchConfig) -> Table:
    """Measure each size, and return one table. Raises ConfigError for a size that is not known, and for `--gpu`
    without a GPU. Every rank calls it."""
    if config.gpu and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here", where="--gpu", hint="without --gpu it measures the CPU")
    sizes = chosen_sizes(config, ["distilroberta-128"])
    if len(sizes) > 1:
        raise ConfigError("one at a time", where="--sizes", hint="a run per size")
    ((name, size),) = sizes.items()
    clock = Clock(config.rounds or ROUNDS, steps_in_turn(config.gpu))
    batch = config.per_device_train_batch_size or (GPU_TOKENS // size.block_size if config.gpu else 8)
    with work_folder(config.work_dir) as folder, watched(clock):
        make_data(folder / "data", size, config.packing)
        with contextlib.suppress(Enough):
            trainer.train(train_config(config, size, folder, batch))
    return show(name, size, batch, clock, config.gpu)


def train_config(config: BenchConfig, size: Size, folder: Path, batch: int) -> TrainConfig:
    """Return the command that is measured."""
    return TrainConfig(
        dataset_name=str(folder / "data"),
        output_dir=str(folder / "run"),
        model_type=size.model_type,
        config_overrides=size.config_overrides,
        per_device_train_batch_size=batch,
        max_steps=10**6,
        save_strategy="no",
        weight_decay=0.01,
        learning_rate=2e-5,
        bf16=config.gpu,
        use_cpu=not config.gpu,
    )


def show(name: str, size: Size, batch: int, clock: Clock, gpu: bool) -> Table:
    """Return the table of results."""
    mine = {part: median(step.get(part, 0.0) for step in clock.apart) for part in PARTS}
    ranks = gather((mine, dict(clock.whole)))
    parts = {part: sum(rank[0][part] for rank in ranks) / len(ranks) for part in PARTS}
    seconds = {  # per turn, the mean over ranks
        kind: [sum(turn) / len(ranks) for turn in zip(*(rank[1][kind] for rank in ranks), strict=True)]
        for kind in clock.whole
    }
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        f"a step of {name}: {batch} blocks of {size.block_size}, {'bf16' if gpu else 'fp32'}, {len(ranks)} x {where}",
        ["what", "ms", "share"],
    )
    whole = estimate(seconds["as it runs"])
    table.notes += remark("the step as it runs", whole, "s", "turns")
    if "no exchange" in seconds:
        pairs = zip(sums(seconds["as it runs"]), sums(seconds["no exchange"]), strict=True)
        exchange = estimate([(usual - alone) / 2 for usual, alone in pairs])
        table.notes += remark("the gradient exchange", exchange, "s", scale=whole.median)
        parts["communication"] += max(0.0, exchange.median)
    total = sum(parts.values())
    for part in PARTS:
        table.add(part, parts[part] * 1e3, f"{parts[part] / total:.1%}")
    table.add("sum, with a stop between parts", total * 1e3, "100.0%")
    table.add("the step as it runs", whole.median * 1e3, f"{whole.median / total:.1%}")
    table.details = {
        "gpu": gpu_facts() if gpu else None,
        "ranks": len(ranks),
        "seconds_of_each_step": clock.apart,
        "seconds_per_step_of_each_turn": dict(clock.whole),
    }
    return table
