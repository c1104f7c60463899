"""Estimate the memory of a choice on each rank, by kind, from the allocations in the engines' code.

    world = World(ranks=16, ranks_a_node=8, accumulation=1, precision="bf16")
    needs = memory_of(Choice(2), facts, world, trace, blocks=32, rows=(960, 4096))
    needs.peak, needs.parameters, needs.host

The sizes are ZeRO's (Rajbhandari et al. 2020, section 3: 2 + 2 + 12 bytes a parameter in mixed precision), but what
counts is what DeepSpeed 0.19 and torch's DDP really hold:

- DDP: weights, gradients and moments in fp32, and with several ranks the buckets in which gradients travel, as large
  as all gradients (gradient_as_bucket_view is off in accelerate). In 16 bit, autocast's copies are activations.
- Every stage of DeepSpeed has fp32 weights beside those that the model computes with, in fp32 too, but for stage 0
  in fp32, which is a plain optimizer. Gradients have the model's type (engine.get_data_types), fp32 only in the step.
- Stage 0: gradients are copied flat for the all-reduce, up to 5 x 10^8 at a time (buffered_allreduce_fallback).
- Stages 1 and 2 (zero/stage_1_and_2.py): one flat tensor of each group; a rank has 1/N of its fp32 weights and of its
  moments, padded to 2 N elements; the gradients of the parameters in its part, whole (copy_grads_in_partition); two
  buckets (setup_buckets). A parameter larger than a bucket goes alone, and stage 1 keeps its gradient to the end of
  the pass. Stage 2 keeps an earlier micro-batch's gradients beside those of the present one; stage 1 keeps them all.
- Stage 3 (zero/stage3.py): of each parameter 1/N, rounded up; small ones whole too; a flat tensor of its gradients;
  weights that were gathered, of which those needed again within max_reuse_distance stay: from the forward pass to the
  backward pass of a model of half of it, so of all models up to 5 x 10^8 parameters.
- FSDP2: see `cloze.tools.planning.memory.fsdp2`; what is offloaded: `cloze.tools.planning.memory.zero_offload`.
- A gradient is copied once more to be sent, as flat slices (average_tensor, reduce_scatter_coalesced).
"""

from __future__ import annotations

from dataclasses import dataclass

from cloze.tools.planning.activations import Trace
from cloze.tools.planning.memory.fsdp2 import fsdp_parts
from cloze.tools.planning.memory.parts import Parts, World
from cloze.tools.planning.memory.zero_offload import host_1_2, host_3
from cloze.tools.planning.model_shapes import ModelFacts
from cloze.tools.planning.settings import Choice, Sizes
from cloze.training.engines.optimizer_memory import has_own_weights, optimizer_bytes

_ALL_REDUCE = 5 * 10**8  # elements at a time, stage 0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `gradients` as they are when the backward pass ends; `buffers`: for messages to other ranks,
    and gathered weights; `logits` with the sparse head, `logits_dense` without; `peak` is less than the sum of the
    parts, which are not all there at the same time. `host`: of host memory; `nvme`: of the disk. What depends on
    activations is None if they could not be traced."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float | None
    logits: float | None
    logits_dense: float | None
    peak: float | None
    host: float
    host_start: float
    nvme: float


def memory_of(
    choice: Choice,
    facts: ModelFacts,
    world: World,
    sizes: Sizes,
    trace: Trace | None,
    blocks: int,
    rows: int,
    dense: int,
    probed: int = 0,
) -> Memory:
    """`rows`: positions of `blocks` blocks that the head predicts, `dense` without the sparse head; `probed`: see
    `peak_of`."""
    parts = parts_of(choice, facts, world, sizes)
    at_start = host_at_start(choice, facts)
    activations = logits = logits_dense = peak = None
    if trace is not None:
        activations, logits, logits_dense = trace.activations(blocks), trace.logits(rows), trace.logits(dense)
        peak = max(peak_of(parts, trace, blocks, rows, probed), 0.0 if world.on_gpu else at_start)
    return Memory(
        parameters=parts.parameters,
        gradients=parts.gradients,
        optimizer=parts.optimizer,
        buffers=parts.lasting + parts.buffers,
        activations=activations,
        logits=logits,
        logits_dense=logits_dense,
        peak=peak,
        host=parts.host,
        host_start=at_start,
        nvme=parts.nvme,
    )


def peak_of(parts: Parts, trace: Trace, blocks: int, rows: int, probed: int = 0) -> float:
    """Return bytes at the highest: in the pass, in the step, while the engine is made, or while the stored batch is
    answered (`probed`: positions that the head predicts then, whose scores all stay)."""
    held = parts.parameters + parts.optimizer + parts.lasting
    pass_peak = held + parts.waiting + parts.buffers + trace.peak(blocks, rows, parts.kept, parts.copies)
    return max(pass_peak, held + parts.gradients + parts.step, parts.start, held + trace.logits(probed))


def parts_of(choice: Choice, facts: ModelFacts, world: World, sizes: Sizes, rank: int | None = None) -> Parts:
    """Return what the engine of a choice holds. `rank`: whose part; None: the largest."""
    if choice.fully_sharded:
        return fsdp_parts(facts, world)
    if choice.stage is None:
        return _ddp(facts, world)
    if choice.stage == 0:
        return _stage_0(facts, world)
    if choice.stage == 3:
        return _stage_3(choice, facts, world, sizes)
    return _stage_1_2(choice, facts, world, sizes, rank)


