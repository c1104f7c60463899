"""What an engine holds of the optimizer beside the weights that the model computes with.

optimizer_bytes(elements=124_645_632, moments=2, stage=2, half=True)      # 1,495,747,584: fp32 weights and moments
"""

from __future__ import annotations


def has_own_weights(stage: int | None, half: bool) -> bool:
    """Whether the optimizer steps fp32 weights of its own. `stage`: of ZeRO, None for DDP; `half`: bf16 or fp16.

    DDP steps the model's weights, which are fp32, and so does stage 0 in fp32. All else of DeepSpeed has a copy, in
    fp32 too (`single_partition_of_fp32_groups`, `fp32_partitioned_groups_flat`, `fp32_groups`).
    """
    return stage is not None and (half or stage > 0)


def optimizer_bytes(elements: float, moments: float, stage: int | None, half: bool) -> float:
    """Bytes for so many trained elements of a rank, with `moments` tensors each (AdamW: 2; a moving average of the
    weights is one more), all in fp32."""
    return 4 * elements * (moments + has_own_weights(stage, half))
