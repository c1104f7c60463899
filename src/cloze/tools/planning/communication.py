"""How many bytes each optimizer step sends over the network: what to size one by.

    bytes_per_step(parameters=124_645_632, bytes_per_element=2, world_size=16, stage=2)      # 701 MB
    fsdp_bytes_per_step(parameters=124_645_632, in_layers=85_054_464, bytes_per_element=2, world_size=16)

N ranks exchange P parameters of b bytes each (2 in mixed precision, 4 in fp32). In a ring, a reduce-scatter or an
all-gather sends (N-1)/N P b from each rank, and an all-reduce, which is one after the other, twice that (Rajbhandari
et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020, section 7).
"""

from __future__ import annotations


def bytes_per_step(
    parameters: int,
    bytes_per_element: int,
    world_size: int,
    stage: int,
    micro_batches: int = 1,
    backend: str = "nccl",
) -> float:
    """Return bytes that each rank sends, and receives, per optimizer step. A ring leaves each machine once, so it is
    also the bytes that leave a machine, for any number of GPUs.

    In units of (N-1)/N P b, with m micro-batches:

    - DDP and stage 0: 2, one all-reduce of the gradients.
    - Stage 1: 3, and stage 2: 2 m + 1. The paper has 2 and m + 1: a reduce-scatter of gradients, one all-gather of
      weights. DeepSpeed (0.19) all-reduces the gradients, of every micro-batch in stage 2, unless
      `use_multi_rank_bucket_allreduce` is false.
    - Stage 3: 3 m: weights are gathered for forward and again for backward, and gradients reduce-scattered.
      On "gloo" it is 4 m, as torch's reduce-scatter there is an all-reduce.

    Left out are headers, the norm of the gradients and the like, under 5 % from some million parameters on.
    """
    reduce_scatter = 2 if backend == "gloo" else 1
    units = {0: 2, 1: 3, 2: 2 * micro_batches + 1, 3: (2 + reduce_scatter) * micro_batches}[stage]
    return units * (world_size - 1) / world_size * parameters * bytes_per_element


def fsdp_bytes_per_step(
    parameters: int,
    in_layers: int,
    bytes_per_element: int,
    world_size: int,
    micro_batches: int = 1,
    backend: str = "nccl",
) -> float:
    """Return the same under FSDP2 as `cloze.training.engines.fsdp2` divides a model, `in_layers` of whose parameters
    lie in its layers.

    In every micro-batch weights are gathered, `bytes_per_element` each: those of the layers for forward and again for
    backward, the rest once. Gradients are reduce-scattered in fp32 with the last one, on "gloo" by an all-reduce.
    """
    gathered = micro_batches * (parameters + in_layers) * bytes_per_element
    reduced = (2 if backend == "gloo" else 1) * parameters * 4
    return (gathered + reduced) * (world_size - 1) / world_size
