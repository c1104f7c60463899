"""Whatever stands on the command line, in a recipe, or where a path leads: one line and exit code 2, or it works.

The same entry point as `cloze`, in this process. Commands are stood in for where only their command line is tried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import operator
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cloze.cli import command_line
from cloze.config import ranges
from cloze.config.commands import COMMANDS
from cloze.errors import ConfigError

SECONDS = 20.0  # more than any of them takes on a busy machine, and far less than an alias bomb
OFTEN = settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
BRIEFLY = settings(OFTEN, max_examples=12, derandomize=True, database=None)

NASTY = [
    "", " ", "-", "--", "=", "null", "~", "true", "nan", ".nan", "inf", "-inf", ".inf", "1e400", "9" * 5000, "-1",
    "0x10", "1_000", "12:30:45", "2020-01-01", "2020-99-99", "[", "{", "[" * 3000, "[" * 3000 + "]" * 3000,
    "{a: " * 900 + "}" * 900,
    "!!python/object/apply:os.mkdir [pwned]", "!!python/name:os.system", "!x y", "&a [*a]", "{a: &a [1], b: *a}",
    "\x00", "\x1b[31m", "\udc80", "a\nb", "\ufeff", "\u202e", "😀", "a" * 100_000, "${HOME}", "$(id)", "'", '"',
    "%", "@", "`",
    "<<: {a: 1}", "a: b: c", "? x", "- a", "| x", "#", "../" * 500,
]  # fmt: skip
VALUES = st.one_of(st.sampled_from(NASTY), st.text(max_size=20), st.integers().map(str), st.floats().map(str))
EDGES = ("nan", ".nan", ".inf", "-.inf", "1e308", "-1", "0", "1", str(2**63), str(10**30), "9" * 5000, "true", "x")


def extremes(allowed: ranges.Allowed) -> list[str]:
    """Values at each bound of an option's declared range, one step inside and one step beyond it, and far away."""
    steps = [1] if int in allowed.kinds else [1, 1e-9, 0.5]
    near = [bound.bound + sign * step for bound in allowed.bounds for step in steps for sign in (-1, 1)]
    return list(dict.fromkeys([*map(str, near), *(str(bound.bound) for bound in allowed.bounds), *EDGES]))


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates())
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))

RECIPES: dict[str, bytes] = {
    "empty": b"",
    "a comment": b"# seed: 7\n",
    "not UTF-8": b"seed: \xff\n",
    "UTF-16": "seed: 7\n".encode("utf-16"),
    "NUL": b"seed: \x00",
    "a tab": b"seed:\t7\n\tx: 1\n",
    "a list": b"- seed\n",
    "a word": b"seed\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "a name twice": b"seed: 1\nseed: 2\n",
    "a number as name": b"1: 2\n",
    "a list as name": b"? [seed]\n: 2\n",
    "merged": b"<<: {seed: 1}\n",
    "deep": b"lr_scheduler_kwargs: " + b"[" * 3000 + b"]" * 3000,
    "deep lines": "".join(f"{' ' * depth}a:\n" for depth in range(600)).encode(),
    "runs code": b"seed: !!python/object/apply:os.mkdir [pwned]\n",
    "names code": b"dataset_name: !!python/name:os.system\n",
    "a class": b"class_path: os.system\ninit_args: {}\n",
    "another config": b"config: other.yaml\n",
    "of the parser": b"print_config: true\n",
    "a command": b"train: {seed: 7}\n",
    "an alias in itself": b"seed: &a [*a]\n",
    "an alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10)) for n in range(98, 108)),
    "huge": b"dataset_name: " + b"x" * 1_000_000,
    "5,000 digits": b"seed: " + b"9" * 5000,
    "a date": b"seed: 2020-99-99\n",
    "a surrogate": b'dataset_name: "\\ud800"\n',
}


