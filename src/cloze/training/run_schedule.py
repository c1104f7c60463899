"""The length of a run and what is due at each step, as stateless arithmetic.

plan = plan_run(config, Layout(8, 2, rank=0, world_size=4), num_blocks=10_000, block_size=128)
plan.total_steps, plan.layout.global_batch, plan.epoch(step), plan.is_due("epoch", None, step)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cloze.checkpoint.format import Position
from cloze.config import TrainConfig
from cloze.config.relations import records_graphs
from cloze.data.batches.layout import Layout
from cloze.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """The shape of a run: `total_samples` blocks in `total_steps` steps; the last step may have fewer blocks.

    `num_blocks` is None for streamed data, which have no epochs.
    """

    layout: Layout
    num_blocks: int | None
    block_size: int
    total_samples: int
    total_steps: int

    def position(self, global_step: int) -> Position:
        """Return the run's position in its data after `global_step` steps."""
        samples = min(self.layout.batch_sizes.samples_before(global_step), self.total_samples)
        return Position(global_step, samples, samples * self.block_size)

    @property
    def blocks_a_step(self) -> str:
        """Return the size of the global batch in words."""
        sizes = self.layout.batch_sizes
        growing = f"{sizes.start} growing to " if sizes.warmup_steps else ""
        return f"{growing}{sizes.full} blocks a step" + (f" in {sizes.warmup_steps:,} steps" if growing else "")

    def epoch(self, global_step: int) -> float:
        """Return the passes over the training blocks after `global_step` steps; 0 for streamed data."""
        return self.position(global_step).samples_seen / self.num_blocks if self.num_blocks else 0.0

    def is_due(self, strategy: str, every: int | None, global_step: int) -> bool:
        """Return whether an action with this `strategy` (no, steps, epoch) is due after step `global_step`."""
        if strategy == "steps":
            return every is not None and global_step % every == 0
        if strategy == "epoch":
            return int(self.epoch(global_step)) > int(self.epoch(global_step - 1))
        return False


def plan_run(config: TrainConfig, layout: Layout, num_blocks: int | None, block_size: int) -> Plan:
    """Return the plan of a run.

    `num_train_epochs` is a number of samples, rounded to whole blocks: a run has ceil(epochs * blocks / global batch)
    steps. Raises ConfigError if there is nothing to train, or a count exceeds 64 bits.
    """
    _check_warmup(config, layout.global_batch)
    check_graphs(config, layout.accumulation)
    if config.max_steps > 0:
        total_steps = config.max_steps
        total_samples = layout.batch_sizes.samples_before(total_steps)
    else:
        total_samples = round(config.num_train_epochs * (num_blocks or 0))
        total_steps = layout.batch_sizes.steps_for(total_samples)
    if total_steps < 1:
        raise _nothing()
    if total_samples * block_size >= 2**63:
        raise ConfigError(
            f"{total_samples:,} samples cannot be counted", where="--max_steps / --num_train_epochs", hint="give less"
        )
    return Plan(layout, num_blocks, block_size, total_samples, total_steps)


def check_length(config: TrainConfig, num_blocks: int | None, world_size: int) -> None:
    """Raise ConfigError for what `plan_run` would reject, as far as it is known without a model."""
    if config.max_steps <= 0 and round(config.num_train_epochs * (num_blocks or 0)) < 1:
        raise _nothing()
    if config.resume_from_checkpoint is None:  # otherwise the checkpoint sets the global batch
        passes = config.per_device_train_batch_size * config.gradient_accumulation_steps
        _check_warmup(config, config.global_batch_size or passes * world_size)


def _nothing() -> ConfigError:
    return ConfigError("nothing to train", where="--num_train_epochs / --max_steps", hint="set one above 0")


def _check_warmup(config: TrainConfig, full: int) -> None:
    if config.batch_size_warmup_steps and (config.batch_size_warmup_start or 1) > full:
        raise ConfigError(f"must not be above the {full} blocks of a full step", where="--batch_size_warmup_start")


