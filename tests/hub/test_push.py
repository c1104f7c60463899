"""`cloze push` with the real Hub client, over HTTP, against a Hub of the test suite's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from corpus import make_prepared
from huggingface_hub import ModelCard
from local_hub import Fault, LocalHub
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaConfig, RobertaForMaskedLM

WRITE, READ = "hf_writetokenwritetoken", "hf_readtokenreadtoken"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub({WRITE: {"name": "user", "role": "write"}, READ: {"name": "user", "role": "read"}}) as running:
        yield running


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as training, consolidation and evaluation leave it, with a random model in it."""
    folder = tmp_path_factory.mktemp("run")
    make_prepared(folder / "data", num_threads=60)
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    (folder / "config.yaml").write_text("learning_rate: 0.001\nseed: 7\noutput_dir: /secret/place\ntoken: hf_abc\n")
    (folder / "data.json").write_text((folder / "data" / "prepared" / "manifest.json").read_text())
    scores = {"perplexity": 6.5, "loss": 1.87, "masked_accuracy": 0.61, "masked_tokens": 1485, "split": "validation"}
    (folder / "eval.json").write_text(json.dumps(scores))
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "rank-00000.safetensors").write_bytes(b"not to be pushed")
    (folder / "model" / "training_args.bin").write_bytes(b"not to be pushed")
    return folder


def client(hub: LocalHub, home: Path, *words: str, token: str | None = WRITE) -> subprocess.CompletedProcess[str]:
    """Run Python with the real client pointed at the test's Hub."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    if token:
        env["HF_TOKEN"] = token
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=120)


def push(hub: LocalHub, home: Path, *words: str, token: str | None = WRITE) -> subprocess.CompletedProcess[str]:
    return client(hub, home, "-m", "cloze", "push", *words, token=token)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("cloze: warning")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("cloze: error: ")
    return lines[0]


def test_a_pushed_model_comes_back_the_same(hub: LocalHub, run_dir: Path, tmp_path: Path):
    done = push(hub, tmp_path, str(run_dir), "--repo", "demo")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/user/demo/commit/" in done.stdout
    files = hub.files("user/demo")
    assert set(files) == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert files["model.safetensors"] == (run_dir / "model" / "model.safetensors").read_bytes()

    script = (
        "import sys, torch; from transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        "model = AutoModelForMaskedLM.from_pretrained('user/demo').eval()\n"
        "ids = AutoTokenizer.from_pretrained('user/demo')('The Milky Way', return_tensors='pt')\n"
        "torch.save(model(**ids).logits.detach(), sys.argv[1])\n"
    )
    pulled = client(hub, tmp_path / "other", "-c", script, str(tmp_path / "logits.pt"), token=None)
    assert pulled.returncode == 0, pulled.stderr
    model = AutoModelForMaskedLM.from_pretrained(run_dir / "model").eval()
    ids = AutoTokenizer.from_pretrained(run_dir / "model")("The Milky Way", return_tensors="pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**ids).logits)

    card = ModelCard(files["README.md"].decode())
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {"perplexity": 6.5, "masked_accuracy": 0.61}
    assert card.data.pipeline_tag == "fill-mask"


def test_no_secret_and_no_path_is_pushed_or_printed(hub: LocalHub, run_dir: Path, tmp_path: Path):
    done = push(hub, tmp_path, str(run_dir), "--repo", "user/demo")
    assert done.returncode == 0
    sent = b"".join(hub.received) + b"".join(hub.files("user/demo").values())
    for secret in (WRITE, "hf_abc", "/secret/place", str(run_dir)):
        assert secret.encode() not in sent
        if secret != str(run_dir):
            assert secret not in done.stdout + done.stderr


def test_private_and_revision_reach_the_hub(hub: LocalHub, run_dir: Path, tmp_path: Path):
    done = push(hub, tmp_path, str(run_dir), "--repo", "demo", "--private", "--revision", "v2")
    assert done.returncode == 0, done.stderr
    assert hub.repos["user/demo"].private
    assert "config.json" in hub.files("user/demo", "v2")
    assert hub.files("user/demo", "main") == {}


def test_pushing_the_same_again_uploads_no_weights(hub: LocalHub, run_dir: Path, tmp_path: Path):
    assert push(hub, tmp_path, str(run_dir), "--repo", "demo").returncode == 0
    before, uploads = dict(hub.files("user/demo")), sum(method == "PUT" for method, _ in hub.log)
    assert uploads == 1
    assert push(hub, tmp_path, str(run_dir), "--repo", "demo").returncode == 0
    assert hub.files("user/demo") == before
    assert sum(method == "PUT" for method, _ in hub.log) == uploads


def test_a_dry_run_needs_no_hub(hub: LocalHub, run_dir: Path, tmp_path: Path):
    done = push(hub, tmp_path, str(run_dir), "--repo", "demo", "--dry_run", token=None)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "perplexity" in done.stdout
    assert hub.log == []


def test_a_busy_hub_is_asked_again(hub: LocalHub, run_dir: Path, tmp_path: Path):
    hub.faults = [Fault("POST", "/commit/main", 503, times=2)]
    done = push(hub, tmp_path, str(run_dir), "--repo", "demo")
    assert done.returncode == 0, done.stderr
    assert "trying again" in done.stderr
    assert "model.safetensors" in hub.files("user/demo")


def test_what_the_hub_refuses_is_one_line(hub: LocalHub, run_dir: Path, tmp_path: Path):
    for token, repo, expected in (
        ("hf_wrong", "demo", "not valid"),
        (READ, "demo", "scope `write`"),
        (None, "demo", "no Hub token"),
        (WRITE, "somebody/demo", "may not write"),
        (WRITE, "a/b/c", "owner/name"),
    ):
        assert expected in refused(push(hub, tmp_path, str(run_dir), "--repo", repo, token=token))
    assert hub.repos == {}


def test_what_cannot_be_pushed_is_said_before_the_hub_is_asked(hub: LocalHub, run_dir: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    for path, expected in (("nowhere", "no such folder"), ("run", "cloze consolidate"), ("pickled", "safetensors")):
        assert expected in refused(push(hub, tmp_path, str(tmp_path / path), "--repo", "demo"))
    assert hub.log == []
