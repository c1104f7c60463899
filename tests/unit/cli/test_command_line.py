"""The command line: names people know, help that comes at once, one line for what cannot be understood."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from cloze import config
from cloze.cli.command_line import main
from cloze.config.commands import COMMANDS, OLD_NAMES
from cloze.config.parser import parse
from cloze.errors import ConfigError

# Names of `cloze train` that TrainingArguments does not have: the model and data names of run_mlm.py, and our own.
RUN_MLM = {
    "model_name_or_path", "model_type", "config_overrides", "config_name", "cache_dir", "model_revision", "token",
    "trust_remote_code", "dataset_name", "mlm_probability", "dataset_config_name", "tokenizer_name",
    "validation_split_percentage",
}  # fmt: skip
OWN = {"attn_implementation", "mask_replace_prob", "random_replace_prob", "deepspeed", "prepared_cache_dir",
       "streaming_train", "async_save", "on_save_error", "on_nonfinite", "save_before_time_limit", "freeze",
       "hang_timeout", "sparse_head", "mlm_probability_end", "mask_unit", "batch_size_warmup_steps",
       "gradient_checkpointing_every_n_layers",
       "batch_size_warmup_start", "layerwise_lr_decay", "precision", "ema_decay", "global_batch_size", "license",
       "language"}  # fmt: skip
PREPARE = {field.name for field in dataclasses.fields(config.BlocksConfig)}  # as in `cloze prepare`


def test_flags_of_train_have_the_names_people_know():
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    here = {field.name for field in dataclasses.fields(config.TrainConfig)}
    assert here - known - RUN_MLM - OWN - PREPARE == set()


def test_flags_mean_what_they_mean_in_transformers():
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    different = {
        field.name: (field.default, theirs[field.name])
        for field in dataclasses.fields(config.TrainConfig)
        if field.name in theirs and field.default is not dataclasses.MISSING and field.default != theirs[field.name]
    }
    # `None` and `False` are both off; metrics every 10 steps instead of 500; compiled where it pays; the same bits.
    ours = {"logging_steps": (10, 500), "gradient_checkpointing": (False, None), "torch_compile": ("auto", False)}
    assert different == ours | {"full_determinism": ("auto", False)}


@pytest.mark.parametrize("name", sorted(OLD_NAMES))
def test_old_names_get_a_hint(name: str):
    with pytest.raises(ConfigError) as caught:
        parse(["train", "--dataset_name", "x", "--output_dir", "y", f"--{name}", "1"])
    assert f"unknown option {name}; {OLD_NAMES[name]}" in str(caught.value)


def test_an_unknown_flag_or_key_gets_a_suggestion(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown option learning_rat; did you mean learning_rate"):
        parse(["train", "--learning_rat", "1e-4"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: x\noutput_dir: y\nlearnin_rate: 1e-4\n")
    with pytest.raises(ConfigError, match="unknown option learnin_rate; did you mean learning_rate"):
        parse(["train", "--config", str(recipe)])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["tran"],
        ["train"],
        ["train", "--learning_rate"],
        ["train", "--dataset_name", "x", "--output_dir", "y", "--learning_rate", "fast"],
        ["train", "--dataset_name", "x", "--output_dir", "y", "--eval_strategy", "sometimes"],
        ["train", "--config", "nowhere.yaml"],
        ["fill", "model"],
        ["fill", "model", "text", "more"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_understood_is_one_line(argv: list[str]):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("cloze", "nowhere.yaml", "--"))


def test_a_broken_recipe_is_one_line(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    for text in ("{", "- a\n- b\n", "learning_rate: [1", "\x00"):
        recipe.write_text(text)
        with pytest.raises(ConfigError):
            parse(["train", "--config", str(recipe)])


def test_flags_win_over_the_recipe_wherever_they_stand(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: x\noutput_dir: y\nlearning_rate: 2e-5\nseed: 7\n")
    for argv in (["--config", str(recipe), "--seed", "9"], ["--seed", "9", "--config", str(recipe)]):
        _, parsed = parse(["train", *argv])
        assert (parsed.learning_rate, parsed.seed, parsed.weight_decay) == (2e-5, 9, 0.0)


def test_booleans_and_positions_may_be_written_short():
    _, train = parse(["train", "--bf16", "--dataset_name", "x", "--output_dir", "y", "--use_cpu", "False"])
    assert (train.bf16, train.use_cpu) == (True, False)
    _, fill = parse(["fill", "runs/demo", "a <mask>", "--top_k", "5"])
    assert (fill.model, fill.text, fill.top_k) == ("runs/demo", "a <mask>", 5)
    _, push = parse(["push", "--repo", "me/x", "--dry_run", "runs/demo"])
    assert (push.path, push.repo, push.dry_run) == ("runs/demo", "me/x", True)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_explains_every_option_and_loads_nothing_heavy(command: str):
    script = (
        "import sys\nfrom cloze.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for field in dataclasses.fields(COMMANDS[command][0]):
        assert f"--{field.name}" in done.stdout


@pytest.mark.parametrize("words", [["completion", "bash"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]):
    command = subprocess.Popen(
        [sys.executable, "-m", "cloze", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.wait(timeout=60) == 128 + signal.SIGPIPE
    assert command.stderr.read() == b""


def test_errors_go_to_stderr_in_one_line_with_exit_code_2():
    words = [
        sys.executable,
        "-m",
        "cloze",
        "train",
        "--dataset_name",
        "nowhere",
        "--output_dir",
        "out",
        "--model_type",
    ]
    done = subprocess.run([*words, "roberta"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    hint = "make it with `cloze prepare --output`, or give --tokenizer_name if it is a corpus"
    assert done.stderr == f"cloze: error: nowhere: no such folder; {hint}\n"


@pytest.mark.parametrize(
    ("words", "value"), [([], "auto"), (["--torch_compile"], True), (["--torch_compile", "false"], False)]
)
def test_a_switch_may_have_a_third_position(words: list[str], value: object):
    argv = ["train", "--dataset_name", "x", "--output_dir", "y"]
    assert parse([*argv, *words, "--bf16"])[1].torch_compile == value
    assert parse([*argv, "--torch_compile", "auto"])[1].torch_compile == "auto"


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["train", "--nope"], 2)])
def test_what_a_library_does_at_the_very_end_does_not_change_the_exit_code(words: list[str], code: int):
    """libc's abort() stands in for a library whose threads abort the process on its way out. What Python has to do at
    its end is done."""
    script = (
        "import atexit, ctypes, sys\n"
        "from cloze.cli import run\n"
        "libc = ctypes.CDLL(None)\n"
        "libc['__cxa_atexit'](libc.abort, None, None)\n"
        "atexit.register(print, 'the last word')\n"
        f"sys.argv = ['cloze', *{words}]\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("the last word\n")


def test_a_printed_configuration_holds_no_token(capsys: pytest.CaptureFixture):
    token = "not-of-a-known-shape"
    flags = ["--output_dir", "x", "--dataset_name", "y", "--token", token, "--hub_token", token, "--print_config"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", *flags])
    printed = capsys.readouterr().out
    assert token not in printed
    values = yaml.safe_load(printed)
    assert (values["output_dir"], values["token"], values["hub_token"]) == ("x", None, None)
