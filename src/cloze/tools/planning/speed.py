"""How fast a choice may be: a roofline, as a range. An estimate from data sheets, compared with one GPU so far.

    pace = pace_of(choice, facts, world, gpu, load, network=12.5e9)
    pace.seconds                    # (fast, slow) of one optimizer step
    pace.mfu                        # (low, high)

A pass takes what its arithmetic and its memory traffic take (Williams et al. 2009, "Roofline"), whichever is longer at
best, one after the other at worst. Arithmetic runs at 30 to 60 % of the peak of tensor cores: published trainings of
large transformers have 46 % (Chowdhery et al. 2022, PaLM) to 52 % (Narayanan et al. 2021, Megatron on A100) end to
end. Narrow models and small passes keep a GPU less busy: 18 % at the slow end below a width of 1,024, and as if each
pass had 2,048 more tokens. (Three models of width 768, not compiled, took an H200 to 15 to 24 % of its peak.) Memory
traffic is each activation written once and read twice, and the same for its gradient.
Messages go in full overlap with the backward pass at best, in none at worst, over the slowest link of the ring.
The step reads and writes weights, moments and gradients once; offloaded, gradients go to the host and weights come
back over PCIe, moments move through host memory at 50 to 150 GB/s a node, and with NVMe through 2 to 7 GB/s a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloze.tools.planning.communication import bytes_per_step
from cloze.tools.planning.gpus import Gpu
from cloze.tools.planning.memory.fsdp2 import fsdp_wire
from cloze.tools.planning.memory.per_rank import World
from cloze.tools.planning.model_shapes import ModelFacts
from cloze.tools.planning.settings import Choice

BEST_SHARE, USUAL_SHARE, NARROW_SHARE = 0.60, 0.30, 0.18
NARROW = 1024
IDLE_TOKENS = 2048
HOST_BYTES = (150e9, 50e9)  # per second of a node: fast, slow
NVME_BYTES = (7e9, 2e9)
FP32_SHARE = 1 / 16  # of the 16-bit peak: fp32 without tensor cores (A100: 19.5 of 312 TFLOP/s)
Range = tuple[float, float]


@dataclass(frozen=True)
class Load:
    """One rank's pass: blocks, tokens, share of positions that the head computes, and bytes of activations."""

    blocks: int
    tokens: int
    head_share: float
    activations: float


@dataclass(frozen=True)
class SpeedEstimate:
    """`seconds` of a step: fast, slow; tokens per second and MFU: low, high; `wire`: bytes a rank sends in a step."""

    seconds: Range
    tokens_per_second: Range
    mfu: Range
    wire: float


def wire_bytes(choice: Choice, facts: ModelFacts, world: World) -> float:
    """Return bytes that each rank sends in a step: see cloze.tools.planning.communication."""
    if choice.fully_sharded:
        return fsdp_wire(facts, world)
    stage = choice.stage or 0
    return bytes_per_step(facts.trained, world.width(choice.stage), world.ranks, stage, world.accumulation)


def pace_of(
    choice: Choice, facts: ModelFacts, world: World, gpu: Gpu, load: Load, network: float, step_tokens: float
) -> SpeedEstimate | None:
    """Return the speed of a run; None if the GPU's peak or the model's operations are unknown. `network`: bytes per
    second between nodes; `step_tokens`: of the global batch."""
    if gpu.peak is None or facts.flops is None:
        return None
    body, head = facts.flops
    useful = 3 * (body + load.head_share * head) * load.blocks
    work = useful + (body * load.blocks if choice.checkpointing else 0.0)
    peak = gpu.peak * (FP32_SHARE if world.precision == "no" else 1.0)
    busy = load.tokens / (load.tokens + IDLE_TOKENS)
    usual = USUAL_SHARE if (facts.hidden_size or 0) >= NARROW else NARROW_SHARE
    traffic = 6 * load.activations / gpu.hbm
    sent = wire_bytes(choice, facts, world)
    link = gpu.link if world.ranks == world.ranks_a_node else min(gpu.link, network)
    talking = sent / link if sent else 0.0
    fast = world.accumulation * max(work / (peak * BEST_SHARE * busy), traffic)
    slow = world.accumulation * (work / (peak * usual * busy) + traffic)
    moved = _step_seconds(choice, facts, world, gpu)
    seconds = max(fast, talking) + moved[0], slow + talking + moved[1]
    flops = useful * world.accumulation
    return SpeedEstimate(
        seconds=seconds,
        tokens_per_second=(step_tokens / seconds[1], step_tokens / seconds[0]),
        mfu=(flops / seconds[1] / gpu.peak, flops / seconds[0] / gpu.peak),
        wire=sent,
    )


def _step_seconds(choice: Choice, facts: ModelFacts, world: World, gpu: Gpu) -> Range:
    """Return seconds of the optimizer's step and of offload transfers: fast, slow."""
    ranks = 1 if choice.stage in (None, 0) and not choice.fully_sharded else world.ranks
    part, width = facts.trained / ranks, world.width(choice.stage)
    state = part * (4 * (3 + 2 * facts.moments) + width)
    if choice.offload == "none":
        return state / gpu.hbm, 2 * state / gpu.hbm
    over = 2 * width * part * world.accumulation  # gradients down, weights up
    if choice.offload in ("all", "nvme"):  # weights come for forward and backward of each pass
        over += 2 * width * part * world.accumulation
    found = []
    for host, nvme in zip(HOST_BYTES, NVME_BYTES, strict=True):
        seconds = over / gpu.pcie + state * world.ranks_a_node / host
        if choice.offload == "nvme":
            seconds += (part * 8 * (1 + facts.moments) + over) * world.ranks_a_node / nvme
        found.append(seconds)
    return found[0], found[1]
