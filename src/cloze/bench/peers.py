"""One training loop in a process of its own, which takes so many steps when told to, and says how long they took.

    python -m cloze.bench.peers cloze '{"prepared": ..., "model_type": ..., ...}'      # then lines on stdin: 8, 8, ...

`cloze` is the loop of `cloze train`, `trainer` that of transformers with its own collator, as in the tutorial, `bare`
the fewest lines of PyTorch that do Cloze's arithmetic. All wait between steps, so that one runs at a time.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

import torch


class Gate:
    """Called before every step: waits for a number on stdin, lets one step pass, times so many, and reports."""

    def __init__(self) -> None:
        self._wanted = self._done = 0
        self._begin = 0.0

    def __call__(self) -> None:
        """One step is about to begin. The process ends where stdin does."""
        if self._done == 1:
            self._begin = _now()
        if self._done == self._wanted + 1:
            _report({"seconds": _now() - self._begin, "peak_bytes": _peak_bytes()})
            self._done = 0
        if self._done == 0:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            self._wanted = int(line)
        self._done += 1


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report(values: dict[str, Any]) -> None:
    sys.__stdout__.write(f"REPORT {json.dumps(values)}\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def run_cloze(settings: dict[str, Any], gate: Gate) -> None:
    """`cloze train`, as it is."""
    from cloze.config import TrainConfig
    from cloze.train import trainer

    plain = trainer.train_step

    def gated(run: Any, batch: Any) -> Any:
        gate()
        return plain(run, batch)

    trainer.train_step = gated  # type: ignore[assignment]
    trainer.train(
        TrainConfig(
            dataset_name=settings["prepared"],
            output_dir=tempfile.mkdtemp(dir=settings["folder"]),
            model_type=settings["model_type"],
            config_overrides=settings["config_overrides"],
            per_device_train_batch_size=settings["batch"],
            max_steps=10**6,
            logging_steps=500,
            save_strategy="no",
            weight_decay=0.01,
            learning_rate=2e-5,
            bf16=torch.cuda.is_available(),
        )
    )


def _model(settings: dict[str, Any]) -> tuple[Any, Any]:
    from cloze.config import ModelConfig
    from cloze.data.shards import open_prepared
    from cloze.model.load import build_model

    data = open_prepared(settings["prepared"])
    config = ModelConfig(model_type=settings["model_type"], config_overrides=settings["config_overrides"])
    return build_model(config, data.tokenizer_dir, data.block_size, seed=42)


def run_trainer(settings: dict[str, Any], gate: Gate) -> None:
    """transformers' Trainer with DataCollatorForLanguageModeling, the tutorial's settings, fused AdamW."""
    from datasets import load_from_disk
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    class Gated(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate()

    model, tokenizer = _model(settings)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=settings["folder"]),
        per_device_train_batch_size=settings["batch"],
        max_steps=10**6,
        logging_steps=500,
        save_strategy="no",
        report_to="none",
        weight_decay=0.01,
        learning_rate=2e-5,
        bf16=torch.cuda.is_available(),
        optim="adamw_torch_fused",
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15)
    data = load_from_disk(settings["prepared"])["train"]
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[Gated()]).train()


def run_bare(settings: dict[str, Any], gate: Gate) -> None:
    """Forward of the masked rows, backward, clip, AdamW, over a few batches that are in memory already."""
    from cloze.data.loader import Layout, fixed_capacity, step_batches
    from cloze.data.masking import Masking
    from cloze.data.shards import open_prepared
    from cloze.model.sparse_head import MaskedHead
    from cloze.train.loss import masked_loss_sum
    from cloze.train.optim import decay_groups

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = _model(settings)
    head = MaskedHead(model)
    model.to(device).train()
    data = open_prepared(settings["prepared"])
    masking, layout = Masking.from_manifest(data.manifest, seed=42), Layout(settings["batch"], 1, 0, 1)
    capacity = fixed_capacity(settings["batch"] * data.block_size, 0.15) if device.type == "cuda" else 0
    batches = [
        step_batches(data.blocks("train"), masking, layout, 10**9, step, capacity=capacity).micro_batches[0]
        for step in range(16)
    ]
    groups = [group for group, _ in decay_groups(model, 0.01)]
    optimizer = torch.optim.AdamW(groups, lr=2e-5, fused=True)
    step = 0
    while True:
        gate()
        batch = {name: value.to(device, non_blocking=True) for name, value in batches[step % len(batches)].items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = head.logits(model, {"input_ids": batch["input_ids"]}, batch["positions"])
            loss = masked_loss_sum(logits, batch["targets"]) / (batch["targets"] >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1


if __name__ == "__main__":
    sys.stdout = sys.stderr  # what libraries print is not a report
    {"cloze": run_cloze, "trainer": run_trainer, "bare": run_bare}[sys.argv[1]](json.loads(sys.argv[2]), Gate())
