"""Every command and every piece of Python in README and docs works as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import blocks, commands, pages
from ranks import cloze_ranks
from repository import ROOT

from cloze.config.commands import COMMANDS
from cloze.config.parser import parse
from cloze.tools.demo.corpus import threads

pytestmark = pytest.mark.timeout(1800)  # the first test waits for all commands
PAGES = pages()
QUICKSTART = ROOT / "docs" / "quickstart.md"


def every_command() -> list[list[str]]:
    """The commands of all pages in order, each once: a command on several pages makes the same on each."""
    found = {tuple(words): words for page in PAGES for words in commands(page)}
    return list(found.values())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus in which the commands run, as in the repository's root."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("launch", "ds_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    with (folder / "corpus.jsonl").open("w") as corpus:
        for thread in threads(num_threads=800):
            corpus.write(json.dumps({**thread, "text": " ".join(thread["answers"]["text"])}) + "\n")
    (folder / "sentences.txt").write_text("The Milky Way is a spiral galaxy.\nA zebra is a mammal.\n")
    (folder / "prompts.txt").write_text("The Milky Way is a <mask> galaxy.\n")
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
    launched = words[0] == "accelerate"
    assert launched or words[0] == "cloze", words
    argv, two = words[words.index("cloze") + 1 :], "zero2" if "launch/accelerate/zero2.yaml" in words else "ddp"
    engine = two if launched else "single"
    outcomes = cloze_ranks(argv, 2 if launched else 1, engine, folder / "log", before=lambda: os.chdir(folder))
    output = outcomes[0].output
    # The doctor may find that this machine is not fit to train on; then it says what is, and ends with 2.
    found = 2 if words[-1] == "doctor" and re.search(r"^BAD  ", output, re.MULTILINE) else 0
    assert [outcome.code for outcome in outcomes] == [found] * len(outcomes), f"{words}\n{output}"
    return output


@pytest.fixture(scope="module")
def outputs(workplace: Path) -> dict[str, str]:
    """What each command printed that needs neither the Hub nor an installation, all run in order. The first command
    of each launcher runs as written, in new processes; the others in forks."""
    printed, seen = {}, {"cloze"}
    for words in every_command():
        if "--config" in words or words[0].startswith("./"):
            continue
        printed[" ".join(words)] = (fork if words[0] in seen else run)(words, workplace)
        seen |= {words[0]} & {"accelerate"}
    return printed


def test_every_command_runs_as_written(workplace: Path, outputs: dict[str, str]):
    named = {words[words.index("cloze") + 1] for words in every_command() if "cloze" in words}
    assert named >= COMMANDS.keys() - {"demo", "submit", "bench", "completion"}
    listed = re.search(r"runs/mine/\n((?: {6}.*\n)+)", QUICKSTART.read_text())
    assert listed
    for name in re.findall(r"^ {6}(\S+)(?:  (checkpoint-\S+))?", listed.group(1), re.MULTILINE):
        for part in filter(None, name):
            assert (workplace / "runs" / "mine" / part).exists(), part
    submit, multi_node = (text for words, text in outputs.items() if words.startswith(("slurm/", "launch/")))
    assert submit.count("sbatch --parsable") == 4
    assert "--rank 1" in multi_node


@pytest.mark.parametrize(("run", "step"), [("mine", 40), ("elastic", 20)])
def test_a_stopped_run_resumes(outputs: dict[str, str], run: str, step: int):
    (output,) = (text for words, text in outputs.items() if f"runs/{run} " in words and "--resume_from" in words)
    assert f"from runs/{run}/checkpoint-{step} at step {step}" in output


def test_python_runs_as_written(workplace: Path, outputs: dict[str, str]):
    (code,) = (code for page in PAGES for code in blocks(page.read_text(), "python"))
    printed = run([sys.executable, "-c", code], workplace)
    loss, perplexity, token = (line for line in printed.splitlines() if " " not in line.strip())
    assert 0 < float(loss) < float(perplexity)
    assert token.strip()


def test_the_recipe_commands_run_on_other_text(workplace: Path, outputs: dict[str, str]):
    """As written they need the Hub: the corpus, the tokenizer and the weights are replaced, the rest stays."""
    prepare, train = (words for words in every_command() if "--config" in words)
    source = ["--dataset_name", "corpus.jsonl", "--dataset_revision", "null", "--tokenizer_name", "tokenizers/mine"]
    fork([*prepare, *source], workplace)
    scratch = ["--model_name_or_path", "null", "--model_type", "roberta", "--max_steps", "2", "--eval_strategy", "no"]
    narrow = ["--config_overrides", "hidden_size=32,num_hidden_layers=6,num_attention_heads=2,intermediate_size=64"]
    fork([*train, *scratch, *narrow, "--eval_on_start", "false"], workplace)
    assert (workplace / "runs" / "distilroberta-eli5" / "checkpoint-2").is_dir()


def test_the_two_commands_exist_and_the_demo_runs(tmp_path: Path):
    assert [words[0] for words in every_command() if words[0].startswith("./")] == ["./launch/demo", "./launch/test"]
    assert all(os.access(ROOT / name, os.X_OK) for name in ("launch/demo", "launch/test"))
    assert re.search(r"^exec cloze demo \"\$@\"$", (ROOT / "launch" / "demo").read_text(), re.MULTILINE)
    words = [sys.executable, "-m", "cloze", "demo", "--output_dir", str(tmp_path / "demo"), "--max_steps", "6"]
    done = run(words, tmp_path)
    for part in ("ZeRO-2", "perplexity", "The shape of the Milky Way is", "Next: cloze fill"):
        assert part in done
    for name in ("config.yaml", "metrics.jsonl", "checkpoint-6", "model/model.safetensors", "eval.json"):
        assert (tmp_path / "demo" / name).exists()


@pytest.mark.slow
def test_the_demo_resumes_when_it_is_started_again(tmp_path: Path):
    words = [sys.executable, "-m", "cloze", "demo", "--output_dir", str(tmp_path / "demo"), "--max_steps", "6"]
    run(words, tmp_path)
    assert "at step 6" in run(words, tmp_path)


@pytest.mark.parametrize("words", [w for w in every_command() if "cloze" in w], ids=" ".join)
def test_every_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    parse(words[words.index("cloze") + 1 :])
