"""Checkpoints of other tools, made by those tools: DeepSpeed's engine, accelerate, transformers' Trainer, torch.

Each function is what one rank does (see `ranks.run_ranks`). All train the same small model, with a frozen parameter,
tied weights, two parameter groups, and sizes that divide by no number of ranks; rank 0 writes `truth.pt`, the fp32
weights that the model ends with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FROZEN = "roberta.embeddings.token_type_embeddings.weight"


def small_model(vocab_size: int = 607, tied: bool = True, **more: Any) -> Any:
    """A RobertaForMaskedLM of a few thousand parameters, the same weights every time."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 17}
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=vocab_size, max_position_embeddings=40, tie_word_embeddings=tied, **{**sizes, **more}
    )
    model = RobertaForMaskedLM(config)
    model.get_parameter(FROZEN).requires_grad = False
    return model


def groups(model: Any) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, and vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def settings(stage: int, precision: str) -> dict[str, Any]:
    """A DeepSpeed configuration."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every fp32 weight that training ended with, from the engine's masters where it has them; every rank calls it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")):
            full = safe_get_full_fp32_param(parameter)
        elif hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                full = parameter.detach().clone()
        else:
            full = parameter.detach().clone()
        found[name] = full.reshape(getattr(parameter, "ds_shape", parameter.shape)).float()
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def batch(step: int) -> torch.Tensor:
    """[2, 16] token ids, others on every rank."""
    torch.manual_seed(10 * step + int(os.environ["RANK"]))
    return torch.randint(5, 100, (2, 16))


def _two_steps(accelerator: Any, model: Any, optimizer: Any, folder: str) -> None:
    """Train, and save what accelerate saves."""
    for step in range(2):
        ids = batch(step)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(folder)


def _keep_truth(folder: str, model: Any, truth: dict[str, torch.Tensor]) -> None:
    """folder/truth.pt, the whole weights, and folder/config; the rank ends."""
    if torch.distributed.get_rank() == 0:
        torch.save(truth, Path(folder) / "truth.pt")
        model.config.save_pretrained(Path(folder) / "config")
    _leave()


def _leave() -> None:
    torch.distributed.barrier()
    os._exit(0)


def _no_compiler() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def by_deepspeed(folder: str, stage: int, precision: str, tied: bool = True, client_state: dict | None = None) -> None:
    """`engine.save_checkpoint`: folder/latest and folder/global_step3/."""
    import deepspeed

    _no_compiler()
    deepspeed.init_distributed("gloo")
    model = small_model(tied=tied)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage, precision))
    for step in range(3):
        ids = batch(step)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(folder, client_state=client_state or {})
    _keep_truth(folder, model, whole_weights(model))


def by_accelerate(folder: str, stage: int, precision: str) -> None:
    """`accelerator.save_state`: folder/pytorch_model/."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DeepSpeedPlugin

    _no_compiler()
    plugin = DeepSpeedPlugin(hf_ds_config=settings(stage, precision))
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model = small_model()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    engine, optimizer = accelerator.prepare(model, optimizer)
    _two_steps(accelerator, engine, optimizer, folder)
    _keep_truth(folder, model, whole_weights(model))


def by_trainer(folder: str, stage: int, precision: str, tokenizer: str) -> None:
    """`Trainer.train`: folder/checkpoint-2/ with config, tokenizer, latest and global_step2/."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

    _no_compiler()
    tok = AutoTokenizer.from_pretrained(tokenizer)
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=2, deepspeed=settings(stage, precision), use_cpu=True,
        bf16=precision == "bf16", learning_rate=1e-2, report_to="none", save_steps=2, disable_tqdm=True,
        ddp_backend="gloo", dataloader_num_workers=0,
    )  # fmt: skip
    model = small_model()
    rows = [{"input_ids": torch.randint(5, len(tok), (16,)).tolist()} for _ in range(8)]
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tok), processing_class=tok
    )
    trainer.train()
    truth = whole_weights(model)
    if torch.distributed.get_rank() == 0:
        torch.save(truth, Path(folder) / "truth.pt")
    _leave()


def fsdp_on_cpu() -> None:
    """Let accelerate's FSDP2 run here: it leaves FSDP out on a CPU, and all else of it works there."""
    from accelerate import Accelerator

    from cloze.distributed.fsdp_plugin import keep_on_cpu

    plain = Accelerator.__init__

    def init(self: Any, *args: Any, **more: Any) -> None:
        from accelerate.utils import FullyShardedDataParallelPlugin

        plain(self, *args, **more)
        plugin = more.get("fsdp_plugin") or FullyShardedDataParallelPlugin(fsdp_version=2)
        keep_on_cpu(self, plugin)

    Accelerator.__init__ = init  # type: ignore[method-assign]


def whole_of_parts(model: Any) -> dict[str, torch.Tensor]:
    """Every weight of a model that `fully_shard` has divided; every rank calls it."""
    whole = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    return whole | {name: buffer.clone() for name, buffer in model.named_buffers()}


def by_accelerates_fsdp(folder: str) -> None:
    """`accelerator.save_state` under FSDP2: folder/pytorch_model_fsdp_0/ and folder/optimizer_0/.

    Not tied: accelerate 1.15 divides a head apart from the bias that it shares, which torch 2.13 refuses.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import FullyShardedDataParallelPlugin

    fsdp_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["RobertaLayer"]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    assert accelerator.is_fsdp2
    model = small_model(tied=False)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups(model), lr=1e-2))
    _two_steps(accelerator, model, optimizer, folder)
    _keep_truth(folder, model, whole_of_parts(model))


def by_torch(folder: str, tied: bool = True) -> None:
    """`torch.distributed.checkpoint.save` of a plain model state dict, after `fully_shard`: folder/.metadata."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = small_model(tied=tied)
    for layer in model.roberta.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        ids = batch(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(model.state_dict(), storage_writer=dcp.FileSystemWriter(folder))
    _keep_truth(folder, model, whole_of_parts(model))


def by_trainers_fsdp(folder: str, tokenizer: str) -> None:
    """`Trainer.train` with FSDP2: folder/checkpoint-2/pytorch_model_fsdp_0/."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

    fsdp_on_cpu()
    tok = AutoTokenizer.from_pretrained(tokenizer)
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=2, use_cpu=True, learning_rate=1e-2, report_to="none",
        save_steps=2, disable_tqdm=True, ddp_backend="gloo", dataloader_num_workers=0, fsdp=True,
        fsdp_config={
            "version": 2, "state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["RobertaLayer"],
        },
    )  # fmt: skip
    model = small_model(tied=False)
    rows = [{"input_ids": torch.randint(5, len(tok), (16,)).tolist()} for _ in range(8)]
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tok), processing_class=tok
    )
    trainer.train()
    _keep_truth(folder, model, whole_of_parts(trainer.model))
