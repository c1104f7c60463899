"""`cloze --help` and `cloze COMMAND --help`: options by group, with defaults and examples.

    print(help_text(["train", "--help"], width=80))

It is made from the commands' dataclasses without importing the parser, which would take longer than all of this.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

from cloze.cli.examples import COMMAND_GROUPS, EXAMPLES, GROUP_BEGINS
from cloze.config.commands import COMMANDS
from cloze.config.options import Option, options_of
from cloze.utils.terminal.console import FORMAT_VARIABLE, FORMATS, show_coloured

_COLUMN = 26  # where the text beside an option begins, if the terminal is wide enough
_WIDEST, _NARROW = 100, 60
_FORMATS = "; ".join(f"`{name}`: {what}" for name, what in FORMATS.items())
EVERYWHERE = (
    ("--log_format {" + ",".join(FORMATS) + "}", f"{_FORMATS} (default: auto; or {FORMAT_VARIABLE})"),
    ("--config FILE.yaml", "read values from this file first; flags win"),
    ("--print_config", "print the configuration as YAML and exit"),
    ("-h, --help", "show this help and exit"),
)


def wants_help(words: Sequence[str]) -> bool:
    """Return whether help is asked for, anywhere in a command line."""
    return any(word in ("-h", "--help") for word in words)


def show_help(words: Sequence[str]) -> None:
    """Print the requested help in the width of the terminal, with bold titles if it supports them."""
    text = help_text(words, max(30, min(shutil.get_terminal_size().columns, _WIDEST)))
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb":
        lines = text.splitlines()
        text = "\n".join(f"\x1b[1m{line}\x1b[0m" if line[:1].strip() and line[-1:] == ":" else line for line in lines)
    show_coloured(text)


def help_text(words: Sequence[str], width: int) -> str:
    """Return the help of the command in `words`, or of all commands, in lines of at most `width` where words allow
    it."""
    command = next((word for word in words if word in COMMANDS), None)
    return "\n".join(_all_commands(width) if command is None else _one_command(command, width))


def _all_commands(width: int) -> list[str]:
    lines = ["usage: cloze COMMAND [options]", "", "Distributed training of masked language models."]
    grouped = [name for names in COMMAND_GROUPS.values() for name in names]
    others = tuple(name for name in COMMANDS if name not in grouped)
    for title, names in [*COMMAND_GROUPS.items(), ("more", others)]:
        if names:
            lines += ["", f"{title}:"]
            lines += [line for name in names if name in COMMANDS for line in _row(name, COMMANDS[name][1], width, 14)]
    lines += ["", "options:"]
    shown = [EVERYWHERE[0], ("--version", "print the version and exit"), EVERYWHERE[-1]]
    lines += [line for name, text in shown for line in _row(name, text, width, _COLUMN)]
    return [*lines, "", *_wrap("`cloze COMMAND --help` explains a command and shows examples.", width)]


def _one_command(command: str, width: int) -> list[str]:
    dataclass, _, takes_positions = COMMANDS[command]
    options = options_of(dataclass)
    required = [option for option in options if option.required]
    given = [option.name.upper() if takes_positions else f"--{option.name} {option.metavar}" for option in required]
    lines = _wrap(" ".join(["usage: cloze", command, *given, "[options]"]), width, "       ")
    lines += ["", *_paragraphs(dataclass.__doc__ or "", width)]
    for title, members in _groups(dataclass, options).items():
        lines += ["", f"{title}:"]
        for option in members:
            lines += _row(f"--{option.name} {option.metavar}", _about(option), width, _COLUMN)
    lines += ["", "every command:"]
    lines += [line for name, text in EVERYWHERE for line in _row(name, text, width, _COLUMN)]
    lines += ["", "examples:"]
    for example in EXAMPLES.get(command, ()):
        lines += _command_line(example, width)
    return lines


def _groups(dataclass: type, options: Sequence[Option]) -> dict[str, list[Option]]:
    """Return the options by the name of their group: the command's own ones first, then those it shares with
    others."""
    groups: dict[str, list[Option]] = {}
    homes = [base.__name__ for base in dataclass.__mro__]
    declared = sorted(options, key=lambda option: homes.index(option.home))  # stable: in order within a class
    title, home = "options", ""
    for option in declared:
        if option.home != home:
            title, home = "options", option.home
        title = GROUP_BEGINS.get((option.home, option.name), title)
        groups.setdefault(title, []).append(option)
    return groups


def _about(option: Option) -> str:
    default = option.default
    if option.required:
        return f"{option.about} (required)"
    if default is None or default == "" or "default:" in option.help:
        return option.about
    said = str(default).lower() if isinstance(default, bool) else f"{default:g}" if option.kind == "float" else default
    return f"{option.about} (default: {said})".strip()


def _row(name: str, text: str, width: int, column: int) -> list[str]:
    """Return `  name   text` with the text in its own column, or below the name if that is long or the terminal
    narrow."""
    if width < _NARROW:
        return [f"  {name}", *_wrap(text, width, "      ", "      ")]
    lines = _wrap(text, width, " " * column, " " * column)
    if len(name) > column - 3:
        return [f"  {name}", *lines]
    return [f"  {name:<{column - 2}}{lines[0].strip()}" if lines else f"  {name}", *lines[1:]]


def _paragraphs(text: str, width: int) -> list[str]:
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join("\n".join(_wrap(part, width)) for part in parts).splitlines()


def _command_line(example: str, width: int) -> list[str]:
    """Return a command over several lines that a shell takes as one: cut between options, never inside quotes."""
    lines, line = [], " "
    for piece in re.findall(r"--\w+ (?:'[^']*'|[^-\s]\S*)|'[^']*'|\S+", example):
        if len(line) + len(piece) + 3 > width and line.strip():
            lines.append(f"{line} \\")
            line = "     "
        line += f" {piece}"
    return [*lines, line]


def _wrap(text: str, width: int, later: str = "", first: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