@pytest.fixture(autouse=True, scope="module")
def handlers_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are understood, and not run."""
    stub = SimpleNamespace(run=lambda config: None)
    monkeypatch.setattr(command_line, "importlib", SimpleNamespace(import_module=lambda name: stub))


def cloze(*argv: str) -> str:
    """What `cloze ARGV` writes to stderr; fails unless it ends in good order, and soon."""
    out, err, begin = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        command_line.main(argv)
    said = err.getvalue()
    assert end.value.code in (0, 2), said
    if end.value.code == 2:
        assert said.startswith("cloze: error: "), said[-2000:]
        assert said.count("\n") == 1, said[-2000:]
        said.encode()  # a terminal can show it
        assert len(said) < 3000
    assert "Traceback" not in said
    assert time.monotonic() - begin < SECONDS, argv
    return said if end.value.code else ""


@st.composite
def command_lines(draw: Any) -> list[str]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    names = [field.name for field in dataclasses.fields(COMMANDS[command][0])]
    words = [command]
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(names) | VALUES)
        allowed = ranges.allowed_values(COMMANDS[command][0]).get(name)
        value = draw(VALUES if allowed is None else VALUES | st.sampled_from(extremes(allowed)))
        words += draw(st.sampled_from([[f"--{name}={value}"], [f"--{name}", value], [value], [f"--{name}"]]))
    return draw(st.permutations(words)) if draw(st.integers(0, 9)) == 0 else words


@st.composite
def recipes(draw: Any) -> tuple[str, bytes]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    names = [field.name for field in dataclasses.fields(COMMANDS[command][0])]
    content = draw(st.dictionaries(st.sampled_from(names) | st.text(max_size=5), NESTED, max_size=4))
    text = yaml.safe_dump(content).encode()
    return command, draw(
        st.just(text) | st.binary(max_size=40).map(lambda more: text + more) | st.binary(max_size=200)
    )


def try_command_lines(profile: settings) -> None:
    @profile
    @given(command_lines())
    @example(["--\udc80=", "archs"])  # a byte that is not UTF-8, as Python hands it over
    def run(words: list[str]) -> None:
        cloze(*words)

    run()


def try_recipes(profile: settings, recipe: Path) -> None:
    @profile
    @given(recipes())
    def run(made: tuple[str, bytes]) -> None:
        recipe.write_bytes(made[1])
        cloze(made[0], "--config", str(recipe))

    run()


@pytest.mark.usefixtures("no_command")
def test_any_command_line_is_understood_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    try_command_lines(BRIEFLY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_number_has_a_declared_range(command: str):
    for name, allowed in ranges.allowed_values(COMMANDS[command][0]).items():
        if int in allowed.kinds or float in allowed.kinds:
            kinds = {type(bound) for bound in allowed.bounds}
            assert kinds & {ranges.Ge, ranges.Gt}, f"{name} has no lower bound"
            assert kinds & {ranges.Le, ranges.Lt}, f"{name} has no upper bound"
            assert all(abs(bound.bound) < 2**63 or float in allowed.kinds for bound in allowed.bounds), name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_value_is_taken_exactly_where_its_range_says(command: str):
    """The same answer from the declared range and from a configuration that is made, for the extremes of each number:
    without the command line's parser, which the next test uses."""
    config = COMMANDS[command][0]
    needed = {field.name: "x" for field in dataclasses.fields(config) if field.default is dataclasses.MISSING}
    for name, value in {"runs": ["x"], "what": "train", "shell": "bash", "step": 1}.items():
        needed |= {name: value} if name in needed else {}
    config(**needed)
    for name, allowed in ranges.allowed_values(config).items():
        if not {int, float} & set(allowed.kinds):
            continue
        values = [value for text in extremes(allowed) for value in (number(text),) if value is not None]
        inside = [value for value in values if within(allowed, value)]
        assert 0 < len(inside) < len(values), name
        for value in values:
            if within(allowed, value):
                assert getattr(config(**needed | {name: value}), name) == value
            else:
                with pytest.raises(ConfigError, match=f"^--{name}: must be ") as caught:
                    config(**needed | {name: value})
                assert "\n" not in str(caught.value)


def number(text: str) -> int | float | None:
    """A value as a recipe gives it; None for what is no number."""
    value = yaml.safe_load(text) if len(text) < 4000 else 10**4999
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def within(allowed: ranges.Allowed, value: int | float) -> bool:
    """Whether a number lies in a range, by the definition of its bounds."""
    if isinstance(value, float) and (float not in allowed.kinds or not math.isfinite(value)):
        return False
    compare = {ranges.Ge: operator.ge, ranges.Gt: operator.gt, ranges.Le: operator.le, ranges.Lt: operator.lt}
    return all(compare[type(bound)](value, bound.bound) for bound in allowed.bounds)


