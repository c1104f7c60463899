"""The masked-only head for a model that computes its own loss, as under transformers' Trainer.

    model = cloze.sparse_head(AutoModelForMaskedLM.from_pretrained("distilbert/distilroberta-base"))
    Trainer(model, ...).train()                     # the same losses; the head computes 15 % of the rows

In training with labels [B, S], the backbone's output and the labels are reduced to the rows that have a label (see
`cloze.model.sparse_head`): the model's own loss is the mean over the same tokens. Evaluation, and forwards without
labels, do not change.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import torch

from cloze.data.batches.masking import IGNORE_INDEX
from cloze.data.prepared.torch_dataset import PackedDataset
from cloze.errors import ModelError
from cloze.model.archs import fixed_length
from cloze.model.load import usable_length
from cloze.model.packed import DocumentAttention, document_attention
from cloze.model.sparse_head import MaskedHead
from cloze.utils.closeness import within

Model = TypeVar("Model", bound=torch.nn.Module)
TOLERANCE = 1e-5  # of the loss, fp32
_ROWS = 8  # rows are padded to a multiple of this, so that matrices have few shapes


class _Own(threading.local):
    """The positions that a thread's next forward is to predict (see `MaskedHead.expect`). A copy begins empty."""

    expected: tuple[torch.Tensor | None, tuple[int, ...]] = (None, ())

    def __reduce__(self) -> Any:
        return _Own, ()


class _ThreadsHead(MaskedHead):
    """A MaskedHead that several threads use at once: nn.DataParallel runs a replica of the model in each of its
    threads, and all replicas share the hooks."""

    def __init__(self, model: Any):
        self._own = _Own()
        super().__init__(model)

    @property
    def _expected(self) -> tuple[torch.Tensor | None, tuple[int, ...]]:
        return self._own.expected

    @_expected.setter
    def _expected(self, value: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
        self._own.expected = value


class SparseLoss:
    """The hooks on a model: before its forward labels are gathered, after its backbone the rows.

    `always`: also outside of training.
    """

    def __init__(self, model: Any):
        self.head, self.always = _ThreadsHead(model), False
        model.register_forward_pre_hook(self._gather_labels, with_kwargs=True)
        model.register_forward_hook(self._done, always_call=True)

    def _gather_labels(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        labels = named.get("labels")
        if labels is None or not (module.training or self.always) or not self.head.sparse:
            return None
        flat = labels.reshape(-1)
        masked = (flat != IGNORE_INDEX).nonzero().squeeze(1)  # the host waits for a GPU here
        padding = masked.new_zeros(max(_ROWS, -(-len(masked) // _ROWS) * _ROWS) - len(masked))
        self.head.expect(torch.cat([masked, padding]), tuple(labels.shape))
        targets = torch.cat([flat[masked], flat.new_full(padding.shape, IGNORE_INDEX)])
        return arguments, {**named, "labels": targets.unsqueeze(0)}

    def _done(self, *_: Any) -> None:
        self.head.expect(None)


def sparse_head(model: Model) -> Model:
    """Make a masked language model compute its head only on rows with a label, and return it.

    Call it once, before Trainer, DDP, DeepSpeed or torch.compile wrap the model. The model's own code computes the
    loss. In training, logits are [1, K, V], with K the number of rows with a label and of padding.

    Raises ModelError if the loss would differ: for encoder-decoders, whose decoders read the labels, and for
    architectures whose head mixes rows. Two forwards test it.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("its decoder reads the labels, which have to be whole", where=name, hint="train without it")
    if any(isinstance(getattr(hook, "__self__", None), SparseLoss) for hook in model._forward_pre_hooks.values()):
        return model
    sparse = SparseLoss(model)
    problem = "no backbone to gather rows of" if not sparse.head.sparse else _problem(model, sparse)
    if problem is not None:
        sparse.head.sparse = False
        raise ModelError(f"the masked-only head gives another loss ({problem})", where=name, hint="train without it")
    return model


@torch.no_grad()
def _problem(model: Any, sparse: SparseLoss) -> str | None:
    """Return how the loss at masked rows differs from the dense one; None if it does not."""
    config = model.config.get_text_config()
    size = fixed_length(config) or min(16, usable_length(model.config) or 16)
    device = next(model.parameters()).device
    ids = torch.randint(config.vocab_size, (2, size), generator=torch.Generator().manual_seed(0)).to(device)
    if getattr(config, "pad_token_id", None) is not None:  # padding has no index of its own
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    labels = torch.where(torch.arange(size, device=device) % 3 == 1, ids, IGNORE_INDEX)
    was_training = model.training
    model.eval()
    try:
        dense = float(model(input_ids=ids, labels=labels).loss)
        sparse.always = True
        loss = float(model(input_ids=ids, labels=labels).loss)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        sparse.always = False
        model.train(was_training)
    return None if within(abs(loss - dense), TOLERANCE * abs(dense)) else f"{loss:.6f}, not {dense:.6f}"


def documents_apart(model: Any, dataset: PackedDataset) -> DocumentAttention | None:
    """Return how this model keeps the documents of packed blocks apart, for `MaskingCollator(documents=...)`; None for
    blocks of `packing="concat"`, whose documents see each other.

    The model is on the CPU, in fp32, to try forms of masks. Raises ModelError if none gives the logits of each
    document alone.
    """
    if dataset.prepared.packing != "best_fit":
        return None
    return document_attention(model, dataset.block_size, model.config.get_text_config().vocab_size)
