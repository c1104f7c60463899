"""What a stranger put into a run or a model stays text on a card, in commands to copy and on the terminal."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

from cloze.errors import DataError, HubError
from cloze.export.cards.markdown import class_name, fenced, in_table, quoted
from cloze.export.cards.metadata import with_values
from cloze.export.cards.model_card import render_card
from cloze.export.cards.reproduce import commands
from cloze.utils.atomic_files import write_json
from cloze.utils.foreign.card_yaml import dump_yaml, with_names
from cloze.utils.foreign.paths import visible
from cloze.utils.terminal.console import complain, say, show, warn

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
RUN: dict[str, Any] = {
    "config": {"model_type": "bert", "max_steps": 5, "optim": "x; rm -rf ~ #"},
    "data": {"source": {"dataset_name": "owner/data", "text_field": f"a{CLIPBOARD}"}, "tokenizer": {"name": "o/t"}},
}


@pytest.mark.parametrize("text", [CLIPBOARD, "\x9b2J", "a\rb", "\b", "\u202eabc", "\u2066", "\x00", "\x7f", "\u2028"])
def test_a_terminal_obeys_nothing_that_is_shown(text: str, capsys):
    assert visible(text) != text
    for speak in (complain, warn, show, lambda shown: say("stage", shown)):
        speak(f"before {text} after")
    complain(str(DataError(text, where=text, hint=text)))
    shown = capsys.readouterr()
    for line in (shown.out + shown.err).split("\n"):
        assert not set(line) & set("\x00\x07\x08\x1b\x7f\x9b\r\u202e\u2066\u2028")


def test_text_of_any_language_is_shown_as_it_is(capsys):
    text = "größe\t日本語 हिन्दी ไทย 👩‍🔬 x\u00a0y"
    say("stage", text)
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["DeepSpeed ZeRO-3; rm -rf ~", "DeepSpeed ZeRO-$(id)", ["FSDP2"], "\x1b", None])
def test_commands_to_copy_hold_nothing_but_words_of_ours(engine: Any):
    sessions = [{"engine": engine, "ranks": "2; id", "devices": ["NVIDIA"]}]
    for line in commands(RUN["config"], RUN["data"], sessions, "owner/name"):
        assert line.isprintable()
        words = shlex.split(line)
        assert "rm" not in words
        assert not {"$(id)", "id"} & set(words)


def model(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {"model_type": "bert", **values})
    return folder


@pytest.mark.parametrize("mask", ['"); import os; os.system("id") #', "\n```\n", "\\", "[MASK]", CLIPBOARD])
def test_a_mask_token_stays_inside_the_example(tmp_path: Path, mask: str):
    write_json(model(tmp_path / "m") / "tokenizer_config.json", {"mask_token": mask})
    code = re.search(r"(`{3,})python\n(.*?)\n\1\n", render_card(tmp_path / "m", None), re.DOTALL)
    assert code is not None
    *_, call = ast.parse(code[2]).body
    assert ast.unparse(call).startswith(("fill('The Milky Way", 'fill("The Milky Way'))
    assert len(ast.parse(code[2]).body) == 3


@pytest.mark.parametrize("value", [["<script>x</script>"], "<img src=x>", [3], {"a": 1}, [], "a b", "x\n# y"])
def test_an_architecture_that_is_no_name_is_left_out_of_the_card(tmp_path: Path, value: Any):
    text = render_card(model(tmp_path / "m", architectures=value, model_type=value), None)
    assert "# cloze-model" in text
    assert "<script" not in text
    assert class_name(["BertForMaskedLM"]) == "BertForMaskedLM"


def test_values_of_a_table_and_a_block_of_code_cannot_end_it():
    assert in_table("a|b\n# c <b>x</b> [y](z)\x1b") == r"a\|b # c &lt;b>x&lt;/b> [y]\(z)\x1b"
    assert fenced("a\n```\nb", "sh") == "````sh\na\n```\nb\n````"
    assert ast.literal_eval(quoted('"\n\\')) == '"\n\\'


def test_a_run_whose_files_hold_values_of_wrong_types_has_a_card(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("license: [a]\nlanguage: 3\nmodel_type: {a: b}\n")
    write_json(run / "data.json", {"source": {"dataset_name": 3, "files": 3}, "splits": [], "split_rule": "x"})
    write_json(run / "sessions.json", {"sessions": {"a": 1}})
    write_json(run / "eval.json", {"perplexity": "x", "bits_per_byte": [1]})
    (run / "metrics.jsonl").write_text('{"step": "x", "seconds": 1}\n{"step": 1, "seconds": 2, "loss": []}\n')
    assert render_card(model(tmp_path / "m"), run)


WORDS = [
    "no",
    "on",
    "yes",
    "y",
    "null",
    "~",
    "1e3",
    "0o17",
    "010",
    "1_000",
    "1:30",
    "2020-01-02",
    "0x1f",
    ".5",
    "=",
    "<<",
]


@pytest.mark.parametrize("word", WORDS)
def test_text_in_metadata_is_text_for_every_reader_of_yaml(word: str):
    line = dump_yaml({"license": word})
    assert yaml.safe_load(line) == {"license": word}
    assert re.fullmatch(r"license: ('[^']*'|y)", line), "YAML 1.2 knows more numbers"


def test_lines_of_a_card_that_a_person_wrote_stay_as_they_are():
    before = "language: no\nrevision: 1e3\ntags:\n- on\n- 010\nlicense: mit # mine\n"
    after = with_values(f"---\n{before}---\ntext\n", {"license": "cc0-1.0"})
    assert after == "---\nlanguage: no\nrevision: 1e3\ntags:\n- on\n- 010\nlicense: cc0-1.0\n---\ntext\n"
    assert with_names("{language: 'no', license: mit}", {"license": "x"}) == "language: 'no'\nlicense: x"


def test_metadata_that_multiply_are_refused():
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    with pytest.raises(HubError, match="alias"):
        with_values(f"---\n{bomb}---\n", {"license": "mit"})


def test_flags_after_two_dashes_reach_training_whatever_is_in_them():
    script = (ROOT / "slurm" / "submit").read_text()
    words = ["a b", "it's", "x\ny", "&", "\\", '"', "$HOME", ""]
    begin, end = script.index("ours=()"), script.index("exec cloze")
    code = script[begin:end] + 'printf "%s" "${ours[@]: -1}"'
    done = subprocess.run(["bash", "-euc", code, "submit", "recipe", "--", *words], capture_output=True, text=True)
    assert shlex.split(done.stdout.removeprefix("--train_flags=")) == words
