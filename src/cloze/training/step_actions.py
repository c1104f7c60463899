"""Actions between steps: evaluate, save, stop, and handle a step that is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import torch

from cloze.checkpoint.format import checkpoint_path
from cloze.distributed.collectives import gather, run_on_main_and_broadcast
from cloze.errors import DiskError, TrainingError
from cloze.evaluation.metric_table import METRICS
from cloze.evaluation.perplexity import Interrupted, Scores, score_blocks
from cloze.model.compiled import eagerly
from cloze.training.checkpointing.engine_probe import answer_probe
from cloze.training.checkpointing.restore import choose_checkpoint
from cloze.training.logging.metrics import MetricsLog
from cloze.training.nonfinite import (
    MOST_ROLLBACKS,
    MOST_SKIPPED,
    REPORT_AGAIN,
    SMALLEST_SCALE,
    RollBack,
    describe_step,
    leave_out,
    nonfinite_error,
)
from cloze.training.run import Run, Start
from cloze.training.run_dir import resolved
from cloze.training.setup import resume
from cloze.utils.system import versions_of
from cloze.utils.terminal.console import say, warn

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed")
StreamPosition = dict[str, int] | None  # this rank's position in streamed data


def evaluate(run: Run, log: MetricsLog, global_step: int, stream_position: StreamPosition) -> Scores:
    """Score the validation blocks with their fixed masks and log the result.

    Raises Stopped if a stop is requested meanwhile: the evaluation is then repeated after resuming.
    """
    model, device = run.engine.model, run.engine.accelerator.device
    assert run.data.validation is not None  # checked before the run began
    model.eval()
    try:
        with run.watch.phase("evaluate"), eagerly():
            scores = score_blocks(
                lambda batch: run.head.masked_logits(model, batch, device),
                run.data.validation,
                run.masking.for_evaluation(),
                run.config.per_device_eval_batch_size,
                run.engine.accelerator,
                partial(_alive_vote, run),
            )
    except Interrupted:
        stop_here(run, global_step, stream_position, evaluation_pending=True)
        raise
    finally:
        model.train()
    log.write(
        {
            "step": global_step,
            "epoch": round(run.plan.epoch(global_step), 6),
            "eval_loss": scores.loss,
            **{f"eval_{metric.key}": getattr(scores, metric.key) for metric in METRICS if metric.chart is not None},
        }
    )
    say("evaluate", f"step {global_step:,}: perplexity {scores.perplexity:.4f}, accuracy {scores.masked_accuracy:.4f}")
    return scores


def _alive_vote(run: Run) -> int:
    run.watch.beat()
    return run.stop.vote()


def save(
    run: Run, global_step: int, stream_position: StreamPosition, last: bool = True, evaluation_pending: bool = False
) -> None:
    """Write checkpoint-N, and delete checkpoints beyond save_total_limit.

    A disk error is a warning if training continues and --on_save_error allows it; else it is raised.
    """
    go_on = run.config.on_save_error == "continue" and not last
    with run.watch.phase("save"):
        with _warned(run, go_on):
            run.saver.wait()
        extra = {
            "stream": None if stream_position is None else gather(stream_position),
            "run": run.identity,
            "config": resolved(run.config),
            "versions": versions_of(LIBRARIES),
            "engine": run.engine.support.name,
            "precision": run.engine.accelerator.mixed_precision,
            "loss_scale": run.engine.loss_scale_state(),
            "evaluation_pending": evaluation_pending,
        }
        folder = checkpoint_path(run.output_dir, global_step)
        probe = answer_probe(run.engine, run.head, run.probe)
        position = run.plan.position(global_step)
        with _warned(run, go_on):
            run.saver.save(folder, position, probe, extra, run.config.save_total_limit)
            run.saved = global_step, evaluation_pending
            say("checkpoint", str(folder) + (" (being written)" if run.config.async_save else ""))


@contextlib.contextmanager
def _warned(run: Run, go_on: bool):
    try:
        yield
    except DiskError as error:
        if not go_on:
            raise
        run.saved = None
        warn(f"the checkpoint was not saved: {error}; training continues (--on_save_error)")


def finish_saving(run: Run, quietly: bool = False) -> None:
    """Wait for a checkpoint that is being written. `quietly`: another error is being raised, only warn of this one."""
    try:
        with run.watch.phase("save"), _warned(run, quietly):
            run.saver.wait()
    except RuntimeError:  # a rank was lost: that error is already being raised
        if not quietly:
            raise


def stop_here(run: Run, global_step: int, stream_position: StreamPosition, evaluation_pending: bool = False) -> None:
    """Save a checkpoint, unless there is one of this step, and raise Stopped. Every rank calls it at the same step."""
    name = checkpoint_path(run.output_dir, global_step).name
    if run.config.save_strategy == "no":
        raise run.stop.stopped(f"after step {global_step:,}; nothing is saved (--save_strategy no)")
    if global_step == 0:
        raise run.stop.stopped("before the first step")
    if run.saved != (global_step, evaluation_pending):
        save(run, global_step, stream_position, evaluation_pending=evaluation_pending)
    finish_saving(run)
    raise run.stop.stopped(f"after step {global_step:,}; {name} is saved, resume with --resume_from_checkpoint auto")


def handle_nonfinite_step(
    run: Run,
    log: MetricsLog,
    global_step: int,
    losses: Sequence[torch.Tensor],
    grad_norm: float,
    stream_position: StreamPosition,
) -> None:
    """Apply --on_nonfinite to a step whose loss or gradient is not finite; the weights did not change.

    `stream_position`: this rank's position in streamed data before the step. Raises TrainingError or RollBack.
    """
    run.nonfinite_in_a_row += 1
    scaled = run.engine.accelerator.mixed_precision == "fp16"
    why = describe_step(run.plan.layout, global_step, [float(loss) for loss in losses], grad_norm, scaled)
    if why is None:
        explain_scaled_step(run, global_step, grad_norm)
        return
    if run.config.on_nonfinite == "skip":
        end_if_all_are_skipped(run, global_step, why)
        warn(f"{why}; the batch is skipped (--on_nonfinite)")
        log.write({"step": global_step + 1, "skipped": True})
        return
    if run.config.on_nonfinite == "rollback":
        raise RollBack(global_step, why)
    if global_step and run.saved != (global_step, False) and run.config.save_strategy != "no":
        save(run, global_step, stream_position)
    raise nonfinite_error(why, run.output_dir, global_step, "or continue with --on_nonfinite skip or rollback")


def explain_scaled_step(run: Run, global_step: int, grad_norm: float) -> None:
    """Report a step skipped by fp16's loss scaling: the first of several in a row, and the tenth.

    Raises TrainingError if a lower scale cannot help: the losses are finite, but no gradient is.
    """
    state = run.engine.loss_scale_state() or {}
    scale = float(state.get("scale", state.get("cur_scale", SMALLEST_SCALE)))
    why = f"gradient norm is {grad_norm} at step {global_step + 1} with finite losses, at a loss scale of {scale:g}"
    if scale < SMALLEST_SCALE:
        raise nonfinite_error(why, run.output_dir, global_step, "or train in bf16")
    end_if_all_are_skipped(run, global_step, why)
    if run.nonfinite_in_a_row in (1, REPORT_AGAIN):
        in_a_row = f", {run.nonfinite_in_a_row} in a row" if run.nonfinite_in_a_row > 1 else ""
        warn(f"{why}: the step is skipped{in_a_row}, as fp16 does now and then")


def end_if_all_are_skipped(run: Run, global_step: int, why: str) -> None:
    """Raise TrainingError after MOST_SKIPPED skipped steps in a row, because training makes no progress."""
    if run.nonfinite_in_a_row >= MOST_SKIPPED:
        what = f"{why}; {run.nonfinite_in_a_row} steps in a row were skipped"
        raise nonfinite_error(what, run.output_dir, global_step, "or lower the learning rate")


def roll_back(run: Run, back: RollBack) -> Start:
    """Load the last checkpoint again and leave the batch out. Raises TrainingError if that cannot help."""
    finish_saving(run, quietly=True)
    layout = run.plan.layout
    found = choose_checkpoint(run.output_dir, "auto", layout.rank, layout.world_size, at_most=back.step)
    if found is None:
        raise nonfinite_error(str(back), run.output_dir, back.step, "no checkpoint to return to")
    if len(run.excluded_steps) >= MOST_ROLLBACKS:
        raise TrainingError(
            f"{back}, after {MOST_ROLLBACKS} batches were left out",
            where=run.output_dir,
            hint="lower the learning rate, or look for what is wrong with the data",
        )
    steps = run_on_main_and_broadcast(partial(leave_out, run.output_dir, back.step))
    warn(f"{back}; back to {found.name}, and the batch is left out from now on (--on_nonfinite)")
    run.checkpoint, run.excluded_steps, run.nonfinite_in_a_row = found, frozenset(steps), 0
    return resume(run)
