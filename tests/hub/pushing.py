"""What the tests of pushing share: tokens, and what a run leaves behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

WRITE, READ, STRANGER = "hf_writetokenwritetoken", "hf_readtokenreadtoken", "hf_strangertokenstranger"
TEXT = "The Milky Way is a spiral galaxy. A whale is a mammal and a shark is a fish."
SECRET_CONFIG = (
    "learning_rate: 0.001\nseed: 7\noutput_dir: /secret/place\ntoken: hf_secretofconfig\n"
    "deepspeed: /secret/place/zero2.json\nmodel_name_or_path: distilbert/distilroberta-base\n"
)
SCORES = {
    "perplexity": 6.5,
    "loss": 1.87,
    "masked_accuracy": 0.61,
    "masked_tokens": 1485,
    "blocks": 77,
    "split": "validation",
    "mlm_probability": 0.15,
    "seed": 42,
}
MANIFEST = {
    "block_size": 32,
    "tokenizer": {"name": "tokenizer"},
    "source": {"dataset_name": "corpus.jsonl", "files": [{"name": "corpus.jsonl"}], "text_field": "answers.text"},
    "splits": {"train": {"documents": 120, "tokens": 7000, "blocks": 218}},
}
Client = Callable[..., "subprocess.CompletedProcess[str]"]
