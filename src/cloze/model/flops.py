"""The floating-point operations of a training step, and the peak of the machine: MFU.

Model FLOPs utilization (Chowdhery et al., "PaLM", 2022, appendix B): the operations that the model's arithmetic needs
for the observed tokens, over the peak of the hardware. Recomputation is not counted, nor what the sparse head saves: a
head on 15 % of the rows is counted on 15 % of the rows, attention in a window on the window.

    flops = step_flops(model, num_tokens=8 * 512, block_size=512, mlm_probability=0.15)     # of one optimizer step
    mfu = flops / seconds / peak_flops("bf16")                                              # either may be None
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.integrations import deepspeed as integration

# Dense peak of tensor cores in TFLOP/s for bf16 (for fp16 if there is no bf16), accumulating in fp32, from the
# vendors' data sheets. Keys are words of torch.cuda.get_device_name(): "NVIDIA H100 80GB HBM3" is the SXM one.
PEAK_TFLOPS = {
    "V100": 125, "V100 PCIE": 112, "T4": 65, "A10": 125, "A10G": 70, "A30": 165, "A40": 150, "RTX A6000": 155,
    "A100": 312, "A800": 312, "L4": 121, "L40": 181, "L40S": 362, "RTX 6000 Ada": 364,
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210,
    "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H20": 148, "H200": 989, "H200 NVL": 835,
    "GH200": 989, "B200": 2250, "GB200": 2500,
}  # fmt: skip


def step_flops(
    model: Any, num_tokens: int, block_size: int, mlm_probability: float, sparse: bool = True
) -> float | None:
    """Return the operations of forward and backward of one step over `num_tokens` (all ranks') in blocks of
    `block_size`; None if the model's forward cannot be traced without data.

    `model`: the bare module, on any device; only its class and configuration are used. A copy without weights (meta
    device) reads one block, and its matrix products and convolutions are counted as they are called: a layer used
    twice counts twice, an embedding lookup does not count. The head, which begins where the backbone ends, counts on
    the share `mlm_probability` of the tokens if `sparse`. Backward: twice the forward.
    """
    try:
        body, head = block_flops(model, block_size)
    except Exception:  # a forward that depends on its data, or own kernels, may raise anything
        return None
    share = mlm_probability if sparse else 1.0
    return 3 * (body + share * head) * num_tokens / block_size


def block_flops(model: Any, block_size: int) -> tuple[float, float]:
    """Return the operations of a forward of one block [1, block_size]: of the backbone, and of the head on all rows.

    Raises any error of the model's forward on tensors without data.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # plain matrix products, which can be counted
    with torch.random.fork_rng(devices=[]), torch.device("meta"), undivided():
        twin = type(model)(config).eval()
        ids = torch.zeros((1, block_size), dtype=torch.long)
    inputs = {"input_ids": ids}
    try:
        body, whole = _count(twin, inputs)
    except Exception:  # some architectures search for padding tokens without a mask
        body, whole = _count(twin, inputs | {"attention_mask": torch.ones_like(ids)})
    return body - unseen_attention(config, block_size), whole - body


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Make models inside the block whole: under ZeRO-3 transformers would divide the submodels that it creates
    (ModernVBert's text model) among the ranks, and wait for them."""
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


def _count(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Return the operations until the backbone ends, and of the whole forward."""
    backbone = getattr(model, model.base_model_prefix, model)
    ends: list[int] = []
    with _Counter() as counter, torch.no_grad():
        hook = backbone.register_forward_hook(lambda *_: ends.append(counter.total))
        try:
            model(**inputs)
        finally:
            hook.remove()
    return ends[0], counter.total


class _Counter(TorchDispatchMode):
    """Adds up the operations of every call that torch has a formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:  # `if mask.all()`: it is not
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def unseen_attention(config: Any, block_size: int) -> float:
    """Return the operations of one block's forward that full attention spends outside of the window of local layers.

    Scores and values take 4 * heads * head_dim operations a pair. A token sees `sliding_window` tokens to either side.
    """
    config = config.get_text_config()
    local = sum(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if not local or not isinstance(window, int) or window >= block_size:
        return 0.0
    seen = block_size * (2 * window + 1) - window * (window + 1)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4.0 * width * (block_size**2 - seen) * local


def peak_flops(precision: str) -> float | None:
    """Return the peak operations per second of this machine's GPU; None on a CPU and for unknown GPUs."""
    if not torch.cuda.is_available() or precision not in ("bf16", "fp16"):
        return None
    return device_peak(torch.cuda.get_device_name())


def device_peak(name: str) -> float | None:
    """Return `peak_flops` by name (`torch.cuda.get_device_name()`); slices (MIG) and laptops have less."""
    words = f" {re.sub(r'[^0-9A-Za-z]+', ' ', name)} "
    if " MIG " in words or " Laptop " in words:
        return None
    found = [key for key in PEAK_TFLOPS if f" {key} " in words]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None
