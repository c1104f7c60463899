"""The training loop.

For each global batch: count its masked tokens over all ranks, accumulate gradients over the micro-batches, clip and
step, then log, evaluate and save where that is due. A run's place is one integer, `global_step`: data order, masks,
learning rate and dropout are functions of it, so that resuming is a seek.

    accelerate launch --config_file launch/accelerate/zero2.yaml -m cloze train --config RECIPE.yaml
"""

from __future__ import annotations

import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from cloze.config import TrainConfig
from cloze.console import duration, progress, say
from cloze.data.hashing import make_key
from cloze.data.loader import StepBatches, TrainLoader
from cloze.distributed import decide, engine_name, gather
from cloze.evaluation import Scores, score_blocks
from cloze.model.packed import model_inputs
from cloze.train.checkpoint import checkpoint_path, rotate, save_checkpoint
from cloze.train.engine import loss_scale_state
from cloze.train.loss import masked_loss_sum
from cloze.train.metrics import MetricsLog, Window
from cloze.train.probe import answer_probe
from cloze.train.run_folder import resolved
from cloze.train.setup import Run, resume, set_up

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed")
_PURPOSE_DROPOUT = 0x64726F70


def train(config: TrainConfig) -> Path:
    """Train from the beginning, or from a checkpoint, to the end; return the run's folder. Every rank calls it."""
    run = set_up(config)
    first_step, place = resume(run)
    plan = run.plan
    amount = f"{plan.num_blocks:,}" if plan.num_blocks else "a stream of"
    say("data", f"{amount} blocks of {plan.block_size}; {plan.layout.global_batch} blocks a step")
    log = MetricsLog(run.output_dir, run.engine.accelerator, first_step)
    if config.eval_on_start and first_step == 0:
        evaluate(run, log, 0)
    begin = time.monotonic()
    train_steps(run, log, first_step, place)
    say(
        "train",
        f"{plan.total_steps:,} steps, {plan.epoch(plan.total_steps):.2f} epochs, "
        f"{duration(time.monotonic() - begin)}; the run is in {run.output_dir}",
    )
    for tracker in run.engine.accelerator.trackers:
        tracker.finish()
    return run.output_dir


def train_steps(run: Run, log: MetricsLog, first_step: int, place: dict[str, int] | None) -> None:
    """Steps `first_step` .. total_steps - 1, with logging, evaluation and checkpoints where they are due.

    `place`: where in streamed data to begin.
    """
    config, plan, device = run.config, run.plan, run.engine.accelerator.device
    build = run.data.step_builder(run.masking, plan.layout, plan.total_samples, place)
    loader = TrainLoader(build, first_step, plan.total_steps)
    window = Window(first_step)
    window_loss = torch.zeros((), dtype=torch.float64, device=device)
    with progress("train", total=plan.total_steps, unit="steps", start=first_step) as advance:
        for batch in window.timed(loader):
            step_loss, grad_norm = train_step(run, batch)
            window_loss += step_loss
            done = batch.global_step + 1
            last = done == plan.total_steps
            if done % config.logging_steps == 0 or last:
                line = {
                    "step": done,
                    "epoch": round(plan.epoch(done), 6),
                    "samples_seen": plan.position(done).samples_seen,
                }
                loss = sum_over_ranks(run, window_loss).item() / (done - window.first_step)
                line |= {"loss": loss, "learning_rate": run.schedule(batch.global_step), "grad_norm": float(grad_norm)}
                line |= window.speed(done, plan)
                log.write(line)
                window_loss.zero_()
                advance(0, note=f"loss {loss:.4f}  {line['tokens_per_second']:,.0f} tokens/s")
            advance()
            if plan.is_due(config.eval_strategy, config.eval_steps or config.logging_steps, done):
                evaluate(run, log, done)
            if config.save_strategy != "no" and (last or plan.is_due(config.save_strategy, config.save_steps, done)):
                save(run, done, batch.stream)


def train_step(run: Run, batch: StepBatches) -> tuple[torch.Tensor, torch.Tensor | float]:
    """One optimizer step: this rank's part of the global batch's mean loss (float64), and the gradient norm."""
    engine, plan = run.engine, run.plan
    device = engine.accelerator.device
    # Contract of the loss: divide once by the masked tokens of the whole global batch (see cloze.train.loss).
    num_masked = sum_over_ranks(run, torch.tensor(batch.num_masked, device=device)).clamp(min=1)
    step_loss = torch.zeros((), dtype=torch.float64, device=device)
    for micro_step, micro_batch in enumerate(batch.micro_batches):
        is_last = micro_step == plan.layout.accumulation - 1
        torch.manual_seed(dropout_seed(run.config.seed, batch.global_step, micro_step, plan.layout.rank))
        with engine.forward_context(is_last):
            logits = engine.model(**model_inputs(micro_batch, device, run.documents)).logits
            loss = masked_loss_sum(logits, micro_batch["labels"].to(device)) / num_masked
            engine.backward(loss * plan.layout.world_size, is_last)
        step_loss += loss.detach()
    return step_loss, engine.step(run.schedule(batch.global_step))


def dropout_seed(seed: int, global_step: int, micro_step: int, rank: int) -> int:
    """Dropout is a function of the position too, so that no random state has to be stored."""
    return int(make_key(seed, _PURPOSE_DROPOUT, global_step, micro_step, rank) >> 1)


def sum_over_ranks(run: Run, value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    return run.engine.accelerator.reduce(value.clone(), "sum") if run.plan.layout.world_size > 1 else value


def evaluate(run: Run, log: MetricsLog, global_step: int) -> Scores:
    """Score the validation blocks with their fixed masks and log the result."""
    model = run.engine.model
    assert run.data.validation is not None  # checked before the run began
    model.eval()
    scores = score_blocks(
        lambda batch: model(**model_inputs(batch, run.engine.accelerator.device, run.documents)).logits,
        run.data.validation,
        run.masking.for_evaluation(),
        run.config.per_device_eval_batch_size,
        run.engine.accelerator,
    )
    model.train()
    log.write(
        {
            "step": global_step,
            "epoch": round(run.plan.epoch(global_step), 6),
            "eval_loss": scores.loss,
            "eval_perplexity": scores.perplexity,
            "eval_masked_accuracy": scores.masked_accuracy,
        }
    )
    say("evaluate", f"step {global_step:,}: perplexity {scores.perplexity:.4f}, accuracy {scores.masked_accuracy:.4f}")
    return scores


def save(run: Run, global_step: int, place: dict[str, int] | None) -> None:
    """Write checkpoint-N, then delete what is beyond save_total_limit. `place`: this rank's in streamed data."""
    extra = {
        "stream": None if place is None else gather(place),
        "run": run.identity,
        "config": resolved(run.config),
        "versions": {name: version(name) for name in LIBRARIES},
        "engine": engine_name(run.engine.accelerator),
        "precision": run.engine.accelerator.mixed_precision,
        "loss_scale": loss_scale_state(run.engine),
    }
    folder = checkpoint_path(run.output_dir, global_step)
    probe = answer_probe(run.engine, run.probe)
    save_checkpoint(folder, run.training, run.plan.position(global_step), probe, run.save_model_files, extra)
    decide(partial(rotate, run.output_dir, run.config.save_total_limit))
    say("checkpoint", str(folder))
