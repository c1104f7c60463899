"""The whole main job on the sample corpus, with the commands a user would type.

    corpus -> tokenizer -> prepare -> train (2 processes, DeepSpeed ZeRO-2) -> consolidate -> evaluate -> fill

Started again, it resumes where it was stopped.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch

from cloze.config import DemoConfig
from cloze.errors import ConfigError
from cloze.tools.demo.corpus import write_corpus
from cloze.utils.environment import requests
from cloze.utils.terminal.console import say, show

VOCAB_SIZE = 4000
BLOCK_SIZE = 32
PROBE = "The shape of the Milky Way is <mask>."  # without an article, which would not fit every answer

# A model small enough to learn the sample corpus from nothing in about three minutes on two cores. Larger initial
# weights, more masks and a smaller beta2 than usual shorten the plateau at the beginning, where a small model stays.
RECIPE = {
    "model_type": "roberta",
    "config_overrides": "hidden_size=128,num_hidden_layers=2,num_attention_heads=4,intermediate_size=512,"
    "initializer_range=0.06,hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0",
    "mlm_probability": "0.3",
    "learning_rate": "4e-3",
    "adam_beta2": "0.98",
    "weight_decay": "0.01",
    "warmup_steps": "0.05",
    "lr_scheduler_type": "linear",
    "eval_strategy": "steps",
    "eval_on_start": "true",
    "per_device_eval_batch_size": "64",
    "logging_steps": "20",
    "save_total_limit": "2",
}
GLOBAL_BATCH, STEPS = 64, 1200


def run_demo(config: DemoConfig) -> Path:
    """Run every stage and return the run's folder. Raises ConfigError if training fails."""
    folder = Path(config.output_dir)
    num_processes = config.num_processes or torch.cuda.device_count() or 2
    if num_processes < 1 or GLOBAL_BATCH % num_processes:
        raise ConfigError(f"must divide {GLOBAL_BATCH}", where="--num_processes")
    steps = config.max_steps if config.max_steps > 0 else STEPS
    corpus, tokenizer, prepared = (folder / "data" / name for name in ("corpus.jsonl", "tokenizer", "prepared"))
    if not corpus.exists():
        corpus.parent.mkdir(parents=True, exist_ok=True)
        threads = write_corpus(corpus)
        say("corpus", f"{threads:,} threads of true statements -> {corpus}")
    source = ["--dataset_name", str(corpus), "--text_field", "answers.text"]
    if not tokenizer.exists():
        cloze("tokenizer", *source, "--vocab_size", str(VOCAB_SIZE), "--output", str(tokenizer))
    if not prepared.exists():
        cloze("prepare", *source, "--tokenizer_name", str(tokenizer), "--block_size", str(BLOCK_SIZE),
              "--output", str(prepared))  # fmt: skip
    train(folder, prepared, num_processes, steps)
    cloze("consolidate", str(folder))
    masks = ["--mlm_probability", RECIPE["mlm_probability"]]  # the masks that training was measured on
    cloze("evaluate", str(folder), "--data", str(prepared), *masks)
    show(f'\ncloze fill {shlex.quote(str(folder))} "{PROBE}"')
    cloze("fill", str(folder), PROBE)
    return folder


def train(folder: Path, prepared: Path, num_processes: int, steps: int) -> None:
    """Run `accelerate launch ... -m cloze train ...` in new processes."""
    flags = RECIPE | {
        "dataset_name": str(prepared),
        "output_dir": str(folder),
        "max_steps": str(steps),
        "eval_steps": str(max(1, steps // 3)),
        "save_steps": str(max(1, steps // 3)),
        "per_device_train_batch_size": str(GLOBAL_BATCH // num_processes),
        "resume_from_checkpoint": "auto",
    }
    launcher = ["--use_deepspeed", "--zero_stage", "2", "--num_processes", str(num_processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = [sys.executable, "-m", "cloze.tools.launch.launcher", *launcher, "-m", "cloze", "train"]
    words += [word for name, value in flags.items() for word in (f"--{name}", value)]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    quiet = (
        {} if torch.cuda.is_available() else {requests.DEEPSPEED_DEVICE: "cpu"}
    )  # else the launcher warns of no GPU
    call(words, {"OMP_NUM_THREADS": str(threads), **quiet})


def cloze(*words: str) -> None:
    """Run one cloze command in a new process, as a user would start it."""
    call([sys.executable, "-m", "cloze", *words], {})


def call(words: list[str], environment: dict[str, str]) -> None:
    """Run a command to its end; its failure is this command's failure."""
    code = subprocess.run(words, env=os.environ | environment, check=False).returncode
    if code in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise ConfigError(
            f"stopped with exit code {code}", where=" ".join(words[2:5]), hint="the reason is in the lines above"
        )
