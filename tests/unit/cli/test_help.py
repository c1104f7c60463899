"""Help, completion, and --log_format: what is typed, and how Cloze answers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from repository import ROOT

from cloze import __version__
from cloze.cli import completion, main
from cloze.cli.examples import COMMAND_GROUPS, EXAMPLES, GROUP_BEGINS
from cloze.cli.help import help_text
from cloze.config.commands import COMMANDS
from cloze.config.options import options_of
from cloze.config.parser import build_parser, choose_log_format, parse
from cloze.distributed.resilience.report_error import report_error
from cloze.errors import ConfigError, DataError
from cloze.utils.terminal import console, json_events


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_examples_that_the_real_parser_takes(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert EXAMPLES[command]
    for example in EXAMPLES[command]:
        words = shlex.split(example.split(" > ")[0])
        parsed, _ = parse(words[words.index("cloze") + 1 :])
        assert parsed == command


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_examples_in_the_help_are_whole_commands_for_a_shell(command: str, width: int):
    shown = help_text([command, "--help"], width).split("examples:\n")[1].replace("\\\n", " ")
    assert [shlex.split(line) for line in shown.splitlines()] == [shlex.split(line) for line in EXAMPLES[command]]


def literals(hint: object) -> set[str]:
    """The texts of a type's Literals."""
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return {text for part in typing.get_args(hint) for text in literals(part)}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_says_what_the_parser_knows(command: str):
    """Names, choices and defaults, read without the parser, are the parser's."""
    sub = build_parser()._subcommands_action.choices[command]
    known = {action.dest: action for action in sub._actions}
    text = " ".join(help_text([command], 100).split())
    for option in options_of(COMMANDS[command][0]):
        action = known.pop(option.name)
        assert (option.required, option.default) == (action.required, action.default), option.name
        hint = getattr(action, "_typehint", None) or action.type
        assert set(option.values) - {"true", "false"} == literals(hint), option.name
        assert option.help or option.name.startswith("adam_"), option.name
        assert f"--{option.name} {option.metavar}" in text
        if option.default not in (None, "") and "default:" not in option.help:
            number = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
            assert f"(default: {number.lower() if isinstance(option.default, bool) else number})" in text, option.name
    assert set(known) == {"help", "config", "print_config"}


def test_every_group_of_options_and_commands_is_shown():
    train = help_text(["train"], 80)
    declared = {base.__name__ for base in COMMANDS["train"][0].__mro__}
    for (home, name), title in GROUP_BEGINS.items():
        assert name in {field.name for dataclass, _, _ in COMMANDS.values() for field in dataclasses.fields(dataclass)}
        if home in declared - {"SourceConfig"}:
            assert f"\n{title}:\n" in train, title
    everything = help_text([], 80)
    for command in COMMANDS:
        assert re.search(rf"^  {command}\s", everything, re.MULTILINE), command
    assert "\nmore:" not in everything  # each has a group
    assert sum(len(names) for names in COMMAND_GROUPS.values()) == len(COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["completion", "-h"]], ids=" ".join)
