"""`cloze demo`: the whole job on the sample corpus."""

from __future__ import annotations

import time

from cloze.checkpoint.run_folder import read_metrics
from cloze.config import DemoConfig
from cloze.tools.demo.run_demo import run_demo
from cloze.utils.terminal.console import duration, show


def run(config: DemoConfig) -> None:
    """Run the demo and sum it up."""
    begin = time.monotonic()
    folder = run_demo(config)
    measured = [line["eval_perplexity"] for line in read_metrics(folder) if "eval_perplexity" in line]
    show(f"""
Done in {duration(time.monotonic() - begin)}. Perplexity {measured[0]:,.1f} before training, {measured[-1]:.2f} after.

  {folder}/config.yaml       what was run
  {folder}/metrics.jsonl     loss, learning rate, speed
  {folder}/checkpoint-*/     resumable, on any number of processes
  {folder}/model/            AutoModelForMaskedLM.from_pretrained("{folder}/model")
  {folder}/eval.json         perplexity and masked accuracy

Next: cloze fill {folder} "The opposite of hot is <mask>."
      cloze push {folder} --repo YOUR_NAME/my-first-cloze --dry_run""")
