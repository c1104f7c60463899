"""A mistyped name gets the one that was meant."""

from __future__ import annotations

import pytest

from cloze.config.commands import COMMANDS
from cloze.config.options import options_of
from cloze.config.parser import parse
from cloze.errors import ConfigError
from cloze.utils.suggest import suggestion


def one_letter_less(word: str) -> str:
    return word[:-2] + word[-1] if len(word) > 3 else word + word[-1]


def test_the_closest_name_is_suggested_and_none_if_none_is_close():
    assert suggestion("trian", COMMANDS) == "did you mean train?"
    assert suggestion("ADAMM", ["adamw_torch", "sgd"]) == "did you mean adamw_torch?"
    assert suggestion("xyz", COMMANDS) is None
    assert suggestion("", COMMANDS) is None
    assert suggestion("ad", ["adamw_torch"]) is None


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_mistyped_command_gets_a_suggestion_and_no_list(command: str):
    with pytest.raises(ConfigError) as caught:
        parse([one_letter_less(command)])
    assert str(caught.value) == f"cloze: no command {one_letter_less(command)}; did you mean {command}?"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "cloze: no command is given; the commands are: "),
        (["xyz"], "cloze: no command xyz; the commands are: "),
        (["--trian"], "cloze: unknown option --trian; see cloze --help"),
        (["help"], "cloze: no command help; see cloze --help"),
    ],
    ids=str,
)
def test_commands_are_listed_at_most_once(words: list[str], expected: str):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert str(caught.value).startswith(expected)
    assert str(caught.value).count("consolidate") == expected.count("commands")


CHOICES = [
    (command, option.name, value)
    for command, (dataclass, _, _) in COMMANDS.items()
    for option in options_of(dataclass)
    for value in option.values
    if option.kind == "str"
]


@pytest.mark.parametrize(("command", "option", "value"), CHOICES, ids=str)
def test_a_mistyped_choice_gets_a_suggestion(command: str, option: str, value: str):
    with pytest.raises(ConfigError, match="did you mean ") as caught:
        parse([command, f"--{option}={one_letter_less(value)}"])
    assert caught.value.where == f"--{option}"
