"""What the tests of pushing share: tokens, and what a run leaves behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

WRITE, READ, STRANGER = "hf_writetokenwritetoken", "hf_readtokenreadtoken", "hf_strangertokenstranger"
FINE = "hf_finegrainedtokenofuser"  # may write user/fine, and open pull requests nowhere
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
HOST = "planted-host-17"  # what the machine of the trained run is called, and a folder on it
RUN_FLAGS = ["--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3", "--use_cpu"]
Client = Callable[..., "subprocess.CompletedProcess[str]"]


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("cloze: warning")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("cloze: error: ")
    return lines[0]


def accepted(done: subprocess.CompletedProcess[str]) -> str:
    """What a push printed."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def everything(files: dict[str, bytes]) -> bytes:
    """All bytes of a repository, names included."""
    return b"".join(name.encode() + content for name, content in files.items())
