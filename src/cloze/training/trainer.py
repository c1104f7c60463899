"""The training loop.

For each global batch: count the masked tokens over all ranks, accumulate gradients over the micro-batches, clip, take
a step, then log, evaluate and save if due. Data order, masks, learning rate and dropout are functions of
`global_step`, so that resuming needs no other state than this integer, weights and optimizer.

    accelerate launch --config_file launch/accelerate/zero2.yaml -m cloze train --config RECIPE.yaml
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloze.config import TrainConfig
from cloze.data.batches.counter_rng import make_key
from cloze.data.batches.loader import StepBatches, TrainLoader
from cloze.distributed.resilience.stop_signals import StopSignals
from cloze.errors import LostRank, Stopped, one_line, tag_phase
from cloze.training.determinism import named_operations
from cloze.training.engines.ema import decay_at
from cloze.training.live_view import training_view
from cloze.training.logging.metrics import MetricsLog, Window
from cloze.training.logging.sessions import note_session
from cloze.training.logging.trackers import trackers_closed
from cloze.training.loss import masked_loss_sum
from cloze.training.nonfinite import RollBack
from cloze.training.prefetch import HostCopy, arrive, host_values, to_device
from cloze.training.run import Run, Start
from cloze.training.run_dir import kept_failures, write_status
from cloze.training.setup import resume, set_up
from cloze.training.step_actions import (
    StreamPosition,
    evaluate,
    finish_saving,
    handle_nonfinite_step,
    roll_back,
    save,
    stop_here,
)
from cloze.utils.terminal.console import duration, say

_PURPOSE_DROPOUT = 0x64726F70


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, on the device. `loss`: this rank's part of the mean loss of the global batch
    (float64); `losses`: that of each micro-batch; `grad_norm`: of the whole gradient; `refused`: whether the step was
    skipped; `num_masked`: over all ranks. `flags`: copies of `refused` and the number of ranks that want to stop."""

    global_step: int
    loss: torch.Tensor
    losses: list[torch.Tensor]
    grad_norm: torch.Tensor
    refused: torch.Tensor
    num_masked: torch.Tensor
    flags: HostCopy


Unread = deque[tuple[StepResult, StreamPosition]]  # results that the host has not read, and where each step began


def train(config: TrainConfig, own_process: bool = True) -> Path:
    """Train a new or resumed run to its end; return its folder. Every rank calls it.

    Raises Stopped, with the checkpoint saved, if a stop was requested. `own_process`: see StopSignals.
    """
    signals = StopSignals(config.save_before_time_limit, own_process)
    with signals as stop, kept_failures(config), trackers_closed():
        try:
            with ExitStack() as stack:
                run = set_up(config, stop, stack)
                train_safely(run)
        except LostRank as error:
            write_status(Path(config.output_dir), "failed", str(error))
            raise
    return run.output_dir


def train_safely(run: Run) -> None:
    """Train to the end. On an error or stop, finish the checkpoint being written before raising it."""
    try:
        with named_operations():
            train_to_the_end(run)
    except (Exception, Stopped) as error:
        tag_phase(error, *run.watch.doing)
        finish_saving(run, quietly=True)
        line = str(error) if isinstance(error, Stopped) else one_line(error)
        write_status(run.output_dir, "stopped" if isinstance(error, Stopped) else "failed", line)
        raise


def train_to_the_end(run: Run) -> None:
    """Run all remaining steps; after a RollBack, continue from the restored step."""
    plan = run.plan
    amount = f"{plan.num_blocks:,}" if plan.num_blocks else "a stream of"
    say("data", f"{amount} blocks of {plan.block_size}; {plan.blocks_a_step}")
    begin, start = time.monotonic(), resume(run)
    note_session(run.output_dir, run.engine, start.step)
    log = MetricsLog(run.output_dir, run.engine.accelerator, start.step)
    with closing(log):
        while True:
            try:
                train_steps(run, log, start)
                break
            except RollBack as back:
                start = roll_back(run, back)
                log.rewind(start.step)
    finish_saving(run)
    write_status(run.output_dir, "finished", f"{plan.total_steps} steps")
    say(
        "train",
        f"{plan.total_steps:,} steps, {plan.epoch(plan.total_steps):.2f} epochs, "
        f"{duration(time.monotonic() - begin)}; the run is in {run.output_dir}",
        result=run.output_dir,
    )


