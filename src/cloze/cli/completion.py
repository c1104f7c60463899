"""Shell completion, made from the commands' dataclasses: commands, options, values of options, files elsewhere.

    print(script("bash"))

Each script contains all names, so that a key press starts no Python process. It begins where `cloze` stands, so that
`accelerate launch ... -m cloze train --learn<TAB>` is the launcher's business, as ever.
"""

from __future__ import annotations

import shlex

from cloze.config.commands import COMMANDS
from cloze.config.options import Option, options_of
from cloze.utils.terminal.console import FORMATS

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """Return what `shell` (one of SHELLS) is to read."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def everywhere() -> list[Option]:
    """Return the options that every command has beside its own."""
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    return [
        Option("log_format", "str", tuple(FORMATS), "auto", False, formats, ""),
        Option("config", "str", (), None, False, "read values from this YAML file first", ""),
        Option("print_config", "none", (), None, False, "print the configuration as YAML and exit", ""),
        Option("help", "none", (), None, False, "show the help and exit", ""),
    ]


def _options(command: str) -> list[Option]:
    return options_of(COMMANDS[command][0]) + everywhere()


def _places(command: str) -> list[Option]:
    """Return the positional arguments."""
    dataclass, _, takes_positions = COMMANDS[command]
    return [option for option in options_of(dataclass) if option.required and takes_positions]


def _takes_file(option: Option) -> bool:
    return option.kind == "str" and not option.values


def _bash() -> str:
    names, values, firsts = [], [], []
    for command in COMMANDS:
        flags = " ".join(f"--{option.name}" for option in _options(command))
        names.append(f"        {command}) options={shlex.quote(flags)} ;;")
        for option in _options(command):
            if option.values:
                values.append(f"        {command}:--{option.name}) values={shlex.quote(' '.join(option.values))} ;;")
            elif option.kind in ("int", "float", "dict"):
                values.append(f"        {command}:--{option.name}) values=-  ;;")
            elif _takes_file(option):
                values.append(f"        {command}:--{option.name}) files=yes ;;")
        places = _places(command)
        if places and places[0].values:
            firsts.append(f"        {command}) values={shlex.quote(' '.join(places[0].values))} ;;")
    return f"""# bash completion for cloze: source <(cloze completion bash)
_cloze() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    local command='' options='' values='' files='' at
    # bash cuts words at '=': --name=value is three of them
    if [[ $word == = ]]; then word=''; elif [[ $before == = ]]; then before=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    [[ $before == = ]] && before=${{COMP_WORDS[COMP_CWORD-2]}}
    for ((at = 1; at < COMP_CWORD; at++)); do
        case ${{COMP_WORDS[at]}} in
        {"|".join(COMMANDS)}) command=${{COMP_WORDS[at]}}; break ;;
        esac
    done
    COMPREPLY=()
    if [[ -z $command ]]; then
        case $before in
        --log_format) COMPREPLY=($(compgen -W '{" ".join(FORMATS)}' -- "$word")) ;;
        *) COMPREPLY=($(compgen -W '{" ".join(COMMANDS)} --help --version --log_format' -- "$word")) ;;
        esac
        return
    fi
    case $command in
{chr(10).join(names)}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
        return
    fi
    case $command:$before in
{chr(10).join(values)}
    esac
    if [[ -z $values && -z $files && $at -eq $((COMP_CWORD - 1)) ]]; then
        case $command in
{chr(10).join(firsts)}
        esac
    fi
    case $values in
    -) ;;
    '') compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$values" -- "$word")) ;;
    esac
}}
complete -F _cloze cloze"""


def _zsh() -> str:
    def escaped(text: str) -> str:
        for one in ("\\", "'", "[", "]", ":"):
            text = text.replace(one, "'\\''" if one == "'" else f"\\{one}")
        return text

    def after(option: Option) -> str:
        if option.values:
            return f":{option.name}:({' '.join(option.values)})"
        if option.kind == "none":
            return ""
        return f":{option.name}:_files" if _takes_file(option) else f":{option.name}:"

    cases = []
    for command in COMMANDS:
        parts = [f"'--{one.name}[{escaped(one.about)}]{after(one)}'" for one in _options(command)]
        parts += [
            f"'{at}{after(one) or ':' + one.name + ':_files'}'" for at, one in enumerate(_places(command), 1)
        ] or ["'*:file:_files'"]
        body = " \\\n            ".join(parts)
        cases.append(f"        {command})\n            _arguments \\\n            {body} ;;")
    lines = "\n".join(f"        '{name}:{escaped(line)}'" for name, (_, line, _) in COMMANDS.items())
    return f"""#compdef cloze
# zsh completion for cloze: source <(cloze completion zsh)
_cloze() {{
    local -a commands
    local curcontext=$curcontext state line
    commands=(
{lines}
    )
    _arguments -C '--log_format[how it talks]:log_format:({" ".join(FORMATS)})' '--help[show help]' \\
        '--version[print the version]' '1:command:->command' '*::option:->options'
    case $state in
    command) _describe -t commands command commands ;;
    options)
        case $words[1] in
{chr(10).join(cases)}
        esac ;;
    esac
}}
if [[ $funcstack[1] == _cloze ]]; then _cloze "$@"; else compdef _cloze cloze; fi"""


def _fish() -> str:
    lines = ["# fish completion for cloze: cloze completion fish | source", "complete -c cloze -e"]
    none = f"not __fish_seen_subcommand_from {' '.join(COMMANDS)}"
    for name, (_, line, _) in COMMANDS.items():
        lines.append(f"complete -c cloze -n {_quoted(none)} -f -a {name} -d {_quoted(line)}")
    lines.append(f"complete -c cloze -n {_quoted(none)} -f -l version -d 'print the version and exit'")
    for option in everywhere():
        lines.append(f"complete -c cloze -l {option.name}{_fish_values(option)} -d {_quoted(option.about)}")
    for command in COMMANDS:
        seen = _quoted(f"__fish_seen_subcommand_from {command}")
        for option in options_of(COMMANDS[command][0]):
            about = f"-l {option.name}{_fish_values(option)} -d {_quoted(option.about)}"
            lines.append(f"complete -c cloze -n {seen} {about}")
        for option in _places(command)[:1]:
            if option.values:
                lines.append(f"complete -c cloze -n {seen} -f -a {_quoted(' '.join(option.values))}")
    return "\n".join(lines)


def _fish_values(option: Option) -> str:
    """Return what follows an option: nothing, one of a list, a file, or something to be typed."""
    if option.values:
        return f" -x -a {_quoted(' '.join(option.values))}"
    return {"none": " -f", "str": " -r -F"}.get(option.kind, " -x")


def _quoted(text: str) -> str:
    """Return a quoted word for fish, whose single quotes have these two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