def test_help_and_version_load_nothing_beside_the_standard_library(words: list[str]):
    """No parser, no YAML, no torch: it is imports that take the time."""
    script = (
        "import sys\nbefore = set(sys.modules)\nfrom cloze.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as e:\n    assert not e.code\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert loaded - {'cloze'} <= sys.stdlib_module_names, loaded - sys.stdlib_module_names\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if words == ["--version"]:
        assert done.stdout == f"cloze {__version__}\n"


BASH = """
source <(printf '%s' "$SCRIPT")
complete -p cloze
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _cloze 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""
TYPED = [
    (["tr"], "train"),
    (["train", "--learn"], "--learning_rate"),
    (["train", "--eval_strategy", "s"], "steps"),
    (["--log_format", "j"], "json"),
    (["train", "--log_format", "q"], "quiet"),
    (["bench", "mem"], "memory"),
    (["completion", "z"], "zsh"),
    (["train", "--config", "reci"], "recipe.yaml"),
    (["fill", "reci"], "recipe.yaml"),
]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    return tmp_path


def in_shell(words: list[str], folder: Path, **environment: str) -> str:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed here")
    done = subprocess.run(
        words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.parametrize(("typed", "completed"), [*TYPED, (["train", "--packing", "=", "b"], "best_fit")], ids=str)
def test_bash_completes(workplace: Path, typed: list[str], completed: str):
    shown = in_shell(["bash", "-c", BASH, "bash", "cloze", *typed], workplace, SCRIPT=completion.script("bash"))
    assert shown.splitlines() == ["complete -F _cloze cloze", completed]


def test_bash_completes_every_option_of_every_command(workplace: Path):
    script = completion.script("bash")
    for command, (dataclass, _, _) in COMMANDS.items():
        shown = in_shell(["bash", "-c", BASH, "bash", "cloze", command, "--"], workplace, SCRIPT=script).splitlines()[
            1:
        ]
        ours = {f"--{field.name}" for field in dataclasses.fields(dataclass)}
        assert set(shown) == ours | {"--config", "--log_format", "--print_config", "--help"}


@pytest.mark.parametrize(("typed", "completed"), TYPED, ids=str)
def test_fish_completes(workplace: Path, typed: list[str], completed: str):
    (workplace / "cloze.fish").write_text(completion.script("fish"))
    line = shlex.join(["cloze", *typed])
    shown = in_shell(["fish", "--no-config", "-c", f"source cloze.fish; complete -C '{line}'"], workplace)
    assert completed in [one.split("\t")[0] for one in shown.splitlines()]


ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'PS1=; autoload -U compinit; compinit -u -D; source ./_cloze; bindkey "^I" complete-word; echo REA''DY'
zpty -r shell shown '*READY*'
zpty -w -n shell $'cloze '"$1"$'\\t'
zpty -r -t shell shown; sleep 1.5; while zpty -r -t shell shown; do print -r -- "$shown"; done
zpty -d shell
"""


@pytest.mark.slow  # two seconds each: it is typed into a real shell
@pytest.mark.parametrize(("typed", "completed"), TYPED, ids=str)
def test_zsh_completes(workplace: Path, typed: list[str], completed: str):
    (workplace / "_cloze").write_text(completion.script("zsh"))
    shown = in_shell(["zsh", "-f", "-c", ZSH, "zsh", " ".join(typed)], workplace, TERM="dumb")
    assert completed in re.sub(r"\x1b\[[\d;?]*[A-Za-z]|[\x07\x08\r\n]", "", shown)


def test_the_format_may_stand_anywhere_and_beats_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLOZE_LOG_FORMAT", "plain")
    for argv in (["--log_format", "json", "archs"], ["archs", "--log_format=json"]):
        assert choose_log_format(argv) == ["archs"]
        assert console.log_format() == "json"
    assert parse(["archs", "--log_format", "quiet", "--model_type", "bert"])[1].model_type == "bert"
    with pytest.raises(ConfigError, match=r"--log_format: .*'xml'.* verbose, quiet, json"):
        choose_log_format(["archs", "--log_format", "xml"])
    monkeypatch.setenv("CLOZE_LOG_FORMAT", "XML")
    with pytest.raises(ConfigError, match="CLOZE_LOG_FORMAT: no such format"):
        choose_log_format(["archs"])


def run_main(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(argv)
    return int(end.value.code or 0), *capsys.readouterr()


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch):
    import signal
    import warnings

    monkeypatch.setenv("CLOZE_LOG_FORMAT", "auto")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "WANDB_SILENT"):
        monkeypatch.setenv(name, "true")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    shown = warnings.showwarning
    yield
    warnings.showwarning = shown
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_before")
def test_an_error_is_an_object_for_a_machine(capsys: pytest.CaptureFixture[str]):
    code, out, err = run_main(["inspect", "nowhere", "--log_format", "json"], capsys)
    (told,) = [json.loads(line) for line in out.splitlines()]
    assert (code, err, told["event"], told["exit_code"], told["kind"]) == (2, "", "error", 2, "DataError")
    assert told["what"] == "no such folder"
    assert told["where"] == "nowhere"
    assert told["hint"].startswith("make it with")
    code, out, _ = run_main(["inspect", "--nope", "1", "--log_format", "json"], capsys)
    assert json.loads(out)["kind"] == "ConfigError"


@pytest.mark.usefixtures("as_before")
def test_what_a_command_prints_for_people_is_an_object_too(prepared: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run_main(["inspect", str(prepared), "--blocks", "1", "--log_format", "json"], capsys)
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert {"source", "blocks", "output"} <= {one["event"] for one in told}


def test_warnings_progress_and_bugs_are_objects_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CLOZE_LOG_FORMAT", "json")
    monkeypatch.setattr(console, "PLAIN_INTERVAL_SECONDS", 0.0)
    console.warn("beware")
    with console.progress("work", total=4, unit="MB") as advance:
        advance(1, note="slow")
    console.say("work", "done", result=Path("there"))
    json_events.event("numbers", loss=float("nan"))
    report_error(DataError("bad", where="x.jsonl"))
    report_error(ZeroDivisionError("by nothing"))
    warning, progress, said, numbers, error, bug = map(json.loads, capsys.readouterr().out.splitlines())
    assert (warning["event"], warning["message"]) == ("warning", "beware")
    assert (progress["done"], progress["total"], progress["note"]) == (1, 4, "slow")
    assert (said["event"], said["message"], said["result"]) == ("work", "done", "there")
    assert numbers["loss"] is None
    assert (error["what"], error["where"], error["hint"]) == ("bad", "x.jsonl", None)
    assert bug["exit_code"] == 1
    assert "ZeroDivisionError: by nothing" in bug["traceback"]


def test_a_quiet_command_says_warnings_and_where_the_result_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CLOZE_LOG_FORMAT", "quiet")
    monkeypatch.setattr(console, "_answers", [])
    monkeypatch.setattr(console, "PLAIN_INTERVAL_SECONDS", 0.0)
    console.say("model", "bert")
    with console.progress("work", total=4) as advance:
        advance()
    console.warn("beware")
    console.say("train", "9 steps; the run is in runs/x", result="runs/x")
    console.say("evaluate", "perplexity 4.0", result=True)
    out, err = capsys.readouterr()
    assert out == "train        runs/x\nevaluate     perplexity 4.0\n"
    assert err == "cloze: warning: beware\n"
