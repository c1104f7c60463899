"""What keeps the function of a model the same while it grows, and the proof that it did.

Wider (Net2Net: Chen, Goodfellow and Shlens, 2016; bert2BERT: Chen et al., 2022): every place of a wider layer is a
copy of an old one, so what reads the copies must weigh them so that together they count once. The copies of one place
get unequal shares, which add up to 1: with equal ones their gradients would always be equal, and they would never
become different (LEMON: Wang et al., 2024). Norms see the same mean and variance where every place has the same number
of copies, hence the width must be a multiple of the old one. Where the decoder is tied to the embeddings, which cannot
be weighed, the norm before it is.

Deeper: the second and later copies of a layer begin by adding nothing: their last matrices are zero. That is possible
where norms come first (ModernBERT, ESM-2), not after (BERT, RoBERTa).

All of this rests on what models usually look like. So the new model answers the same random texts, and nothing is
written unless its answers are those of the old one.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PretrainedConfig

from cloze.checkpoint.probe import TOLERANCE
from cloze.errors import ConfigError, ModelError
from cloze.model.archs import fixed_length
from cloze.model.in_float32 import InFloat32
from cloze.tools.grow.axes import Heads, Map
from cloze.tools.grow.vocabulary import Rows
from cloze.utils.closeness import relative_difference, within

FLAG = "--method function_preserving"
# The last matrices of attention and of the feed-forward part, as architectures with norms in front call them.
LAST = re.compile(r"(\bWo|o_proj|output\.dense|down_proj)\.(weight|bias)$")
TEXTS, LENGTH, COLUMNS = 2, 16, 4096


def check_possible(old: Heads, new: Heads) -> None:
    """Raise ConfigError for widths at which the function cannot stay the same."""
    if new.hidden % old.hidden:
        raise ConfigError(
            f"the hidden size must be a multiple of {old.hidden}, not {new.hidden}",
            where=FLAG,
            hint="leave it out: weights are tiled then",
        )
    if new.head_dim != old.head_dim:
        raise ConfigError(
            f"heads have {old.head_dim} places and would have {new.head_dim}",
            where=FLAG,
            hint=f"give num_attention_heads={new.hidden // old.head_dim} too",
        )


def shares(copies: Map) -> torch.Tensor:
    """Return the share of each copy, from old indices [n] -> [n]: shares of one index add up to 1, and no two are
    equal."""
    order = torch.argsort(copies, stable=True)
    counts = torch.bincount(copies)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(copies)
    rank[order] = torch.arange(len(copies)) - first[copies[order]]
    number = counts[copies].double()
    spread = torch.where(number > 1, rank / (number - 1).clamp(min=1) - 0.5, 0.0)  # -1/2 .. 1/2
    return (1 + spread) / number


@torch.no_grad()
def before_decoder(model: Any) -> set[str]:
    """Return the weights of the module whose output the tied decoder reads. Raises ModelError if nothing else is
    there."""
    decoder = model.get_output_embeddings()
    if not isinstance(decoder, torch.nn.Module):
        raise ModelError("has no decoder that could be followed", where=type(model).__name__, hint=f"leave {FLAG} out")
    names = {module: name for name, module in model.named_modules()}
    outputs: list[tuple[torch.nn.Module, Any]] = []
    read: list[Any] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
        for module in names
        if not list(module.children())
    ]
    hooks.append(decoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])))
    try:
        with _computing(model):
            model(input_ids=_random_ids(torch.arange(_vocab_size(model)), model.config)[:1])
    finally:
        for hook in hooks:
            hook.remove()
    for module, output in reversed(outputs):
        if read and output is read[-1] and module.state_dict():
            return {f"{names[module]}.{name}" for name in module.state_dict()}
    raise ModelError(
        "nothing with weights comes directly before the decoder", where=type(model).__name__, hint=f"leave {FLAG} out"
    )


@torch.no_grad()
def compare(old: Any, new: Any, rows: Rows | None, reshaped: bool) -> str:
    """Return what was compared, in words. Raises ModelError if the new model does not answer as the old one.

    `rows`: of the new vocabulary; None if it stayed the same; `reshaped`: whether layers or widths changed. Texts
    and answers are of tokens that both have.
    """
    if rows is None:
        here = there = torch.arange(_vocab_size(old))
    else:
        single = torch.diff(rows.starts, append=torch.tensor([len(rows.old)])) == 1
        here = single.nonzero().reshape(-1)
        there = rows.old[rows.starts[here]]
    picks = _random_ids(torch.arange(len(here)), old.config)
    with _computing(old):
        stored = old(input_ids=there[picks]).logits.float()
    with _computing(new):
        answers = new(input_ids=here[picks]).logits.float()
    some = torch.linspace(0, len(here) - 1, min(COLUMNS, len(here))).long()
    width = stored.shape[-1]
    difference = relative_difference(
        answers.reshape(-1, answers.shape[-1])[:, here[some]], stored.reshape(-1, width)[:, there[some]]
    )
    allowed = TOLERANCE[{torch.bfloat16: "bf16", torch.float16: "fp16"}.get(new.dtype, "no")]
    if not within(difference, allowed):
        raise ModelError(
            f"the function would not stay the same (logits differ by {difference:.1e} of the largest)",
            where=type(new).__name__,
            hint=f"{FLAG} cannot be used with this architecture and change; leave it out"
            if reshaped
            else "the code of this architecture has ids of special tokens in it; it cannot get this tokenizer",
        )
    return f"answers as the old model does, to {difference:.0e} of the largest logit"


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _random_ids(tokens: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Return [TEXTS, S] token ids, the same ones each time; S is a length that the architecture accepts."""
    length = fixed_length(config) or LENGTH
    chosen = torch.randint(len(tokens), (TEXTS, length), generator=torch.Generator().manual_seed(0))
    return tokens[chosen]


def _computing(model: Any) -> AbstractContextManager[Any]:
    return nullcontext() if model.dtype == torch.float32 else InFloat32()