def train_steps(run: Run, log: MetricsLog, start: Start) -> None:
    """Run the steps `start.step` .. total_steps - 1; log, evaluate and save if due."""
    config, plan = run.config, run.plan
    if start.evaluate:
        evaluate(run, log, start.step, start.stream_position)
    build = run.data.step_builder(run.masking, plan.layout, plan.total_samples, start.stream_position, run.capacity)
    device = run.engine.accelerator.device
    loader = TrainLoader(to_device(build, device), start.step, plan.total_steps)
    window, unread = Window(start.step, device), Unread()
    stream_position = start.stream_position
    run.watch.step = start.step
    with run.watch.phase("train"), training_view(run, start.step) as view:
        for batch in window.timed(loader):
            done = batch.global_step + 1
            last = done == plan.total_steps
            log_it = done % config.logging_steps == 0 or last
            evaluate_it = plan.is_due(config.eval_strategy, config.eval_steps or config.logging_steps, done)
            save_it = config.save_strategy != "no" and (
                last or plan.is_due(config.save_strategy, config.save_steps, done)
            )
            if batch.global_step in run.excluded_steps:
                log.write({"step": done, "left_out": True})
            else:
                result = train_step(run, batch)
                window.add(result.loss, result.refused, result.num_masked)
                unread.append((result, stream_position))
            stop = read_results(run, log, unread, 0 if log_it or evaluate_it or save_it else run.max_async_steps)
            if log_it and batch.global_step not in run.excluded_steps:
                view.log(log_step(run, log, window, result))
            stream_position = batch.stream
            view.advance()
            run.watch.step = done
            if evaluate_it:
                evaluate(run, log, done, stream_position)
            if save_it:
                save(run, done, stream_position, last=last)
            if stop and not last:
                read_results(run, log, unread, 0)
                stop_here(run, done, stream_position)


def read_results(run: Run, log: MetricsLog, unread: Unread, keep: int) -> bool:
    """Read the results of all steps but the last `keep`; return whether any rank wants to stop.

    On a GPU the host reads a step's flags after the next step was launched, so that the device never waits for it.
    Before logging, evaluating or saving it reads all of them.
    """
    stop = False
    while len(unread) > keep:
        result, stream_position = unread.popleft()
        refused, votes = result.flags.read()
        stop = stop or votes > 0
        if not refused:
            run.nonfinite_in_a_row = 0
        else:
            handle_nonfinite_step(
                run, log, result.global_step, result.losses, float(result.grad_norm), stream_position
            )
    return stop


def log_step(run: Run, log: MetricsLog, window: Window, result: StepResult) -> dict[str, Any]:
    """Write one line of metrics and return it. Every rank calls it and waits for its device."""
    done, plan = result.global_step + 1, run.plan
    sums = torch.stack([sum_over_ranks(run, window.sums[0]), *window.sums[1:]]).tolist()
    measured = window.close(done, sums, plan, run.pace)
    line = {
        "step": done,
        "epoch": round(plan.epoch(done), 6),
        "samples_seen": plan.position(done).samples_seen,
        "loss": measured["loss"],
        "learning_rate": run.schedule(result.global_step),
        "grad_norm": float(result.grad_norm),
        **measured,
    }
    log.write(line)
    return line


def train_step(run: Run, batch: StepBatches) -> StepResult:
    """Take one optimizer step. The host does not wait for the device."""
    engine, plan = run.engine, run.plan
    device = engine.accelerator.device
    # Divide once, by the masked tokens of the whole global batch: see cloze.training.loss.
    totals = sum_over_ranks(run, host_values([batch.num_masked, run.stop.vote()], device))
    num_masked = totals[0].clamp(min=1)
    losses = []
    arrive(batch)
    for micro_step, micro_batch in enumerate(batch.micro_batches):
        is_last = micro_step == len(batch.micro_batches) - 1
        seed_dropout(dropout_seed(run.config.seed, batch.global_step, micro_step, plan.layout.rank), device)
        with engine.forward_context(is_last):
            logits = run.head.masked_logits(engine.model, micro_batch, device)
            loss = masked_loss_sum(logits, micro_batch["targets"]) / num_masked
            engine.backward(loss * plan.layout.world_size, is_last)
        losses.append(loss.detach())
    ema_decay = decay_at(run.config.ema_decay, batch.global_step)
    grad_norm, refused = engine.step(run.schedule(batch.global_step), ema_decay)
    step_loss = torch.stack(losses).double().sum()
    flags = HostCopy(torch.stack([refused.to(totals.dtype), totals[1]]))
    return StepResult(batch.global_step, step_loss, losses, grad_norm, refused, totals[0], flags)


def dropout_seed(seed: int, global_step: int, micro_step: int, rank: int) -> int:
    """Return a seed that depends on the position only, so that no random state has to be stored."""
    return int(make_key(seed, _PURPOSE_DROPOUT, global_step, micro_step, rank) >> 1)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Set the random state of the device. torch.manual_seed first looks for devices of all kinds: on a CPU 0.2 ms a
    call, the largest overhead of the loop for a small model."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def sum_over_ranks(run: Run, value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, on every rank."""
    return run.engine.accelerator.reduce(value.clone(), "sum") if run.plan.layout.world_size > 1 else value
