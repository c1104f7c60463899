"""What CONTRIBUTING.md says of additions is so: four of them, on a copy of the package, in two files each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from repository import PACKAGE, ROOT

from cloze.config import TrainConfig
from cloze.data.batches.masking import MASK_UNITS
from cloze.training.optim import optimizers

Edits = dict[str, list[tuple[str, str]]]  # file below the package: what is replaced, and by what

FORMAT: Edits = {
    "data/corpus/formats.py": [
        (
            "def _parquet(",
            "def _psv(file: Any, piece: Piece, fields: Fields) -> Iterator[Item]:\n"
            '    yield from read_rows(file, piece.path, fields, "|", MAX_RECORD_BYTES)\n\n\n'
            "def _parquet(",
        ),
        (
            '    "tsv": Format(_tsv, "record"),\n',
            '    "tsv": Format(_tsv, "record"),\n    "psv": Format(_psv, "record"),\n',
        ),
    ],
    "config/data.py": [("arrow, csv, tsv, txt or md", "arrow, csv, tsv, psv, txt or md")],
}
METRIC: Edits = {
    "evaluation/perplexity.py": [
        (
            "    @property\n    def masked_accuracy(",
            "    @property\n    def masked_error(self) -> float:\n"
            '        """Share of masked tokens that are predicted wrong."""\n'
            "        return 1 - self.masked_accuracy\n\n"
            "    @property\n    def masked_accuracy(",
        )
    ],
    "evaluation/metric_table.py": [
        (
            '    Metric("bits_per_byte"',
            '    Metric("masked_error", "wrong", "wrong {:.4f}", "Masked error", "Share of errors", share=True),\n'
            '    Metric("bits_per_byte"',
        )
    ],
}
OPTIMIZER: Edits = {
    "config/train.py": [('"stable_adamw", "muon"]', '"stable_adamw", "muon", "adagrad"]')],
    "training/optim/optimizers.py": [
        ('"rmsprop": 1, "muon": 1}', '"rmsprop": 1, "muon": 1, "adagrad": 1}'),
        (
            '    if config.optim == "rmsprop":\n        return',
            '    if config.optim == "adagrad":\n        return torch.optim.Adagrad, {}\n'
            '    if config.optim == "rmsprop":\n        return',
        ),
    ],
}
GPU: Edits = {
    "model/flops.py": [('"GB200": 2500,', '"GB200": 2500, "X900": 3000,')],
    "tools/planning/gpus.py": [("_SHEET = {", '_SHEET = {\n    "X900-300GB": ("X900", 300, 9000, 900, 64),')],
}
ADDITIONS = {"a file format": FORMAT, "an evaluation metric": METRIC, "an optimizer": OPTIMIZER, "a GPU": GPU}
RUN = """
import json, os, sys, traceback
import cloze.cli.commands.evaluate, cloze.cli.commands.train
from cloze.cli.command_line import main
assert cloze.__file__.startswith(sys.argv[1]), cloze.__file__
for words in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        main(words)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"{words} ended with {code}")
"""


def guide_row(what: str) -> str:
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"| {what} |"))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package to which all of `ADDITIONS` were made."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(PACKAGE, folder / "cloze", ignore=shutil.ignore_patterns("__pycache__"))
    for edits in ADDITIONS.values():
        for name, replacements in edits.items():
            path = folder / "cloze" / name
            text = path.read_text()
            for old, new in replacements:
                assert text.count(old) == 1, f"{name}: {old}"
                text = text.replace(old, new)
            path.write_text(text)
    return folder


def outputs(extended: Path, *commands: list[str]) -> str:
    """What the commands print in a fresh process that imports the copy."""
    environment = {**os.environ, "PYTHONPATH": str(extended), "CLOZE_LOG_FORMAT": "plain", "COLUMNS": "200"}
    words = [sys.executable, "-c", RUN, str(extended), json.dumps(commands)]
    done = subprocess.run(words, env=environment, cwd=extended, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("what", ADDITIONS)
def test_an_addition_edits_the_two_files_that_the_guide_names(what: str):
    assert len(ADDITIONS[what]) <= 2
    assert [name for name in ADDITIONS[what] if f"`{name}`" not in guide_row(what)] == []


def test_what_was_added_works_from_the_corpus_to_the_report(extended: Path, prepared: Path):
    records = [json.loads(line) for line in (prepared.parent / "corpus.jsonl").read_text().splitlines()]
    rows = [" ".join(record["answers"]["text"]).replace("|", " ").replace('"', "").split() for record in records]
    (extended / "corpus.psv").write_text("\n".join(["text", *(" ".join(row) for row in rows)]) + "\n")
    source = [
        "--dataset_name",
        "corpus.psv",
        "--tokenizer_name",
        str(prepared.parent / "tokenizer"),
        "--output",
        "blocks",
    ]
    training = ["--max_steps", "2", "--optim", "adagrad", "--eval_on_start", "true", "--save_strategy", "steps"]
    printed = outputs(
        extended,
        ["prepare", "--help"],
        ["prepare", *source, "--block_size", "32", "--validation_split_percentage", "10"],
        ["train", "--help"],
        ["train", *TINY_MODEL, "--dataset_name", "blocks", "--output_dir", "run", "--use_cpu", "true", *training],
        ["evaluate", "run", "--data", "blocks", "--use_cpu", "true"],
        ["consolidate", "run"],
        ["report", "run"],
        ["plan", "run/config.yaml", "--gpus", "8xx900-300gb"],
    )
    assert "tsv, psv, txt" in printed
    assert "8 x X900-300GB" in printed
    assert "muon,adagrad" in printed.replace(" ", "")
    scores = json.loads((extended / "run" / "eval.json").read_text())
    assert scores["masked_error"] == 1 - scores["masked_accuracy"]
    assert f", wrong {scores['masked_error']:.4f}, " in printed
    first = json.loads((extended / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_masked_error"] == 1 - first["eval_masked_accuracy"]
    page = (extended / "run" / "report.html").read_text()
    assert ">wrong</th>" in page
    assert "Share of errors" in page
    assert "Masked error" in (extended / "run" / "model" / "README.md").read_text()


def choices(name: str) -> set[str]:
    return set(typing.get_args(typing.get_type_hints(TrainConfig)[name]))


def test_tables_have_a_row_for_each_value_of_their_flag():
    assert choices("mask_unit") == set(MASK_UNITS)
    assert choices("optim") == set(optimizers._MOMENTS)
