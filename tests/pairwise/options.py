"""The options that are combined, the flags for their values, and the combinations that are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reference.runs import Split
from repository import ROOT

from pairwise.covering import Row

GLOBAL_BATCH = 8
Flags = dict[str, Any]


def _offload(stage: int) -> Flags:
    return {"deepspeed": str(ROOT / "ds_configs" / f"zero{stage}_offload.json")}


# Options that change the numbers of a run: name -> value -> flags.
COMPUTED: dict[str, dict[str, Flags]] = {
    "model": {name: {} for name in ("bert", "roberta", "modernbert")},
    "packing": {"concat": {}, "best_fit": {}},
    "mask_unit": {unit: {"mask_unit": unit} for unit in ("token", "word", "span")},
    "rate": {"constant": {}, "falling": {"mlm_probability": 0.3, "mlm_probability_end": 0.1}},
    # 1, 2, 4 and 6 blocks: the third step has one pass, even in rows with two passes in a full step
    "batch": {"constant": {}, "growing": {"batch_size_warmup_start": 1, "batch_size_warmup_steps": 4}},
    "schedule": {
        "linear": {},
        "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 1},
        "wsd": {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 0.5, "decay_type": "1-sqrt"},
        },
        "inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 0.5},
    },
    "optim": {
        "adamw_torch_fused": {"adam_epsilon": 1e-3},
        "sgd": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": 0.1},
        "rmsprop": {"optim": "rmsprop", "optim_args": "alpha=0.9,eps=1e-3", "learning_rate": 1e-3},
        "stable_adamw": {"optim": "stable_adamw", "adam_epsilon": 1e-3},
        "muon": {"optim": "muon", "adam_epsilon": 1e-3},
    },
    "clipping": {"active": {"max_grad_norm": 0.5}, "none": {"max_grad_norm": 0.0}},
    "layers": {"alike": {}, "decaying": {"layerwise_lr_decay": 0.7}},
    "freeze": {
        "nothing": {},
        "embeddings": {"freeze": ".*embeddings"},
        "layer": {"freeze": r".*layers?\.0\."},
    },
    "ema": {"none": {}, "kept": {"ema_decay": 0.2}},  # from the third step on, this is below (1 + step) / (10 + step)
}
# Options that do not change the numbers of a run.
HOW: dict[str, dict[str, Flags]] = {
    "engine": {
        "ddp": {},
        "zero0": {},
        "zero1": {},
        "zero2": {},
        "zero3": {},
        "fsdp2": {},
        "zero2_offload": _offload(2),
        "zero3_offload": _offload(3),
    },
    "begun": {name: {} for name in ("not", "same", "single", "zero3", "fsdp2")},  # the engine of the first two steps
    "ranks": {number: {} for number in ("2", "1", "3")},
    "passes": {"1": {}, "2": {}},  # forward passes in a full step
    "precision": {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}},
    "recompute": {
        "nothing": {},
        "all": {"gradient_checkpointing": True},
        "half": {"gradient_checkpointing": True, "gradient_checkpointing_every_n_layers": 2},
    },
    "compile": {"no": {}, "yes": {"torch_compile": True}},
    "attention": {"default": {}, "eager": {"attn_implementation": "eager"}},
    "head": {"sparse": {}, "dense": {"sparse_head": False}},
    "saving": {"waiting": {}, "async": {"async_save": True}},
}
FLAGS = {**HOW, **COMPUTED}
OPTIONS = {name: tuple(values) for name, values in FLAGS.items()}
WHOLE_TENSORS = ("stable_adamw", "muon")
DIVIDED = ("zero1", "zero2", "zero3", "fsdp2", "zero2_offload", "zero3_offload")
ZERO3 = ("zero3", "zero3_offload")


@dataclass(frozen=True)
class Refusal:
    """`values`: option -> values that Cloze refuses together; `where`, `what`: texts of the error message."""

    values: dict[str, tuple[str, ...]]
    where: str
    what: str


_WHOLE = "needs whole parameters, which"
REFUSALS = [
    Refusal({"precision": ("fp16",)}, "--fp16", "fp16 needs a GPU"),
    Refusal({"optim": WHOLE_TENSORS, "engine": DIVIDED}, "--optim", _WHOLE),
    Refusal({"optim": WHOLE_TENSORS, "begun": ("zero3", "fsdp2")}, "--optim", _WHOLE),
    Refusal({"optim": WHOLE_TENSORS, "engine": ("zero0",), "precision": ("bf16",)}, "--optim", _WHOLE),
    Refusal({"compile": ("yes",), "engine": ZERO3}, "--torch_compile", "ZeRO-3 does not support torch.compile"),
]


def flags_of(row: Row, options: dict[str, dict[str, Flags]]) -> Flags:
    """Return a row's flags for some options."""
    found: Flags = {}
    for option, values in options.items():
        found |= values[row[option]]
    return found


def parts_of(row: Row) -> list[tuple[Split, Flags]]:
    """Return the parts of a row's run: one, or two if it is stopped and resumed. A first part on another engine uses
    only those options of the row that change the numbers."""
    how, passes = flags_of(row, HOW), int(row["passes"])
    engine = row["engine"] if row["engine"] in ("zero0", "zero1", "zero2", "zero3", "fsdp2") else "ddp"
    last = _split(engine, int(row["ranks"]), passes), how
    first = {
        "not": [],
        "same": [(_split(engine, 3 if row["ranks"] == "2" else 2, passes), how)],
        "single": [(_split("single", 1, 1), {})],
    }
    return [*first.get(row["begun"], [(_split(row["begun"], 2, 1), {})]), last]


def _split(engine: str, ranks: int, passes: int) -> Split:
    return Split(engine, ranks, -(-GLOBAL_BATCH // (ranks * passes)))