def _ddp(facts: ModelFacts, world: World) -> Parts:
    weights, trained = 4.0 * facts.elements, 4.0 * facts.trained
    moments = optimizer_bytes(facts.trained, facts.moments, None, world.precision != "no")
    lasting = trained if world.ranks > 1 else 0.0
    once = world.accumulation == 1
    return Parts(
        parameters=weights, optimizer=moments, lasting=lasting, gradients=trained, waiting=0.0 if once else trained,
        kept=float(once), copies=0.0, buffers=0.0, step=0.0, start=weights, host=0.0, nvme=0.0,
    )  # fmt: skip


def _stage_0(facts: ModelFacts, world: World) -> Parts:
    width = world.width(0)
    trained = float(facts.trained)
    optimizer = optimizer_bytes(trained, facts.moments, 0, width == 2)
    travelling = width * min(trained, _ALL_REDUCE) if world.ranks > 1 else 0.0
    once = world.accumulation == 1
    step = max(travelling, 4 * trained if width == 2 else 0.0)
    return Parts(
        parameters=width * float(facts.elements), optimizer=optimizer, lasting=0.0, gradients=width * trained,
        waiting=0.0 if once else width * trained, kept=float(once), copies=0.0, buffers=0.0, step=step,
        start=width * facts.elements + 4 * trained * has_own_weights(0, width == 2), host=0.0, nvme=0.0,
    )  # fmt: skip


def partition(sizes: list[int], ranks: int) -> int:
    """Return elements of one rank's part of a group's flat tensor (nccl_start_alignment_factor is 2)."""
    return 2 * -(-sum(sizes) // (2 * ranks))


def overlapping(sizes: list[int], ranks: int, rank: int) -> list[int]:
    """Return elements of each parameter, whole, of which a rank's part of the flat tensor has some."""
    part = partition(sizes, ranks)
    begin, end, at, found = rank * part, (rank + 1) * part, 0, []
    for size in sizes:
        if at < end and at + size > begin:
            found.append(size)
        at += size
    return found


def _stage_1_2(choice: Choice, facts: ModelFacts, world: World, sizes: Sizes, rank: int | None) -> Parts:
    width, ranks = world.width(choice.stage), world.ranks
    shares = [partition(group, ranks) for group in facts.groups]
    flat = [share * ranks for share in shares]
    part, largest = float(sum(shares)), max(shares)
    everyone = range(ranks) if rank is None else [rank]
    touched = max(([n for group in facts.groups for n in overlapping(group, ranks, one)] for one in everyone), key=sum)
    own = float(sum(touched))
    optimizer = optimizer_bytes(part, facts.moments, choice.stage, width == 2)
    offload, once = choice.offload != "none", world.accumulation == 1
    biggest = max(map(max, facts.groups))
    alone = sum(size for group in facts.groups for size in group if size > sizes.reduce_bucket)
    buckets = 2.0 * width * sizes.reduce_bucket + (width * biggest if offload else 0.0)
    kept = 0.0
    if choice.stage == 1:
        waiting = width * (own + (0 if once else facts.trained))
        kept = alone / facts.trained * (1 - min(own / facts.trained, 1.0)) if once else 0.0
    else:
        waiting = width * own * (1 if once else 2)
    gradients = width * own
    if offload:
        waiting, gradients = (waiting - width * own if choice.stage == 1 else 0.0), 0.0
    parameters = width * float(sum(flat) + facts.frozen)
    later = touched if choice.stage == 2 and not once else []
    host = host_1_2(shares, later, biggest, width, facts.moments, world.on_gpu) if offload else 0.0
    return Parts(
        parameters=parameters, optimizer=0.0 if offload else optimizer, lasting=0.0, gradients=gradients,
        waiting=waiting, kept=kept, copies=float(ranks > 1), buffers=buckets,
        step=0.0 if offload else largest * (4 + (width if width == 2 else 0)),
        start=parameters + width * max(flat) + (0.0 if offload else 4 * part),
        host=host, nvme=0.0,
    )  # fmt: skip


def _stage_3(choice: Choice, facts: ModelFacts, world: World, sizes: Sizes) -> Parts:
    width, ranks = world.width(3), world.ranks
    every = [size for group in facts.groups for size in group]
    part = float(sum(-(-size // ranks) for size in every)) + facts.frozen / ranks
    whole = float(sum(size for size in every if size <= sizes.persistence))
    passing = facts.elements - whole
    biggest = float(max(every))
    ahead = biggest + min(sizes.prefetch_bucket, passing)
    gathered = min(passing, sizes.reuse_distance / 2 + ahead)
    group = min(part, float(sizes.sub_group))
    offload = choice.offload != "none"
    away = choice.offload in ("all", "nvme")
    optimizer = optimizer_bytes(part, facts.moments, choice.stage, width == 2)
    parameters = width * ((0.0 if away else part) + whole)
    host, nvme, left = host_3(choice, facts, world, sizes) if offload else (0.0, 0.0, width * part)
    return Parts(
        parameters=parameters, optimizer=0.0 if offload else optimizer, lasting=0.0,
        gradients=left, waiting=left, kept=0.0, copies=1.0,
        buffers=width * (sizes.reduce_bucket + gathered),
        step=width * sizes.reduce_bucket + (0.0 if offload else group * (4 + (width if width == 2 else 0))),
        start=width * (part + biggest), host=host, nvme=nvme,
    )  # fmt: skip


def host_at_start(choice: Choice, facts: ModelFacts) -> float:
    """Return bytes of host memory while a rank builds its model in fp32; under ZeRO-3 it lies in mapped files, which
    are the operating system's to drop (see `cloze.training.engines.zero3`), all but one tensor."""
    if choice.stage == 3:
        return 4.0 * max(size for group in facts.groups for size in group)
    return 4.0 * facts.elements


def checkpoint_bytes(facts: ModelFacts) -> float:
    """Return bytes of one of our checkpoints: fp32 weight and each moment of what is trained, the rest once."""
    return 4.0 * (facts.trained * (1 + facts.moments) + facts.frozen)
