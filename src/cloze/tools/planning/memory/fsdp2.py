"""What FSDP2 holds on each rank, as `cloze.training.engines.fsdp2` divides a model: torch 2.13,
distributed/fsdp/_fully_shard.

    parts = fsdp_parts(facts, World(8, 8, 1, "bf16"))
    sent = fsdp_wire(facts, World(8, 8, 1, "bf16"))

- Each parameter is divided by its rows, rounded up (chunk_with_empty, padded): weights, gradients, moments in fp32.
- A layer is gathered into one flat tensor, in bf16 in mixed precision, and copied from there into its parameters. The
  flat one of a layer stays until the next one was copied, in the forward pass (wait_for_unshard); in the backward
  pass the layer before is gathered while one computes (_backward_prefetch). What lies in no layer, embeddings and
  head, is gathered from the beginning of a pass to its end.
- When a layer's backward ends its gradients are put into a flat fp32 tensor, reduced to this rank's part, and that
  flat tensor stays until the next layer's backward has ended (foreach_reduce, reduce_scatter_states). Gradients of the
  rest stay, whole, to the end of the pass.
- Between the passes of a step gradients are kept whole, in fp32 (to_accumulated_grad_if_needed).
- Every rank makes the whole model, in host memory; a layer goes to the GPU whole, to be divided there.
"""

from __future__ import annotations

import numpy as np

from cloze.tools.planning.communication import fsdp_bytes_per_step
from cloze.tools.planning.memory.parts import Parts, World
from cloze.tools.planning.model_shapes import ModelFacts, Weight
from cloze.training.engines.optimizer_memory import optimizer_bytes


def own_part(weight: Weight, ranks: int) -> int:
    """Return elements of a parameter on the rank that has the most of it, and on every rank with padding."""
    return -(-weight.rows // ranks) * (weight.elements // max(weight.rows, 1))


def fsdp_parts(facts: ModelFacts, world: World) -> Parts:
    """Return bytes of the rank that holds the most, the first one."""
    ranks, width = world.ranks, 2 if world.precision == "bf16" else 4
    part = [own_part(weight, ranks) for weight in facts.weights]
    trained = sum(p for p, weight in zip(part, facts.weights, strict=True) if weight.trained)
    whole = _by_layer(facts, [p * ranks for p in part])
    rest, layer = whole.pop(0, 0), max(whole.values(), default=0)
    reduced = _by_layer(facts, [p * ranks * w.trained for p, w in zip(part, facts.weights, strict=True)])
    last, flat = reduced.pop(0, 0), max(reduced.values(), default=0)
    # What a pass keeps of a finished gradient, which has `width` bytes an element: this rank's part of it, in fp32; of
    # the rest all of it. With passes before, there is room for all gradients already.
    once = world.accumulation == 1
    staying = [1.0 if weight.layer == 0 else 4 / width / ranks for weight in facts.weights]
    if not once:
        staying = [float(width == 2 and weight.layer == 0) for weight in facts.weights]
    layers = (width * 2 + (width + 4)) * layer if layer else 0.0
    own = 4.0 * sum(part)
    return Parts(
        parameters=own,
        optimizer=optimizer_bytes(trained, facts.moments, None, half=False),
        lasting=0.0,
        gradients=4.0 * trained,
        waiting=0.0 if once else 4.0 * facts.trained,
        kept=np.array(staying),
        copies=0.0,
        buffers=float(width * rest + layers),
        step=float((width if once else 4) * last + 4 * last),  # the rest is reduced when all else is done
        start=own + 4.0 * max(rest, layer, flat),
        host=0.0,
        nvme=0.0,
    )


def _by_layer(facts: ModelFacts, sizes: list[int]) -> dict[int, int]:
    """Return sums over the parameters of each layer; key 0 is for parameters outside of layers."""
    found: dict[int, int] = {}
    for weight, size in zip(facts.weights, sizes, strict=True):
        found[weight.layer] = found.get(weight.layer, 0) + size
    return found


def fsdp_wire(facts: ModelFacts, world: World) -> float:
    """Return bytes that each rank sends in a step: all weights are gathered, gradients of the trained ones reduced."""
    in_layers = sum(weight.elements for weight in facts.weights if weight.layer)
    width = 2 if world.precision == "bf16" else 4
    sent = fsdp_bytes_per_step(facts.elements, in_layers, width, world.ranks, world.accumulation)
    return sent - 4 * facts.frozen * (world.ranks - 1) / world.ranks
