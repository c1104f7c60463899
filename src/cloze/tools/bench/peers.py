"""Run one training loop in its own process, which takes a number of steps on request and reports their time.

    python -m cloze.tools.bench.peers cloze '{"prepared": ..., "model_type": ..., ...}'
    {"batch": 8, "steps": 1}                                # on stdin: blocks per step, steps to time
    REPORT {"seconds": ..., "cpu_seconds": ..., "peak_bytes": ..., "graphs": ...}       # on stdout

`cloze` is the loop of `cloze train` (`compiled`: with torch.compile), `trainer` that of transformers with its own
collator, as in the tutorial, `bare` the fewest lines of PyTorch that do Cloze's arithmetic: the same masked positions,
loss, clipping and fused AdamW. All wait between orders, so that one runs at a time, and give back what memory they do
not hold. A batch that does not fit is reported as such. Only torch, transformers and accelerate are needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from typing import Any

import torch

from cloze.tools.bench.worker_pipe import Gate, serve


def cloze_config(settings: dict[str, Any], batch: int, torch_compile: bool) -> Any:
    """Return the configuration of `cloze train`."""
    from cloze.config import TrainConfig

    return TrainConfig(
        dataset_name=settings["prepared"],
        output_dir=tempfile.mkdtemp(dir=settings["folder"]),
        model_type=settings["model_type"],
        config_overrides=settings["config_overrides"],
        per_device_train_batch_size=batch,
        max_steps=10**6,
        logging_steps=500,
        save_strategy="no",
        weight_decay=0.01,
        learning_rate=2e-5,
        bf16=settings["gpu"],
        use_cpu=not settings["gpu"],
        torch_compile=torch_compile,
    )


class ClozePeer:
    """`cloze train`, as it is; another batch is another plan for the same run."""

    def __init__(self, settings: dict[str, Any], torch_compile: bool):
        self._settings, self._torch_compile = settings, torch_compile
        self._stack = ExitStack()
        self._run: Any = None

    def train(self, batch: int, gate: Gate) -> None:
        """Run steps until the process ends."""
        from cloze.distributed.resilience.stop_signals import StopSignals
        from cloze.training import trainer
        from cloze.training.logging.metrics import MetricsLog
        from cloze.training.prepare_model import head_capacity
        from cloze.training.run import Start
        from cloze.training.run_schedule import fit_layout, plan_run
        from cloze.training.setup import set_up

        config = cloze_config(self._settings, batch, self._torch_compile)
        if self._run is None:
            stop = self._stack.enter_context(StopSignals(None))
            self._run = set_up(config, stop, self._stack)
            plain = trainer.train_step

            def gated(*arguments: Any, **named: Any) -> Any:
                gate()
                return plain(*arguments, **named)

            trainer.train_step = gated  # type: ignore[assignment]
        data, accelerator = self._run.data, self._run.engine.accelerator
        plan = plan_run(config, fit_layout(config, 0, 1, None), data.num_blocks, data.block_size)
        run = dataclasses.replace(
            self._run, config=config, plan=plan, capacity=head_capacity(plan, config, accelerator)
        )
        trainer.train_steps(run, MetricsLog(run.output_dir, accelerator, 0), Start(0))


def _model(settings: dict[str, Any]) -> tuple[Any, Any]:
    from cloze.config import ModelConfig
    from cloze.data.prepared.shards import open_prepared
    from cloze.model.load import build_model

    data = open_prepared(settings["prepared"])
    config = ModelConfig(
        model_type=settings["model_type"],
        config_overrides=settings["config_overrides"],
        attn_implementation="sdpa",
    )
    return build_model(config, data.tokenizer_dir, data.block_size, seed=42)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Blocks [n, S] one by one, as a tokenizer returns them: input_ids, and attention_mask if there is padding."""

    def __init__(self, ids: torch.Tensor, pad_token_id: int | None):
        self._ids, self._pad = ids, pad_token_id

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._ids[index]
        return {"input_ids": ids} if self._pad is None else {"input_ids": ids, "attention_mask": ids != self._pad}


