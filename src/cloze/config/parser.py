"""What can be typed: the commands and their options, from flags and --config YAML into a command's dataclass.

    command, config = parse(["train", "--config", "recipe.yaml", "--max_steps", "10"])      # "train", TrainConfig(...)

A name that is not known is one line with a suggestion. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cloze import __version__
from cloze.config.commands import COMMANDS, OLD_NAMES
from cloze.config.ranges import allowed_values
from cloze.config.relations import check_relations
from cloze.config.yaml_guard import check_flow, check_number, check_recipe
from cloze.errors import ConfigError
from cloze.utils.foreign.paths import printable
from cloze.utils.suggest import suggestion
from cloze.utils.terminal.console import FORMAT_VARIABLE, FORMATS, log_format, split_log_format

if TYPE_CHECKING:  # a quarter of a second, which help and --version do without
    import jsonargparse


_COMMANDS = f"the commands are: {', '.join(COMMANDS)}"


@functools.cache
def build_parser(only: str | None = None) -> jsonargparse.ArgumentParser:
    """Return the parser of all commands, or one that knows the options of a single one (made in a tenth of the time);
    raises `jsonargparse.ArgumentError` instead of exiting."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="cloze",
        description="Distributed training of masked language models.",
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for name, (_, help_line, _) in COMMANDS.items():
        commands.add_subcommand(name, _command_parser(name, with_options=only in (None, name)), help=help_line)
    return parser


