"""The whole chain on real text, each command as a user types it, and the numbers it hands to the next one.

ELI5 threads -> blocks -> two processes with ZeRO-3 -> one model folder -> perplexity -> the Hub -> back from there ->
the mask filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from huggingface_hub import ModelCard
from local_hub import LocalHub
from pushing import WRITE
from repository import ROOT

NARROW = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
SENTENCE = "The Milky Way is a <mask> galaxy."
PULL = """
import json, sys, huggingface_hub
from transformers import pipeline
folder = huggingface_hub.snapshot_download(sys.argv[1])
for model in (folder, sys.argv[1]):
    print(json.dumps([(one["token"], one["score"]) for one in pipeline("fill-mask", model)(sys.argv[2])]))
print(json.dumps(folder))
"""
FILL = """
import json, sys
from transformers import pipeline
print(json.dumps([(one["token"], one["score"]) for one in pipeline("fill-mask", sys.argv[1])(sys.argv[2])]))
"""


@pytest.fixture
def type_in(hub: LocalHub, tmp_path: Path) -> Callable[..., str]:
    """`type_in("cloze", "train", ...)`: run a command to its good end, and return what it printed."""

    def run(*words: object) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE, "OMP_NUM_THREADS": "1"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        argv = [sys.executable, *map(str, words)]
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def scores_of(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "eval.json").read_text())
    return {name: found[name] for name in ("loss", "perplexity", "masked_accuracy", "bits_per_byte", "masked_tokens")}


@pytest.mark.slow
def test_real_text_goes_all_the_way_to_the_hub_and_back(
    shared_data: Path, hub: LocalHub, type_in: Callable[..., str], tmp_path: Path
):
    roberta = shared_data / "tokenizers" / "roberta-base"
    corpus = shared_data / "eli5_category" / "eli5-category-validation-2.json.gz"
    source = ["--text_field", "answers.text", "--tokenizer_name", roberta, "--split", "train[:300]"]
    type_in("-m", "cloze", "prepare", "--dataset_name", corpus, *source, "--output", "blocks")
    manifest = json.loads((tmp_path / "blocks" / "manifest.json").read_text())

    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")  # named from the folder the command is typed in
    launch = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "launch" / "accelerate" / "zero3.yaml"]
    model = ["--config_name", roberta, "--config_overrides", NARROW, "--max_steps", "12", "--learning_rate", "1e-2"]
    when = ["--eval_strategy", "steps", "--eval_steps", "6", "--eval_on_start", "--save_steps", "6", "--use_cpu"]
    train = ["-m", "cloze", "train", "--dataset_name", "blocks", "--output_dir", "run", *model, *when]
    said = type_in(*launch, "--num_processes", "2", *train)
    assert "2 ranks on 1 host, DeepSpeed ZeRO-3" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    while_training = {line["step"]: line for line in lines if "eval_loss" in line}
    assert while_training[12]["eval_loss"] < while_training[0]["eval_loss"] - 1
    assert json.loads((tmp_path / "run" / "data.json").read_text())["checksum"] == manifest["checksum"]

    assert "logits as in training" in type_in("-m", "cloze", "consolidate", "run")
    type_in("-m", "cloze", "evaluate", "run", "--data", "blocks", "--split", "validation")
    scores = scores_of(tmp_path / "run")
    assert scores["loss"] == pytest.approx(while_training[12]["eval_loss"], rel=1e-6)
    assert scores["perplexity"] == pytest.approx(while_training[12]["eval_perplexity"], rel=1e-6)

    type_in("-m", "cloze", "push", "run", "--repo", "chain", "--dataset_repo", "chain-blocks")
    card = ModelCard(hub.files("user/chain")["README.md"].decode())
    pushed = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert pushed == {name: scores[name] for name in ("perplexity", "masked_accuracy", "bits_per_byte")}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert hub.files("user/chain")[name] == (tmp_path / "run" / "model" / name).read_bytes()
    for sent in (*hub.received, *hub.files("user/chain").values(), *hub.files("datasets/user/chain-blocks").values()):
        assert str(tmp_path).encode() not in sent
        assert WRITE.encode() not in sent

    *pulled, folder = map(json.loads, type_in("-c", PULL, "user/chain", SENTENCE).splitlines())
    here = json.loads(type_in("-c", FILL, tmp_path / "run" / "model", SENTENCE))
    assert pulled == [here, here]
    best = type_in("-m", "cloze", "fill", "user/chain", SENTENCE).splitlines()[0]
    assert f"{here[0][1]:.2%}" in best

    for place, name in ((folder, "pulled"), ("user/chain", "named")):
        output = tmp_path / name
        type_in("-m", "cloze", "evaluate", place, "--data", "blocks", "--split", "validation", "--output", output)
        assert json.loads(output.read_text())["loss"] == pytest.approx(scores["loss"], rel=1e-12)


@pytest.mark.slow
def test_no_secret_is_left_anywhere_from_training_to_the_hub(prepared: Path, hub: LocalHub, tmp_path: Path):
    """Secrets in the environment, on the command line, and in errors: no file, output or upload has one."""
    canary = "c4n4ry" * 6
    secrets = {
        "HF_TOKEN": WRITE,
        "WANDB_API_KEY": "0f" * 20,
        "AWS_SECRET_ACCESS_KEY": canary,
        "CLOZE_SECRET": "rendezvous" + canary,
        "MY_PASSWORD": "pass-" + canary,
    }
    given = {"token": "hf_" + "Ar9" * 12, "url": "p4ssw0rd" + canary, "key": "sk-" + "b7X" * 12}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **secrets}
    env["OMP_NUM_THREADS"] = "1"
    said = []

    def run(*words: object, code: int = 0) -> None:
        argv = [sys.executable, "-m", "cloze", *map(str, words)]
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout + done.stderr)

    train = ["train", *TINY_MODEL, "--max_steps", "2", "--save_steps", "1", "--output_dir", "run", "--use_cpu"]
    run(*train, "--dataset_name", f"https://me:{given['url']}@host/x.jsonl", code=2)
    run(*train, "--dataset_name", prepared, "--run_name", given["key"], code=2)
    run(*train, "--dataset_name", prepared, "--token", given["token"], "--report_to", "tensorboard")
    run("consolidate", "run")
    run("evaluate", "run", "--data", prepared)
    run("report", "run", "--output", "report.html")
    run("push", "run", "--repo", "canary")
    (tmp_path / "run" / "model" / "README.md").write_text(f"use {given['key']}")
    run("push", "run", "--repo", "canary", code=2)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) > 20
    everything = b"".join([*files, *hub.received, *hub.files("user/canary").values(), *(one.encode() for one in said)])
    found = [name for name, secret in {**secrets, **given}.items() if secret.encode() in everything]
    assert found == []
