"""The output layer of a vocabulary whose size is no multiple of 8, for tensor cores.

In 16 bit a matrix product runs on the fast kernels of cuBLAS only if each row begins at a multiple of 16 bytes
(NVIDIA, "Matrix Multiplication Background User's Guide", tensor core requirements). RoBERTa's 50,265 scores a row do
not: on an H200 (torch 2.11) the three products of its head ran on kernels named `align1` at 119 TFLOP/s, the products
of the layers at 500 to 700. With rows of zeros below the weights, and their scores cut off again, the scores that stay
are the same sums; parameters, checkpoints and gradients know nothing of it.

    align_output_layer(model)       # before anything wraps the model
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_NEEDED, _MULTIPLE = 8, 64  # elements: what the kernels need, and whole tiles of them


def align_output_layer(model: Any) -> bool:
    """Compute scores for the vocabulary with padding rows if the layer needs it; return whether it does."""
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or layer.out_features % _NEEDED == 0:
        return False
    layer.forward = lambda input: padded_linear(input, layer.weight, layer.bias)  # type: ignore[method-assign]
    return True


def padded_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return hidden [..., H] @ weight [V, H].T + bias [V] as [..., V], a view of a product with a multiple of 64
    columns."""
    size = weight.shape[0]
    extra = -size % _MULTIPLE
    weight = F.pad(weight, (0, 0, 0, extra))
    bias = None if bias is None else F.pad(bias, (0, extra))
    return F.linear(hidden, weight, bias)[..., :size]
