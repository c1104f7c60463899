"""A Hub to push to, a run to push, and the real client as a user starts it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import Account, LocalHub
from pushing import FINE, HOST, MANIFEST, READ, RUN_FLAGS, SCORES, SECRET_CONFIG, STRANGER, TEXT, WRITE, Client


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    accounts = {
        WRITE: Account("user", orgs=("team",)),
        READ: Account("user", role="read"),
        STRANGER: Account("somebody"),
        FINE: Account("user", role="fineGrained", scopes=(("user/fine", ("repo.content.read", "repo.write")),)),
    }
    with LocalHub(accounts) as running:
        yield running


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as training, consolidation and evaluation leave it, with a tiny random RoBERTa in it."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT] * 4, vocab_size=300, special_tokens=[*special.values(), "<mask>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, mask_token="<mask>", cls_token="<s>", sep_token="</s>", **special
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, **sizes))
    model.save_pretrained(folder / "model")
    model.save_pretrained(folder / "sharded", max_shard_size="30KB")
    tokenizer.save_pretrained(folder / "sharded")

    (folder / "config.yaml").write_text(SECRET_CONFIG)
    (folder / "data.json").write_text(json.dumps(MANIFEST))
    (folder / "eval.json").write_text(json.dumps(SCORES))
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "rank-00000.safetensors").write_bytes(b"a checkpoint")
    for name in ("training_args.bin", "optimizer.pt", "notes.log", ".env"):
        (folder / "model" / name).write_bytes(b"not to be pushed")
    return folder


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps as `cloze train` leaves it, from a folder of this machine; secrets among its flags."""
    from corpus import TINY_MODEL_NO_DROPOUT
    from ranks import cloze_ranks, succeed

    def name_the_host() -> None:
        socket.gethostname = lambda: HOST

    folder = tmp_path_factory.mktemp("trained") / HOST
    flags = ["--dataset_name", str(prepared), "--output_dir", str(folder / "run"), *RUN_FLAGS, *TINY_MODEL_NO_DROPOUT]
    secret = ["--token", WRITE, "--run_name", HOST, "--cache_dir", str(folder / "cache")]
    succeed(cloze_ranks(["train", *flags, *secret], 1, "single", folder / "log", before=name_the_host))
    return folder / "run"


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that the test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "tiny"))


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path) -> Client:
    """`client(*words, token=...)`: Python in a process of its own, its Hub client pointed at `hub`."""

    def call(*words: object, token: str | None = WRITE, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {}) | environment
        words = (sys.executable, *map(str, words))
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    return call


@pytest.fixture
def push(client: Client) -> Client:
    """`push(path, "--repo", ..., token=...)`: the command as a user types it."""

    def call(*words: object, **options: str | None) -> subprocess.CompletedProcess[str]:
        return client("-m", "cloze", "push", *words, **options)

    return call