def _command_parser(command: str, with_options: bool = True) -> jsonargparse.ArgumentParser:
    """Return a parser of `--config` and the fields of a command's dataclass. Types are resolved here: jsonargparse
    looks for the names in annotations of inherited fields in the wrong module."""
    import jsonargparse

    dataclass = COMMANDS[command][0]
    parser = jsonargparse.ArgumentParser(description=dataclass.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", metavar="FILE.yaml", help="read values from this file first")
    hints = typing.get_type_hints(dataclass)
    for field in dataclasses.fields(dataclass) if with_options else ():
        required = field.default is dataclasses.MISSING
        given = {"required": True} if required else {"default": field.default}
        parser.add_argument(f"--{field.name}", type=hints[field.name], **given)
    return parser


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Return the command's name and its filled dataclass. Raises ConfigError for anything that cannot be
    understood."""
    words = _spell_out(split_log_format(argv)[0])
    first = check_command(words)
    parser = build_parser(first if words[0] == first else None)
    _check_values(first, words)
    namespace = _in_one_line(lambda: parser.parse_args(words), argv, first)
    command = namespace.command
    return command, _configured(command, namespace[command].as_dict())


def check_command(words: Sequence[str]) -> str:
    """Return the command in a command line. Raises ConfigError if it is missing or unknown."""
    first = next((word for word in words if not word.startswith("-")), None)
    if first in COMMANDS:
        return str(first)
    if first is None:
        what = f"unknown option {printable(words[0])}" if words else "no command is given"
        raise ConfigError(what, where="cloze", hint=_COMMANDS if not words else "see cloze --help")
    hint = suggestion(first, COMMANDS) or ("see cloze --help" if first == "help" else _COMMANDS)
    raise ConfigError(f"no command {printable(first)}", where="cloze", hint=hint)


def _in_one_line(read: Callable[[], Any], argv: Sequence[str], command: str | None) -> Any:
    """Return `read()`; what jsonargparse refuses in it is a ConfigError."""
    import jsonargparse

    try:
        return read()
    except jsonargparse.ArgumentError as error:
        raise _explain(str(error), argv) from None
    except (RecursionError, ValueError):  # nested deeply, no spelling in UTF-8, an integer of 5,000 digits, ...
        raise ConfigError("a value cannot be read", where=f"cloze {command}", hint="write plain values") from None


def _configured(command: str, values: dict[str, Any]) -> Any:
    """Return a command's dataclass with these values. Raises ConfigError for values that no option can have."""
    values.pop("config", None)
    optional = {field.name for field in dataclasses.fields(COMMANDS[command][0]) if field.default == ""}
    for name, value in values.items():
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
            raise ConfigError(
                "is not UTF-8 text", where=f"--{name} {printable(value)}", hint="rename it, or leave it out"
            )
        if value == "" and name not in optional:
            raise ConfigError("is empty", where=f"--{name}", hint="give a value, or leave it out")
    made = COMMANDS[command][0](**values)
    check_relations(made)
    return made


def overridden(argv: Sequence[str]) -> list[str]:
    """Return a line for each option that a command line gives again with another value; the last one counts."""
    words = _spell_out(split_log_format(argv)[0])
    last: dict[str, str] = {}
    lines = []
    for word, value in zip(words, [*words[1:], ""], strict=True):
        name, equals, written = word.partition("=")
        if name.startswith("--") and name != "--config" and not name.endswith("+"):
            value = written if equals else value
            if last.get(name, value) != value:
                shown = ("***", "***") if name.endswith("token") else (printable(last[name]), printable(value))
                lines.append(f"{name} {shown[0]} (given again: {shown[1]})")
            last[name] = value
    return lines


def choose_log_format(argv: Sequence[str]) -> list[str]:
    """Take --log_format out of a command line and into the environment, for this process and those it starts.

    Raises ConfigError if it, or CLOZE_LOG_FORMAT, is not in `cloze.utils.terminal.console.FORMATS`.
    """
    words, chosen = split_log_format(argv)
    if chosen is not None:
        os.environ[FORMAT_VARIABLE] = chosen
    if log_format() not in FORMATS:
        said, where = log_format(), "--log_format" if chosen is not None else FORMAT_VARIABLE
        del os.environ[FORMAT_VARIABLE]
        raise ConfigError(
            f"no such format: {said!r}", where=where, hint=suggestion(said, FORMATS) or f"one of {', '.join(FORMATS)}"
        )
    return words


def from_values(command: str, values: Mapping[str, Any]) -> Any:
    """Return a command's dataclass from Python values by the names of its flags, `config` among them: what the same
    flags on the command line give. Raises ConfigError for a name or value that those would not take."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(COMMANDS[command][0])}
    given: dict[str, Any] = {"config": values["config"]} if "config" in values else {}
    for name, value in values.items():
        if name != "config" and name not in fields:
            raise _unknown(command, name)
        kinds = bool | int | float | str | os.PathLike
        if not isinstance(value, dict if "dict" in fields.get(name, "") else kinds) and (
            value is not None or "None" not in fields.get(name, "")
        ):
            hint = f"see cloze {command} --help"
            raise ConfigError(f"{name} cannot be {value!r}", where=f"cloze {command}", hint=hint)
        given[name] = _plain(value)
        if isinstance(given[name], str):
            _check_values(command, [f"--{name}={given[name]}"])
    parser = _command_parser(command)
    return _configured(command, _in_one_line(lambda: parser.parse_object(given), [command], command).as_dict())


def _plain(value: Any) -> Any:
    """Return a value as YAML can hold it: a path is a text, and a numpy.float64 is a float."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return float(value) if isinstance(value, float) else value


def _spell_out(argv: Sequence[str]) -> list[str]:
    """Write short forms out for the parser: `--bf16` is `--bf16 true`, `fill MODEL` is `fill --model MODEL`."""
    command = next((word for word in argv if not word.startswith("-")), None)
    if command not in COMMANDS:
        return list(argv)
    at = list(argv).index(command) + 1
    dataclass, _, takes_positions = COMMANDS[command]
    fields = dataclasses.fields(dataclass)
    known = {f.name for f in fields} | {"help", "print_config"}
    booleans = {f"--{f.name}": "auto" if "auto" in str(f.type) else "" for f in fields if str(f.type)[:4] == "bool"}
    positions = [f.name for f in fields if f.default is dataclasses.MISSING] if takes_positions else []
    lists = {f.name for f in fields if str(f.type) == "list[str]"}
    words, rest = list(argv[:at]), list(argv[at:])
    files: list[str] = []  # --config comes first, so that flags override it in any order
    while rest:
        word = rest.pop(0)
        if word == "--config" or word.startswith("--config="):
            files += [word] if "=" in word or not rest else [word, rest.pop(0)]
        elif not word.startswith("-") and positions and positions[0] in lists:
            words += [f"--{positions[0]}+", word]
        elif not word.startswith("-"):
            words += [f"--{positions.pop(0)}", word] if positions else [word]
        elif word in booleans:
            said = rest and rest[0].lower() in ("true", "false", booleans[word])
            value = rest.pop(0).lower() if said else "true"
            words += [word, value]
        else:
            name = word.split("=")[0]
            if name.startswith("--") and name[2:] not in known:
                raise _unknown(command, name[2:])
            words.append(word)
            if word.startswith("--") and "=" not in word and word != "--help" and rest:
                value = rest.pop(0)
                if name.endswith("_flags"):  # they begin with a dash
                    words[-1] = f"{word}={value}"
                else:
                    words.append(value)
    return [*words[:at], *files, *words[at:]]


def _check_values(command: str, words: Sequence[str]) -> None:
    """Raise ConfigError for values that are no plain YAML, and for unknown names in a --config file."""
    known = {field.name: str(field.type) for field in dataclasses.fields(COMMANDS[command][0])}
    for word, value in zip(words, [*words[1:], ""], strict=True):
        option, equals, given = word.partition("=")
        given = given if equals else value
        if option == "--config":
            for name in check_recipe(given):
                if name not in known:
                    raise _unknown(command, name)
        elif any(mark in word for mark in "[{&!"):
            check_flow(given if equals and option.startswith("--") else word, word)
        elif "str" not in known.get(option[2:], "str"):
            check_number(given, option)


def _explain(message: str, argv: Sequence[str]) -> ConfigError:
    """Return one line for a parser's message, with a suggestion if a name is unknown."""
    command = next(word for word in argv if word in COMMANDS)
    unknown = re.search(r"(?:unrecognized arguments: -*|does not accept (?:option|nested key) ')([\w.]+)", message)
    if unknown:
        return _unknown(command, unknown.group(1))
    message = message.replace(f"{command}.", "")
    wrong = re.search(r'Parser key "(\w+)".*(?:Got|Given) value: (.*)', message, re.DOTALL)
    if wrong:
        allowed = allowed_values(COMMANDS[command][0]).get(wrong[1])
        if allowed is not None:
            shown, hint = printable(" ".join(wrong[2].split())), allowed.hint(wrong[2])
            hint = hint or f"see cloze {command} --help"
            return ConfigError(f"must be {allowed.types}, not {shown}", where=f"--{wrong[1]}", hint=hint)
    if len(message) > 1000:
        message = f"{message[:1000]}..."
    return ConfigError(" ".join(message.split()), where=f"cloze {command}", hint=f"see cloze {command} --help")


def _unknown(command: str, name: str) -> ConfigError:
    names = [field.name for field in dataclasses.fields(COMMANDS[command][0])] + ["log_format"]
    hint = OLD_NAMES.get(name) or suggestion(name, names) or f"see cloze {command} --help"
    return ConfigError(f"unknown option {printable(name)}", where=f"cloze {command}", hint=hint)
