"""`cloze evaluate`: perplexity and masked accuracy of a model on prepared blocks.

Under `accelerate launch` the blocks are shared between the processes; the result is the same.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from cloze.config import EvaluateConfig
from cloze.console import duration, say
from cloze.data.masking import Masking
from cloze.data.shards import Prepared, open_prepared
from cloze.data.tokenize import fingerprint, load_tokenizer
from cloze.distributed import RunShape, start
from cloze.errors import ConfigError, ModelError
from cloze.evaluation import Scores, score_blocks
from cloze.files import write_json
from cloze.fill import model_folder
from cloze.model.archs import decoder_start
from cloze.model.load import check_fits, load_pretrained
from cloze.model.packed import document_attention, model_inputs
from cloze.model.sparse_head import MaskedHead, check_head


def run(config: EvaluateConfig) -> None:
    """Evaluate, print one line, write eval.json."""
    if config.per_device_eval_batch_size < 1:
        raise ConfigError("must be at least 1", where="--per_device_eval_batch_size")
    if not 0.0 < config.mlm_probability <= 1.0:
        raise ConfigError("must be above 0 and at most 1", where="--mlm_probability")
    prepared = open_prepared(config.data)
    blocks = prepared.blocks(config.split)
    folder = model_folder(config.model)
    model = load_pretrained(folder, config.trust_remote_code)
    check_fits(model.config, prepared.manifest["tokenizer"]["vocab_size"], prepared.block_size)
    if fingerprint(load_tokenizer(folder, config.trust_remote_code)) != prepared.manifest["tokenizer"]["fingerprint"]:
        raise ModelError(
            "the model's tokenizer is not the one the data was prepared with",
            where=config.model,
            hint=f"prepare the corpus with --tokenizer_name {folder}",
        )
    vocab_size = model.config.get_text_config().vocab_size
    packed = prepared.packing == "best_fit"
    documents = document_attention(model, prepared.block_size, vocab_size) if packed else None
    accelerator = start(RunShape(use_cpu=config.use_cpu, precision="no"))
    model.to(accelerator.device)
    head, begin_with = MaskedHead(model), decoder_start(model.config)
    first = torch.from_numpy(blocks.read(np.zeros(1, np.int64)).astype(np.int64))
    check_head(head, model, {"input_ids": first.to(accelerator.device)}, "no")
    masking = Masking.from_manifest(prepared.manifest, config.seed, config.mlm_probability)
    begin = time.monotonic()
    scores = score_blocks(
        lambda batch: head.logits(
            model,
            model_inputs(batch, accelerator.device, documents, begin_with),
            batch["positions"].to(accelerator.device),
        ),
        blocks,
        masking.for_evaluation(),
        config.per_device_eval_batch_size,
        accelerator,
    )
    if accelerator.is_main_process:
        took = duration(time.monotonic() - begin)
        say(
            "evaluate",
            f"perplexity {scores.perplexity:.4f}, masked accuracy {scores.masked_accuracy:.4f} on "
            f"{scores.masked_tokens:,} masked tokens of {scores.blocks:,} blocks; {took}",
        )
        _write(config, _output_path(config, folder), scores, prepared)


def _write(config: EvaluateConfig, output: Path | None, scores: Scores, prepared: Prepared) -> None:
    if output is None:
        return
    values = {
        "perplexity": scores.perplexity,
        "loss": scores.loss,
        "masked_accuracy": scores.masked_accuracy,
        "masked_tokens": scores.masked_tokens,
        "blocks": scores.blocks,
        "block_size": prepared.block_size,
        "split": config.split,
        "mlm_probability": config.mlm_probability,
        "seed": config.seed,
        "data": Path(config.data).name,
        "data_checksum": prepared.manifest["checksum"],
    }
    write_json(output, values)
    say("evaluate", f"written to {output}")


def _output_path(config: EvaluateConfig, folder: str) -> Path | None:
    """--output, else eval.json in the run's folder, else nowhere."""
    if config.output:
        return Path(config.output)
    run = Path(folder).parent
    return run / "eval.json" if (run / "config.yaml").is_file() else None
