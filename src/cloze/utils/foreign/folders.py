"""Whose folder it is: what other programs leave beside the weights, and what to do with such a folder here.

    owner = foreign_owner(Path("runs/old/checkpoint-500"))       # None, or Owner(what, hint)

Only names are looked at; no file is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloze.utils import run_files

_ZERO = ("*_optim_states.pt", "*_model_states.pt", "global_step*/*_model_states.pt", "latest")


@dataclass(frozen=True)
class Owner:
    """`what`: a description that follows "this is"; `hint`: how to use the folder here."""

    what: str
    hint: str


def foreign_owner(folder: Path) -> Owner | None:
    """Return whose checkpoint or adapter a folder is, or its newest checkpoint-N; None if nothing in it tells of
    another program."""
    if not folder.is_dir() or (folder / run_files.CHECKPOINT).exists():
        return None
    inside = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    if inside and not (folder / "config.json").exists() and not folder.name.startswith("checkpoint-"):
        return foreign_owner(inside[-1])
    if (folder / "adapter_config.json").exists():
        return Owner(
            "a PEFT adapter, which holds changes to the weights of another model",
            "merge it (AutoPeftModelForMaskedLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER), "
            "from peft), and give FOLDER as --model_name_or_path",
        )
    sharded = any(True for pattern in _ZERO for _ in folder.glob(pattern)) or any(
        (folder / name / ".metadata").exists() for name in (".", "pytorch_model_fsdp_0")
    )
    convert = f"make a model of it with `cloze consolidate {folder} --output FOLDER`, and start a new run"
    if (folder / "trainer_state.json").exists() or (folder / "training_args.bin").exists():
        what = "a checkpoint of transformers' Trainer"
    elif any(folder.glob("random_states_*.pkl")) or (folder / "optimizer.bin").exists():
        what = "a state that accelerate saved"
    elif sharded:
        what = "a checkpoint of DeepSpeed or torch.distributed"
    elif (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        return Owner("a model without the state of a run", f"begin with it: --model_name_or_path {folder}")
    else:
        return None
    if sharded:
        return Owner(what, f"{convert} with --model_name_or_path FOLDER")
    if (folder / "config.json").exists():
        return Owner(what, f"begin a new run with its weights: --model_name_or_path {folder} in place of resuming")
    return Owner(what, "give its model folder, with config.json, as --model_name_or_path, and start a new run")