class TrainerPeer:
    """transformers' Trainer with DataCollatorForLanguageModeling, the tutorial's settings, fused AdamW, sdpa; on a GPU
    bf16, batches made by up to 8 more processes, and without its look at every loss (`logging_nan_inf_filter`)."""

    def __init__(self, settings: dict[str, Any]):
        import numpy as np

        from cloze.data.prepared.shards import open_prepared

        self._settings = settings
        self._model, self._tokenizer = _model(settings)
        data = open_prepared(settings["prepared"])
        blocks = data.blocks("train")
        ids = torch.from_numpy(blocks.read(np.arange(len(blocks)))).long()
        self._rows = Rows(ids, self._tokenizer.pad_token_id if data.packing == "best_fit" else None)

    def train(self, batch: int, gate: Gate) -> None:
        """Run steps until the process ends."""
        from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

        class Gated(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                gate()

        gpu = self._settings["gpu"]
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(dir=self._settings["folder"]),
            per_device_train_batch_size=batch,
            max_steps=10**6,
            logging_steps=500,
            save_strategy="no",
            report_to="none",
            weight_decay=0.01,
            learning_rate=2e-5,
            bf16=gpu,
            use_cpu=not gpu,
            optim="adamw_torch_fused",
            dataloader_num_workers=min(8, (os.cpu_count() or 2) - 1) if gpu else 0,
            dataloader_persistent_workers=gpu,
            logging_nan_inf_filter=not gpu,
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer=self._tokenizer, mlm_probability=0.15)
        trainer = Trainer(
            model=self._model, args=arguments, train_dataset=self._rows, data_collator=collator, callbacks=[Gated()]
        )
        try:
            trainer.train()
        finally:  # the next one wraps it anew
            trainer.accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
            self._model.zero_grad(set_to_none=True)


class BarePeer:
    """Forward of the masked rows, backward, clip, AdamW, over a few batches that are in memory already."""

    def __init__(self, settings: dict[str, Any]):
        from cloze.data.train_data import open_data
        from cloze.model.load import build_model
        from cloze.training.prepare_model import prepare_model

        self._gpu = settings["gpu"]
        config = cloze_config(settings, 8, torch_compile=False)
        self._data = open_data(config)
        self._model: Any = build_model(config, self._data.tokenizer, self._data.block_size, config.seed)[0]
        self._head = prepare_model(self._model, config, self._data)

    def batches(self, batch: int) -> list[dict[str, torch.Tensor]]:
        """Return the first 16 batches of Cloze's own run."""
        from cloze.data.batches.layout import Layout
        from cloze.data.batches.loader import step_batches
        from cloze.data.batches.make_batch import fixed_capacity
        from cloze.data.batches.masking import Masking

        masking, layout = Masking.from_manifest(self._data.manifest, seed=42), Layout(batch, 1, 0, 1)
        capacity = fixed_capacity(batch * self._data.block_size, 0.15) if self._gpu else 0
        blocks = self._data.blocks
        assert blocks is not None
        return [
            step_batches(blocks, masking, layout, 10**9, step, capacity=capacity).micro_batches[0]
            for step in range(16)
        ]

    def train(self, batch: int, gate: Gate) -> None:
        """Run steps until the process ends."""
        from cloze.training.loss import masked_loss_sum
        from cloze.training.optim.optimizers import decay_groups

        device = torch.device("cuda" if self._gpu else "cpu")
        model, head, batches = self._model.to(device).train(), self._head, self.batches(batch)
        groups = [group for group, _ in decay_groups(model, 0.01)]
        optimizer = torch.optim.AdamW(groups, lr=2e-5, fused=True)
        step = 0
        while True:
            gate()
            one = batches[step % len(batches)]
            targets = one["targets"].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._gpu):
                logits = head.masked_logits(model, one, device)
                loss = masked_loss_sum(logits, targets) / (targets >= 0).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1


def main(name: str, settings: dict[str, Any]) -> None:
    """Run the peer of that name."""
    sys.stdout = sys.stderr  # what libraries print is not a report
    if name in ("cloze", "compiled"):
        serve(ClozePeer(settings, torch_compile=name == "compiled"), Gate())
    else:
        serve({"trainer": TrainerPeer, "bare": BarePeer}[name](settings), Gate())


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
