"""Every command and every file that README names works as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import cloze_ranks
from repository import ROOT

from cloze.config.commands import COMMANDS
from cloze.config.parser import parse
from cloze.tools.demo.corpus import write_corpus

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The commands of README's shell blocks, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus.jsonl in which README's commands run, as in the repository's root."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("launch", "ds_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    write_corpus(folder / "corpus.jsonl", num_threads=800)
    return folder


def run(words: list[str], folder: Path) -> str:
    """Run a command in a process of its own, as a shell does; return what it printed."""
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def fork(words: list[str], folder: Path) -> str:
    """Run `cloze ...` in a fork, or `accelerate launch ... cloze ...` in two, which saves the imports."""
    two = words[0] == "accelerate"
    assert two or words[0] == "cloze"
    argv, engine = words[words.index("cloze") + 1 :], "zero2" if two else "single"
    outcomes = cloze_ranks(argv, 2 if two else 1, engine, folder / "log", before=lambda: os.chdir(folder))
    output = outcomes[0].output
    # The doctor may find that this machine is not fit to train on; then it says what is, and ends with 2.
    found = 2 if words[-1] == "doctor" and re.search(r"^BAD  ", output, re.MULTILINE) else 0
    assert [outcome.code for outcome in outcomes] == [found] * len(outcomes), f"{words}\n{output}"
    return output


def test_the_commands_for_your_own_text_run_as_written(workplace: Path):
    ours = [words for words in commands() if "--config" not in words and "/" not in words[0]]
    assert [words[words.index("cloze") + 1] for words in ours] == [
        "tokenizer", "prepare", "train", "consolidate", "evaluate", "compare", "fill", "push", "report", "inspect",
        "archs", "plan", "tokenizer", "grow", "replay", "doctor",
    ]  # fmt: skip
    for words in ours:
        (run if words[0] == "accelerate" else fork)(words, workplace)
    listed = re.search(r"runs/mine/\n((?: {6}.*\n)+)", README)
    assert listed
    for name in re.findall(r"^ {6}(\S+)(?:  (checkpoint-\S+))?", listed.group(1), re.MULTILINE):
        for part in filter(None, name):
            assert (workplace / "runs" / "mine" / part).exists(), part


def test_a_stopped_run_goes_on_as_readme_says(workplace: Path):
    train = next(words for words in commands() if "train" in words and "--config" not in words)
    assert "--resume_from_checkpoint auto" in README
    output = fork([*train, "--resume_from_checkpoint", "auto"], workplace)
    assert "from runs/mine/checkpoint-40 at step 40" in output


def test_the_recipe_commands_run_on_other_text(workplace: Path):
    """As written they need the Hub: the corpus, the tokenizer and the weights are replaced, the rest stays."""
    prepare, train = (words for words in commands() if "--config" in words)
    source = ["--dataset_name", "corpus.jsonl", "--dataset_revision", "null", "--tokenizer_name", "tokenizers/mine"]
    fork([*prepare, *source], workplace)
    scratch = ["--model_name_or_path", "null", "--model_type", "roberta", "--max_steps", "2", "--eval_strategy", "no"]
    narrow = ["--config_overrides", "hidden_size=32,num_hidden_layers=6,num_attention_heads=2,intermediate_size=64"]
    fork([*train, *scratch, *narrow, "--eval_on_start", "false"], workplace)
    assert (workplace / "runs" / "distilroberta-eli5" / "checkpoint-2").is_dir()


def test_the_commands_for_many_machines_run_as_written(workplace: Path):
    submit, multi_node = (words for words in commands() if words[0].split("/")[0] in ("slurm", "launch"))
    assert run(submit, workplace).count("sbatch --parsable") == 4
    assert "--rank 1" in run(multi_node, workplace)


def test_the_two_commands_exist_and_the_demo_runs(tmp_path: Path):
    assert [words[0] for words in commands() if words[0].startswith("./")] == ["./launch/demo", "./launch/test"]
    assert all(os.access(ROOT / name, os.X_OK) for name in ("launch/demo", "launch/test"))
    assert re.search(r"^exec cloze demo \"\$@\"$", (ROOT / "launch" / "demo").read_text(), re.MULTILINE)
    words = [sys.executable, "-m", "cloze", "demo", "--output_dir", str(tmp_path / "demo"), "--max_steps", "6"]
    done = run(words, tmp_path)
    for part in ("ZeRO-2", "perplexity", "The Milky Way is a", "Next: cloze fill"):
        assert part in done
    for name in ("config.yaml", "metrics.jsonl", "checkpoint-6", "model/model.safetensors", "eval.json"):
        assert (tmp_path / "demo" / name).exists()


@pytest.mark.slow
def test_the_demo_resumes_when_it_is_started_again(tmp_path: Path):
    words = [sys.executable, "-m", "cloze", "demo", "--output_dir", str(tmp_path / "demo"), "--max_steps", "6"]
    run(words, tmp_path)
    assert "at step 6" in run(words, tmp_path)


def test_every_file_and_command_that_readme_names_exists():
    for path in re.findall(r"`((?:launch|slurm|ds_configs|tests)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:data|train)/\w+\.py|\w+\.py)`", README):
        assert (ROOT / "src" / "cloze" / path).exists() or path == "run_mlm.py", path
    for path in re.findall(r"`pytest ([\w/.]+)`", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"launch/accelerate/\{([\w,]+)\}\.yaml", README)[0].split(","):
        assert (ROOT / "launch" / "accelerate" / f"{name}.yaml").exists(), name
    for name in re.findall(r"`cloze (\w+)", README):
        assert name in COMMANDS or name == "COMMAND", name
    assert len(README.splitlines()) < 400


@pytest.mark.parametrize("words", [w for w in commands() if "cloze" in w], ids=" ".join)
def test_every_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    parse(words[words.index("cloze") + 1 :])
