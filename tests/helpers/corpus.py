"""Small real inputs that tests share: a corpus, its tokenizer, and the blocks made of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloze.config import PrepareConfig, TokenizerConfig


def make_prepared(folder: Path, num_threads: int = 300, block_size: int = 32) -> Path:
    """`folder`/corpus.jsonl, /tokenizer and /prepared, made with Cloze's own commands."""
    from cloze.cli.commands import prepare, tokenizer
    from cloze.tools.demo.corpus import write_corpus

    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.jsonl"
    write_corpus(corpus, num_threads=num_threads)
    source = {"dataset_name": str(corpus), "text_field": "answers.text"}
    tokenizer.run(TokenizerConfig(**source, output=str(folder / "tokenizer"), vocab_size=600))
    prepare.run(
        PrepareConfig(
            **source,
            tokenizer_name=str(folder / "tokenizer"),
            output=str(folder / "prepared"),
            block_size=block_size,
            validation_split_percentage=10,
        )
    )
    return folder / "prepared"


TINY_MODEL = [
    "--model_type",
    "roberta",
    "--config_overrides",
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64",
]
TINY_MODEL_NO_DROPOUT = [
    *TINY_MODEL[:3],
    TINY_MODEL[3] + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0",
]

# The same as arguments of `cloze.train(...)`.
TINY_CALL: dict[str, Any] = {
    "model_type": TINY_MODEL[1],
    "config_overrides": TINY_MODEL[3],
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}
