"""A training run in float64, one block at a time, without autocast, engines or ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from reference.masks import IGNORED, Rule
from reference.order import block_of, samples_of
from reference.packing import flat

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the numbers of a run, under the names that the command line has."""

    global_batch: int
    total_samples: int
    total_steps: int
    batch_size_warmup_start: int = 1
    batch_size_warmup_steps: int = 0
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    layerwise_lr_decay: float = 1.0
    optim: str = "adamw_torch_fused"
    optim_args: str = ""
    freeze: str | None = None
    ema_decay: float | None = None


@dataclass(frozen=True)
class Step:
    """One step: its samples, what they were masked to, and what came of it. `weights` are those after it."""

    samples: list[int]
    input_ids: list[list[int]]
    labels: list[list[int]]
    loss: float
    grad_norm: float
    learning_rate: float
    weights: Tensors
    averages: Tensors


def train(model: Any, blocks: Sequence[Sequence[Sequence[int]]], rule: Rule, options: Options) -> Iterator[Step]:
    """Train the model in place. `blocks`: the pieces of each block, which do not see each other. Parameters whose
    names `freeze` matches are not trained: they are not in the gradient norm, and have no average."""
    model = model.double().train()
    trained = {name: p for name, p in model.named_parameters() if not re.match(options.freeze or "$", name)}
    weights: Tensors = {name: parameter.data for name, parameter in trained.items()}
    averages = {name: weight.clone() for name, weight in weights.items()}
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    scales = layer_scales(model, options.layerwise_lr_decay)
    warmup = options.batch_size_warmup_start, options.batch_size_warmup_steps
    for step in range(options.total_steps):
        samples = [s for s in samples_of(step, options.global_batch, *warmup) if s < options.total_samples]
        pieces = [blocks[block_of(sample, len(blocks), rule.seed)] for sample in samples]
        masked = [rule.mask(flat(block), sample) for block, sample in zip(pieces, samples, strict=True)]
        num_masked = sum(label != IGNORED for _, labels in masked for label in labels)
        model.zero_grad()
        loss = 0.0
        for block, (input_ids, labels) in zip(pieces, masked, strict=True):
            part = token_losses(model, block, input_ids, labels).sum() / num_masked
            part.backward()
            loss += part.item()
        gradients = {name: torch.zeros_like(p.data) if p.grad is None else p.grad for name, p in trained.items()}
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        if options.max_grad_norm:
            for gradient in gradients.values():
                gradient *= min(1.0, options.max_grad_norm / (norm + 1e-6))
        rate = options.learning_rate * factor(step, options)
        for name, weight in weights.items():
            update(weight, gradients[name], moments[name], step + 1, rate * scales[name], options)
        if options.ema_decay is not None:
            decay = min(options.ema_decay, (1 + step) / (10 + step))
            averages = {name: decay * average + (1 - decay) * weights[name] for name, average in averages.items()}
        after = {name: weight.clone() for name, weight in weights.items()}
        yield Step(samples, [i for i, _ in masked], [t for _, t in masked], loss, norm, rate, after, averages)


def token_losses(
    model: Any, pieces: Sequence[Sequence[int]], input_ids: Sequence[int], labels: Sequence[int]
) -> torch.Tensor:
    """Return the cross entropy of each masked token of a block."""
    places = [i for i, label in enumerate(labels) if label != IGNORED]
    logits = block_logits(model, pieces, input_ids)[places]
    return logits.logsumexp(-1) - logits[range(len(places)), [labels[i] for i in places]]


def block_logits(model: Any, pieces: Sequence[Sequence[int]], input_ids: Sequence[int]) -> torch.Tensor:
    """Return the scores [S, V] of a block without its padding. Every piece is read alone."""
    ends = list(accumulate(map(len, pieces)))
    shown = [input_ids[end - len(piece) : end] for piece, end in zip(pieces, ends, strict=True)]
    return torch.cat([piece_logits(model, *both) for both in zip(pieces, shown, strict=True)])


def piece_logits(model: Any, originals: Sequence[int], input_ids: Sequence[int]) -> torch.Tensor:
    """Return the scores [S, V] of a text. A decoder reads the original text, moved by one."""
    inputs = {"input_ids": torch.tensor([list(input_ids)])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *originals[:-1]]])
    logits: torch.Tensor = model(**inputs).logits[0]
    return logits


def update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    step: int,
    rate: float,
    options: Options,
) -> None:
    """Update a weight [..] and its moments in place. Vectors do not decay. SGD and RMSprop add the weight decay to the
    gradient, as torch does."""
    decay = options.weight_decay if weight.ndim >= 2 else 0.0
    known = dict(each.split("=") for each in options.optim_args.split(",") if each)
    if options.optim == "sgd":
        gradient, momentum = gradient + decay * weight, float(known.get("momentum", 0.0))
        moments[0].copy_(momentum * moments[0] + gradient)
        weight -= rate * (gradient + momentum * moments[0] if known.get("nesterov") == "true" else moments[0])
        return
    if options.optim == "rmsprop":
        gradient = gradient + decay * weight
        alpha = float(known.get("alpha", 0.99))
        moments[1].copy_(alpha * moments[1] + (1 - alpha) * gradient**2)
        weight -= rate * gradient / (moments[1].sqrt() + float(known.get("eps", 1e-8)))
        return
    beta1, beta2 = options.adam_beta1, options.adam_beta2
    weight *= 1 - rate * decay
    moments[0].copy_(beta1 * moments[0] + (1 - beta1) * gradient)
    moments[1].copy_(beta2 * moments[1] + (1 - beta2) * gradient**2)
    mean, square = moments[0] / (1 - beta1**step), moments[1] / (1 - beta2**step)
    weight -= rate * mean / (square.sqrt() + options.adam_epsilon)


def layer_scales(model: Any, decay: float) -> dict[str, float]:
    """Return the factor of each parameter's learning rate, for encoders with one list of layers and a tied decoder."""
    layers = model.config.num_hidden_layers
    scales = {}
    for name, _ in model.named_parameters():
        number = re.search(r"\.layers?\.(\d+)\.", name)
        if number:
            scales[name] = decay ** (layers - int(number.group(1)))
        elif "embed" in name and name.startswith(model.base_model_prefix):
            scales[name] = decay ** (layers + 1)
        else:
            scales[name] = 1.0
    return scales


def factor(step: int, options: Options) -> float:
    """Return the learning rate of a step (0-based) as a share of the peak."""
    total, kind, more = options.total_steps, options.lr_scheduler_type, options.lr_scheduler_kwargs
    warmup = steps_of(options.warmup_steps, total)
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if kind == "inverse_sqrt":
        return math.sqrt(warmup / step) if warmup else math.sqrt(10_000 / (step + 10_000))
    done = (step - warmup) / (total - warmup)
    if kind == "warmup_stable_decay":
        decay = steps_of(more.get("num_decay_steps", 0.1), total)
        done = (step - (total - decay)) / decay if decay else 0.0
        kind = "constant_with_warmup" if done < 0 else more.get("decay_type", "cosine")
    last = 1e-7 / options.learning_rate
    return {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "polynomial": (1 - done) * (1 - last) + last,
        "constant_with_warmup": 1.0,
        "1-sqrt": 1 - math.sqrt(max(done, 0.0)),
    }[kind]


def steps_of(number: float, total: int) -> int:
    """Return a number of steps, which may be given as a share of all steps."""
    return math.ceil(number * total) if number < 1 else int(number)