def check_graphs(config: TrainConfig, accumulation: int) -> None:
    """Raise ConfigError for CUDA graphs with gradient accumulation.

    Gradients lie in the graph's memory, which the next micro-batch overwrites (pytorch issue 96693).
    """
    if accumulation > 1 and records_graphs(vars(config)):
        raise ConfigError(
            f"{config.torch_compile_mode} records CUDA graphs, which lose gradients over {accumulation} micro-batches",
            where="--torch_compile_mode",
            hint="use max-autotune-no-cudagraphs, or a step of one micro-batch (--per_device_train_batch_size)",
        )


def describe_wide_steps(config: TrainConfig, plan: Plan) -> str | None:
    """Return a warning if epochs are counted and one step takes more blocks than there are, else None."""
    full = plan.layout.global_batch
    if config.max_steps > 0 or plan.num_blocks is None or plan.num_blocks >= full:
        return None
    steps = "1 step" if plan.total_steps == 1 else f"{plan.total_steps:,} steps"
    return (
        f"a step takes {full:,} blocks and there are {plan.num_blocks:,}: {config.num_train_epochs:g} epochs are "
        f"{steps}; give --max_steps, or a smaller batch, for more"
    )


def fit_layout(config: TrainConfig, rank: int, world_size: int, saved: dict[str, Any] | None) -> Layout:
    """Return how the global batch is split here. `saved`: manifest of the checkpoint to resume, None without one.

    A resumed run keeps its global batch: with another number of processes or per_device_train_batch_size, the number
    of accumulation steps follows, and per_device_train_batch_size limits a forward pass. A new run with
    `global_batch_size` does the same. Raises ConfigError if the user changed the batch, or it is smaller than
    world_size.
    """
    wanted = config.per_device_train_batch_size, config.gradient_accumulation_steps
    warmup = warmup_of(config)
    layout = Layout(*wanted, rank, world_size, None, *warmup)
    given = config.global_batch_size
    size = given if saved is None else int(saved["run"]["global_batch_size"])
    if given not in (None, size):
        what = f"the resumed run uses a global batch of {size}"
        raise ConfigError(what, where=f"--global_batch_size {given}", hint="leave it")
    if size is None or (given is None and layout.global_batch == size):
        return layout
    if given is None and saved is not None:
        _refuse_change(wanted, layout, size, saved)
    if world_size > size:
        raise ConfigError(
            f"a step of this run has {size} blocks, too few for {world_size} processes",
            where="--num_processes",
            hint=f"start from 1 to {size} processes",
        )
    return split_batch(layout, size, wanted[0])


def _refuse_change(wanted: tuple[int, int], layout: Layout, size: int, saved: dict[str, Any]) -> None:
    """Raise ConfigError if the same number of processes would use another batch than before."""
    before = saved["config"]["per_device_train_batch_size"], saved["config"]["gradient_accumulation_steps"]
    world_size = layout.world_size
    if world_size == saved["world_size"] and wanted != before:
        share = -(-size // world_size)
        fits = [f"{n} and {share // n}" for n in range(1, share + 1) if share % n == 0 and size % world_size == 0]
        raise ConfigError(
            f"{layout.global_batch} blocks a step, but the resumed run uses {size}",
            where="--per_device_train_batch_size and --gradient_accumulation_steps",
            hint=f"choose {', '.join(fits)}" if fits else "leave them as they were",
        )


def split_batch(layout: Layout, size: int, most: int) -> Layout:
    """Return a layout of `size` blocks a step: as few passes of at most `most` blocks as possible, evenly filled."""
    share = -(-size // layout.world_size)
    accumulation = -(-share // most)
    per_device = -(-share // accumulation)
    fills = per_device * accumulation * layout.world_size == size
    return replace(layout, per_device=per_device, accumulation=accumulation, size=None if fills else size)


def warmup_of(config: TrainConfig) -> tuple[int, int]:
    """Return `warmup_start` and `warmup_steps` of a Layout, by which the global batch grows."""
    return config.batch_size_warmup_start or 1, config.batch_size_warmup_steps


def check_validation(config: TrainConfig, has_validation: bool) -> None:
    """Raise ConfigError for an evaluation without validation blocks."""
    if (config.eval_strategy != "no" or config.eval_on_start) and not has_validation:
        raise ConfigError(
            "the prepared folder has no validation blocks",
            where="--eval_strategy",
            hint="prepare with --validation_split_percentage or --validation_split, or set --eval_strategy no",
        )