@pytest.mark.usefixtures("no_command")
@pytest.mark.parametrize("command", ["train", "prepare", "plan"])
def test_extreme_values_on_the_command_line_work_or_are_one_line(command: str):
    """Each number of a command is extreme in turn; the one line must name it."""
    config, words = COMMANDS[command][0], {"output_dir": "y", "output": "y", "tokenizer_name": "x", "recipe": "x"}
    given = [f"--{name}={value}" for name, value in words.items() if name in ranges.allowed_values(config)]
    numbers = [name for name, allowed in ranges.allowed_values(config).items() if {int, float} & set(allowed.kinds)]
    for name, value in zip(numbers, itertools.cycle(["nan", ".inf", "-1e300", "1e300", "9" * 40]), strict=False):
        assert f"--{name}" in cloze(command, *given, f"--{name}={value}")


@pytest.mark.usefixtures("no_command")
def test_any_recipe_is_understood_or_one_line(tmp_path: Path):
    try_recipes(BRIEFLY, tmp_path / "recipe.yaml")


@pytest.mark.slow
@pytest.mark.usefixtures("no_command")
def test_any_command_line_and_recipe_for_a_long_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    try_command_lines(OFTEN)
    assert not list(tmp_path.iterdir())
    try_recipes(OFTEN, tmp_path / "recipe.yaml")


@pytest.mark.usefixtures("no_command")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_no_list_of_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_bytes(RECIPES[name])
    assert cloze("train", "--config", "recipe.yaml", "--dataset_name", "x", "--output_dir", "y")
    assert not Path("pwned").exists(), "code in a recipe was run"


@pytest.mark.usefixtures("no_command")
def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfseed: 7\nlearning_rate: 1.0e-4\n")
    assert not cloze("train", "--config", str(tmp_path / "recipe.yaml"), "--dataset_name", "x", "--output_dir", "y")


@pytest.fixture
def odd_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where nothing that a command wants can be: relative and absolute."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty").touch()
    Path("bytes").write_bytes(b"\xff\x00\xfe" * 100)
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nothing")
    names = [
        "folder",
        "empty",
        "bytes",
        "loop",
        "loop/x",
        "dangling",
        "empty/x",
        "a b",
        "a\nb",
        "😀",
        "\udc80",
        "a\x00b",
    ]
    return [
        *names,
        "x" * 300,
        "/" + "x/" * 3000,
        "/proc/self/mem",
        "/proc/1/root",
        "/dev/null",
        "",
        ".",
        "~",
        "*",
        "[",
    ]


@pytest.mark.parametrize(
    "path", ["x" * 300, "/proc/1/root/x", "loop", "\udc80"], ids=["long", "refused", "loop", "bytes"]
)
def test_a_path_that_the_system_refuses_is_one_line(path: str, odd_paths: list[str]):
    assert cloze("inspect", path)
    assert cloze("init", path)


COMMANDS_WITH_PATHS = [
    ["inspect", "PATH"],
    ["replay", "PATH", "--step", "1"],
    ["consolidate", "PATH"],
    ["evaluate", "PATH", "--data", "folder"],
    ["evaluate", "folder", "--data", "PATH"],
    ["evaluate", "folder", "--metric", "pll", "--sentences", "PATH"],
    ["fill", "PATH", "<mask>"],
    ["push", "PATH", "--repo", "me/x", "--dry_run"],
    ["plan", "PATH", "--gpus", "A10G"],
    ["submit", "PATH", "--dry_run"],
    ["grow", "PATH", "--output", "out"],
    ["prepare", "--dataset_name", "PATH", "--tokenizer_name", "folder", "--output", "out"],
    ["prepare", "--dataset_name", "folder", "--tokenizer_name", "PATH", "--output", "out"],
    ["tokenizer", "--dataset_name", "PATH", "--output", "out", "--vocab_size", "300"],
    ["train", "--config", "PATH"],
    ["train", "--dataset_name", "PATH", "--model_type", "roberta", "--output_dir", "out"],
    ["init", "PATH"],
]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS_WITH_PATHS, ids=" ".join)
def test_a_path_where_nothing_is_or_can_be_is_one_line(words: list[str], odd_paths: list[str]):
    failed = []
    for path in odd_paths:
        try:
            cloze(*(word.replace("PATH", path) for word in words))
        except (AssertionError, Exception) as error:
            failed.append(f"{path[:40]!r}: {str(error)[-600:]}")
        os.chdir(os.environ.get("PWD", "/")) if not Path.cwd().exists() else None
    assert not failed, "\n\n".join(failed)
