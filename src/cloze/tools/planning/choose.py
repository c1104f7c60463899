"""All choices for a recipe on some GPUs, weighed, and the one to take.

    plan = make_plan(recipe, gpu, ranks_a_node=8, nodes=2, network=12.5e9, host_memory=None)
    plan.rows                     # one for each choice: memory, largest micro-batch, speed
    plan.recommended, plan.reason

The rule: the fastest choice that fits with a tenth of the memory to spare. Of those within 5 % of it the least
partitioned one is taken, which sends the least, and one without offload and recomputation where there is one. A
choice takes the recipe's micro-batch if that fits, else the largest one that does; the global batch is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from cloze.config import TrainConfig
from cloze.data.batches.layout import Layout
from cloze.data.train_data import PROBE_BLOCKS
from cloze.errors import ConfigError
from cloze.model.sparse_head import checked_length
from cloze.tools.planning.activations import Trace, Untraceable, quiet, trace_pass
from cloze.tools.planning.gpus import Gpu
from cloze.tools.planning.memory.per_rank import (
    Memory,
    World,
    checkpoint_bytes,
    host_at_start,
    memory_of,
    parts_of,
    peak_of,
)
from cloze.tools.planning.meta_op_cache import Repeats
from cloze.tools.planning.model_shapes import ModelFacts, freeze, make_twin, model_facts, precision_for
from cloze.tools.planning.recipe import Recipe
from cloze.tools.planning.settings import Choice, Sizes, all_choices, bucket_sizes, ds_config
from cloze.tools.planning.speed import Load, SpeedEstimate, pace_of, wire_bytes
from cloze.training.checkpointing.engine_probe import MAX_ROWS
from cloze.training.find_batch_size import SAFE_SHARE
from cloze.training.run_schedule import split_batch

ALIKE = 0.95  # of the fastest choice's tokens a second
LARGEST = 1 << 20  # blocks
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """A choice. `blocks`, `accumulation`: of its passes; `largest`: blocks of the largest pass that fits, None if
    activations could not be traced; `problem`: why it cannot be taken; `host_node`: bytes of host memory of a node;
    `flags`: of `cloze train`, beside the recipe's."""

    choice: Choice
    blocks: int
    accumulation: int
    largest: int | None
    memory: Memory
    host_node: float
    wire: float
    pace: SpeedEstimate | None
    problem: str | None
    flags: list[str]


@dataclass(frozen=True)
class Plan:
    """`recommended`: the row to take, None if none fits; `reason`: why, in words; `untraced`: why activations are
    left out, None if they are not."""

    gpu: Gpu
    ranks: int
    nodes: int
    precision: str
    facts: ModelFacts
    global_batch: int
    block_size: int
    tokens: float | None
    checkpoint: float
    rows: list[Row]
    recommended: Row | None
    reason: str
    untraced: str | None


