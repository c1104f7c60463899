"""What ZeRO-Offload holds in host memory and on a disk, tensor by tensor, as DeepSpeed 0.19 allocates it.

    host_1_2(parts, accumulated, biggest, width=2, moments=2, on_gpu=True)      # bytes of one rank
    host, nvme, left = host_3(choice, facts, world, sizes)

(Ren et al. 2021, "ZeRO-Offload"; Rajbhandari et al. 2021, "ZeRO-Infinity".) `pin_memory: true`, as in ds_configs/,
locks what travels to the GPU, for which torch takes the next power of two (ATen/core/CachingHostAllocator.h); without
a GPU nothing is locked. Moments and ZeRO-3's fp32 weights are not locked.

- Stages 1 and 2 (stage_1_and_2.py), of each group: fp32 weights and gradients, and a copy of the weights in the
  model's type (param_buffer_of_bit16_for_cpu_offload_groups); a buffer as large as the largest parameter; and stage 2,
  between the passes of a step, the gradient of every parameter of which the rank has some, whole, one by one
  (accumulated_grads_in_cpu). Stage 1 keeps those on the GPU.
- Stage 3 (stage3.py): fp32 weights and gradients of each sub-group, a flat tensor of all gradients in the model's
  type, and with `offload_param` the weights themselves.
- NVMe (swap_tensor/): four fp32 buffers as large as the largest sub-group, and five of 10^8 weights; the first 10^9
  weights stay in host memory. Files hold fp32 weights, moments, and gradients of at least a MiB (min_aio_bytes).
  Smaller sub-groups stay in host memory; smaller gradients of the others wait for the step on the GPU, in fp32
  (_offload_grad_partition_at_boundary, unswapped_gradients).
"""

from __future__ import annotations

from collections.abc import Iterable

from cloze.tools.planning.memory.parts import World
from cloze.tools.planning.model_shapes import ModelFacts
from cloze.tools.planning.settings import Choice, Sizes

NVME_BUFFERS = 4  # buffer_count of offload_optimizer
NVME_WEIGHTS = 5 * 10**8  # buffer_count x buffer_size of offload_param, elements
NVME_IN_HOST = 10**9  # max_in_cpu of offload_param, elements
SMALLEST_FILE = 1 << 20  # bytes: block_size of aio


def pinned(sizes: Iterable[float], on_gpu: bool) -> float:
    """Return the bytes that page-locked buffers of these sizes occupy together."""
    return float(sum(1 << (int(size) - 1).bit_length() if on_gpu and size >= 1 else size for size in sizes))


def host_1_2(
    parts: list[int], accumulated: list[int], biggest: int, width: int, moments: float, on_gpu: bool
) -> float:
    """Return bytes of host memory. `parts`: elements of the rank's part of each group; `accumulated`: of each
    parameter whose gradient waits for the next pass; `biggest`: of the largest parameter; `width`: bytes of a
    weight."""
    locked = [size * part for part in parts for size in (4, 4, width)]
    locked += [width * size for size in [biggest, *accumulated]]
    return 4 * moments * sum(parts) + pinned(locked, on_gpu)


def host_3(choice: Choice, facts: ModelFacts, world: World, sizes: Sizes) -> tuple[float, float, float]:
    """Return bytes of host memory, of the disk, and of gradients that are left on the GPU."""
    width, moments, on_gpu = world.width(3), facts.moments, world.on_gpu
    pieces = [[-(-size // world.ranks) for size in group] for group in facts.groups]
    groups = [min(part - at, sizes.sub_group) for part in map(sum, pieces) for at in range(0, part, sizes.sub_group)]
    part = sum(groups)
    flat = [width * part]  # of all gradients
    if choice.offload == "optimizer":
        return 4 * (1 + moments) * part + pinned([*flat, *(4 * group for group in groups)], on_gpu), 0.0, 0.0
    if choice.offload == "all":
        locked = flat + [size * group for group in groups for size in (4, width)]
        return 4 * (1 + moments) * part + pinned(locked, on_gpu), 0.0, 0.0
    staying = [group for group in groups if 4 * group < SMALLEST_FILE]
    away = part - sum(staying)
    gone = [group for group in pieces if 4 * min(sum(group), sizes.sub_group) >= SMALLEST_FILE]
    small = sum(piece for group in gone for piece in group if 4 * piece < SMALLEST_FILE)
    locked = [*flat, *(4 * group for group in staying), width * min(part, NVME_IN_HOST)]
    buffers = 4 * NVME_BUFFERS * max(groups) + width * NVME_WEIGHTS
    host = buffers + 4 * (1 + moments) * sum(staying) + pinned(locked, on_gpu)
    nvme = 4 * (1 + moments) * away + 4 * (away - small) + width * max(0, part - NVME_IN_HOST)
    return host, nvme, 4.0 * small
