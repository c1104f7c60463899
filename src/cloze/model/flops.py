"""How many floating-point operations a training step takes, and what the machine could do: MFU.

Model FLOPs utilization (Chowdhery et al., "PaLM", 2022, appendix B): the operations that the model's arithmetic needs
for the observed tokens, over the peak of the hardware. Recomputation counts for nothing, and neither does what the
sparse head saves: a head on 15 % of the rows is counted on 15 % of the rows.
"""

from __future__ import annotations

from typing import Any

import torch

# Dense peak of tensor cores in TFLOP/s for bf16 (for fp16 where there is no bf16), from the vendors' data sheets.
PEAK_TFLOPS = {
    "V100": 125, "T4": 65, "A10": 125, "A100": 312, "A40": 150, "L4": 121, "L40S": 362, "RTX 3090": 71,
    "RTX 4090": 165, "H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
}  # fmt: skip


def step_flops(
    model: Any, num_tokens: int, block_size: int, mlm_probability: float, sparse: bool = True
) -> float | None:
    """Forward and backward of one step over `num_tokens` in blocks of `block_size`; None where the configuration does
    not tell the number and width of layers (perceiver).

    6 operations per weight of a matrix product and token (2 forward, 4 backward); for attention 12 * layers * hidden *
    block_size per token (scores and values). Embeddings are looked up, not multiplied, except as the head's decoder.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "hidden_size"):
        return None
    backbone = getattr(model, model.base_model_prefix, model)
    body = sum(_weights(module) for module in backbone.modules())
    head = sum(_weights(module) for module in model.modules()) - body
    attention = 12 * config.num_hidden_layers * config.hidden_size * block_size
    rows = num_tokens * (mlm_probability if sparse else 1.0)
    return float(num_tokens * (6 * body + attention) + rows * 6 * head)


def _weights(module: torch.nn.Module) -> int:
    if not isinstance(module, torch.nn.Linear):
        return 0
    return getattr(module.weight, "ds_numel", module.weight.numel())  # ZeRO-3 leaves an empty tensor


def peak_flops(precision: str) -> float | None:
    """Operations per second of this machine's GPU at its best; None on a CPU and on GPUs that are not in the table."""
    if not torch.cuda.is_available() or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name()
    found = [key for key in PEAK_TFLOPS if key in name]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None