class Weighing:
    """What all choices of one plan share."""

    def __init__(self, recipe: Recipe, gpu: Gpu, ranks_a_node: int, nodes: int):
        self.recipe, self.gpu = recipe, gpu
        self.ranks_a_node, self.ranks = ranks_a_node, ranks_a_node * nodes
        self.precision = precision_for(recipe, gpu)
        self.facts = model_facts(recipe)
        self.layout = recipe.layout(self.ranks)
        self.untraced: str | None = None
        self._again = Repeats()
        self._traces: dict[tuple[bool, bool, bool], Trace | None] = {}

    @cached_property
    def share(self) -> int:
        """Return blocks of a step on one rank."""
        return -(-self.layout.global_batch // self.ranks)

    def world(self, blocks: int) -> World:
        """Return the shape of the run with passes of `blocks` blocks."""
        return World(self.ranks, self.ranks_a_node, -(-self.share // blocks), self.precision, self.gpu.is_gpu)

    def trace(self, choice: Choice) -> Trace | None:
        """Return the trace of one of the choice's passes; None if the model cannot be traced."""
        half = _TYPES.get(self.precision)
        autocast = choice.stage is None and half is not None
        whole = half is None or (autocast and not choice.fully_sharded)  # FSDP2 gathers weights in 16 bit
        key = whole, autocast, choice.checkpointing
        if key not in self._traces:
            twin = make_twin(self.recipe, torch.float32 if whole else half or torch.float32, choice.checkpointing)
            freeze(twin, self.recipe.train.freeze, self.facts.unused)
            rows = max(1, round(self.recipe.block_size * self.recipe.train.mlm_probability))
            sparse, cast = self.recipe.train.sparse_head, half if autocast else None
            try:
                block_size, on_gpu = self.recipe.block_size, self.gpu.is_gpu
                self._traces[key] = trace_pass(twin, block_size, rows, cast, on_gpu, sparse, self._again)
            except Untraceable as error:
                self._traces[key], self.untraced = None, str(error)
        return self._traces[key]

    def rows(self, blocks: int) -> int:
        """Return the number of positions that the head computes in a pass."""
        sparse = self.recipe.train.sparse_head
        return self.recipe.rows(blocks, self.gpu.is_gpu) if sparse else blocks * self.recipe.block_size

    def peak(self, choice: Choice, blocks: int) -> float:
        """Return bytes at the highest, of a model that can be traced."""
        trace = self.trace(choice)
        assert trace is not None
        parts = parts_of(choice, self.facts, self.world(blocks), self.sizes(choice))
        return peak_of(parts, trace, blocks, self.rows(blocks), self.probed)

    @property
    def probed(self) -> int:
        """Return the number of positions whose scores exist at the same time when the masked-only head is checked and
        checkpoints' batch is answered (see `cloze.training.checkpointing.engine_probe`): one whole block without that
        head."""
        size = self.recipe.block_size
        if not self.recipe.train.sparse_head:
            return size
        checked = checked_length(self.recipe.model_config, PROBE_BLOCKS, size)
        return max(MAX_ROWS, PROBE_BLOCKS * checked)

    def sizes(self, choice: Choice) -> Sizes:
        """Return the sizes of DeepSpeed's buckets."""
        return bucket_sizes(ds_config(choice), self.facts.hidden_size)

    def largest(self, choice: Choice) -> int:
        """Return blocks of the largest pass that fits with a tenth to spare; 0 if not even one block does."""
        allowed = SAFE_SHARE * self.gpu.memory
        if self.peak(choice, 1) > allowed:
            return 0
        good, bad = 1, 2
        while bad < LARGEST and self.peak(choice, bad) <= allowed:
            good, bad = bad, 2 * bad
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self.peak(choice, middle) <= allowed else (good, middle)
        return good


def make_plan(
    recipe: Recipe, gpu: Gpu, ranks_a_node: int, nodes: int, network: float, host_memory: float | None
) -> Plan:
    """Weigh all choices. `network`: bytes per second between nodes; `host_memory`: bytes of a node, None for no limit.

    Raises ConfigError, ModelError.
    """
    with quiet():
        weighing = Weighing(recipe, gpu, ranks_a_node, nodes)
        with_fsdp = weighing.ranks > 1 and weighing.precision in ("no", "bf16")
        choices = all_choices(weighing.facts.can_checkpoint, gpu.is_gpu, with_fsdp)
        rows = [weigh(weighing, choice, network, host_memory) for choice in choices]
    recommended, reason = recommend(rows, gpu)
    batch, steps = weighing.layout.global_batch, recipe.train.max_steps
    tokens = recipe.tokens
    if tokens is None and steps > 0:
        tokens = float(weighing.layout.batch_sizes.samples_before(steps) * recipe.block_size)
    return Plan(
        gpu=gpu,
        ranks=weighing.ranks,
        nodes=nodes,
        precision=weighing.precision,
        facts=weighing.facts,
        global_batch=batch,
        block_size=recipe.block_size,
        tokens=tokens,
        checkpoint=checkpoint_bytes(weighing.facts),
        rows=rows,
        recommended=recommended,
        reason=reason,
        untraced=weighing.untraced,
    )


def weigh(weighing: Weighing, choice: Choice, network: float, host_memory: float | None) -> Row:
    """Return the memory and speed of one choice, and whether it fits."""
    recipe, gpu, facts = weighing.recipe, weighing.gpu, weighing.facts
    trace = weighing.trace(choice)
    largest = weighing.largest(choice) if trace is not None else None
    wanted = weighing.share if recipe.train.auto_find_batch_size else weighing.layout.per_device
    most = wanted if largest is None else max(1, min(wanted, largest))
    split = split_batch(weighing.layout, weighing.layout.global_batch, most)
    blocks, world = split.per_device, weighing.world(split.per_device)
    dense = blocks * recipe.block_size
    rows = weighing.rows(blocks)
    memory = memory_of(choice, facts, world, weighing.sizes(choice), trace, blocks, rows, dense, weighing.probed)
    host_node = weighing.ranks_a_node * max(memory.host, host_at_start(choice, facts))
    problem = None
    if largest == 0:
        problem = f"not even one block fits: {memory.peak / 2**30:.1f} GiB" if memory.peak else "does not fit"
    elif host_memory is not None and gpu.is_gpu and host_node > host_memory:
        problem = f"a node needs {host_node / 2**30:.0f} GiB of host memory"
    load = Load(blocks, dense, rows / dense, memory.activations or 0.0)
    tokens = weighing.layout.global_batch * recipe.block_size
    pace = pace_of(choice, facts, world, gpu, load, network, tokens) if trace is not None else None
    wire, flags = wire_bytes(choice, facts, world), train_flags(recipe.train, choice, split)
    return Row(choice, blocks, world.accumulation, largest, memory, host_node, wire, pace, problem, flags)


def train_flags(train: TrainConfig, choice: Choice, split: Layout) -> list[str]:
    """Return the options of `cloze train`, besides the recipe, for this choice with the same global batch."""
    words = ["--per_device_train_batch_size", str(split.per_device)]
    if train.global_batch_size is not None or split.size is not None:  # accumulation follows from it
        words += ["--global_batch_size", str(split.global_batch), "--gradient_accumulation_steps", "1"]
    else:
        words += ["--gradient_accumulation_steps", str(split.accumulation)]
    if choice.checkpointing != train.gradient_checkpointing:
        words += ["--gradient_checkpointing", str(choice.checkpointing).lower()]
    return words + (["--deepspeed", "null"] if train.deepspeed is not None else [])


def recommend(rows: list[Row], gpu: Gpu) -> tuple[Row | None, str]:
    """Return the row to take by the rule of this module, and why."""
    fitting = [row for row in rows if row.problem is None and row.largest is not None]
    if not any(row.largest is not None for row in rows):
        return None, "activations could not be traced, so what fits is not known; compare the other parts"
    if not fitting:
        least = min(rows, key=lambda row: row.memory.peak or float("inf"))  # untraced rows have no peak
        need = (least.memory.peak or 0) / 2**30
        return None, (
            f"nothing fits into {gpu.memory / 2**30:.0f} GiB with a tenth to spare: {least.choice.name} takes the "
            f"least, {need:.1f} GiB with one block; take more or larger GPUs, or shorter blocks"
        )
    order = {row.choice.name: place for place, row in enumerate(sorted(rows, key=_burden))}
    speed = {row.choice.name: _middle(row) for row in fitting}
    fastest = max(fitting, key=lambda row: speed[row.choice.name])
    alike = [row for row in fitting if speed[row.choice.name] >= ALIKE * speed[fastest.choice.name]]
    best = min(alike, key=lambda row: order[row.choice.name])
    return best, _reason(best, fastest, rows)


def _burden(row: Row) -> tuple[bool, int, bool]:
    """Return the key that sorts preferred choices first: without offload and recomputation, then least partitioned."""
    heavy = row.choice.checkpointing or row.choice.offload != "none"
    divided = 4 if row.choice.fully_sharded else -1 if row.choice.stage is None else row.choice.stage
    return heavy, divided, row.choice.checkpointing


def _middle(row: Row) -> float:
    """Return tokens per second; if the speed is unknown, blocks per pass instead."""
    return sum(row.pace.tokens_per_second) / 2 if row.pace is not None else float(row.blocks)


def _reason(best: Row, fastest: Row, rows: list[Row]) -> str:
    out = [row for row in rows if row.problem is not None and _burden(row) < _burden(best)]
    words = []
    if out:
        words.append(f"{out[0].choice.name} cannot be taken ({out[0].problem})")
    else:
        words.append("of those as fast it divides, offloads and recomputes the least")
    if best.pace is None:
        words.append("no speed is known here")
    elif best is fastest:
        words.append("no choice that fits is estimated to be faster")
    else:
        words.append(f"it is within 5 % of the fastest, {fastest.choice.name}, as estimated")
    return "; ".join(words)


def choose(plan: Plan, name: str | None) -> Row | None:
    """Return the row of a name, by default the recommended one. Raises ConfigError for an unknown name."""
    if name is None:
        return plan.recommended
    for row in plan.rows:
        if row.choice.name == name:
            return row
    known = ", ".join(row.choice.name for row in plan.rows)
    raise ConfigError("no such choice here", where=f"--choose {name}", hint=f"they are: {known}")
