"""All output to the terminal goes through cloze.utils.terminal.console, which escapes what a terminal would obey."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from call_sites import call_sites, dotted
from rich.table import Table

import cloze
from cloze.data.prepared.text_report import report_lines, warnings_of
from cloze.tools.api.local_workers import _follow
from cloze.tools.doctor.report import show as show_rows
from cloze.tools.doctor.rows import Row
from cloze.utils.terminal import console, library_output

PACKAGE = Path(cloze.__file__).parent
CLIPBOARD = "\x1b]52;c;ZXZpbA==\x07"
SIGNAL_HANDLER = "constants, in a signal handler, which must not wait for a lock"
# Functions that write by themselves, and why.
ALLOWED = {
    "utils/terminal/console.py:complain": "escapes",
    "utils/terminal/console.py:show": "escapes",
    "utils/terminal/console.py:show_coloured": "escapes",
    "utils/terminal/console.py:show_table": "draws into a string, which show_coloured escapes",
    "utils/terminal/json_events.py:event": "JSON in ASCII",
    "utils/terminal/screen.py:_write": "rows that training/live_view.py:render escapes",
    "utils/terminal/screen.py:put_in_order": "constants",
    "training/live_view.py:render": "draws escaped pieces into a string",
    "utils/early_signals.py:_write_line": "constants, in a signal handler, before the console is imported",
    "distributed/resilience/stop_signals.py:_listen": SIGNAL_HANDLER,
    "distributed/resilience/stop_signals.py:_leave_if_joining": SIGNAL_HANDLER,
    "utils/atomic_files.py:append_text": "writes a file",
    "distributed/resilience/owner_file.py:create_lock": "writes a file",
    "tools/launch/slurm_job.py:main": "a shell script reads the path, byte for byte",
    "export/hub/pusher.py:tell": "JSON to the process that trains",
    "tools/bench/worker_pipe.py:report": "JSON to the process that measures",
}


def writes(path: Path) -> Iterator[tuple[str, int, str]]:
    """Function, line and text of each call that may write to the terminal."""

    streams = ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__")
    for function, node in call_sites(ast.parse(path.read_text())):
        text = ".".join(dotted(node.func))
        ends = text.rsplit(".", 1)[-1]
        if (
            ends in ("print", "pprint", "print_exc", "print_exception", "print_stack", "print_tb", "print_json")
            or text in ("put", "events.put", "os.write")
            or (text.startswith(streams) and ends in ("write", "writelines"))
            or any(one.arg in ("file", "stream") and ".".join(dotted(one.value)) in streams for one in node.keywords)
        ):
            yield function, node.lineno, ast.unparse(node)


def test_only_the_console_writes_to_the_terminal():
    found, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for function, line, text in writes(path):
            allowed = {name, f"{name}:{function}"} & set(ALLOWED)
            used |= allowed
            if not allowed:
                found.append(f"{name}:{line}: {text}")
    assert not found, "use cloze.utils.terminal.console (show, say, warn, show_table)"
    assert used == set(ALLOWED), "allowed for nothing"


@pytest.mark.parametrize(
    "text",
    [
        "print('x')",
        "console.print(table)",
        "sys.stdout.write(x)",
        "sys.stderr.buffer.write(x)",
        "put(sys.stdout, x)",
        "os.write(2, x)",
        "traceback.print_exc()",
        "logging.StreamHandler(stream=sys.stdout)",
    ],
)
def test_a_call_that_writes_is_seen(tmp_path: Path, text: str):
    (tmp_path / "x.py").write_text(f"def f():\n    {text}\n")
    assert [function for function, *_ in writes(tmp_path / "x.py")] == ["f"]


def test_tables_show_foreign_names_as_text(capsys: pytest.CaptureFixture[str]):
    table = Table("name")
    table.add_row(f"[/bold] :smile: {CLIPBOARD}\x1b[2J")
    console.show_table(table, width=100)
    show_rows([Row(CLIPBOARD, "bad", f"GPU {CLIPBOARD}", f"do {CLIPBOARD}")])
    out = capsys.readouterr().out
    assert "[/bold] :smile: \\x1b]52" in out
    assert not {"\x1b", "\x07"} & set(out)


def test_colours_of_our_own_reach_the_terminal_and_nothing_else_does(capsys: pytest.CaptureFixture[str]):
    console.show_coloured(f"\x1b[31;1mbad\x1b[0m {CLIPBOARD}\x1b[2J\x9b31m")
    assert capsys.readouterr().out == "\x1b[31;1mbad\x1b[0m \\x1b]52;c;ZXZpbA==\\x07\\x1b[2J\\x9b31m\n"


def test_what_libraries_log_is_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    try:
        library_output.escape_library_output()
        handler = logging.StreamHandler()
        logging.getLogger("some.library").addHandler(handler)
        logging.getLogger("some.library").warning("unexpected key %s", CLIPBOARD)
        logging.getLogger("some.library").warning("a type \x1b[31mred")
        try:
            raise KeyError("\x1b[32m" + CLIPBOARD) from ValueError("\x1b[33m")
        except KeyError as error:
            error.add_note("\x1b[34m")
            logging.getLogger("some.library").exception("failed", stack_info=True)
        logging.getLogger("some.library").removeHandler(handler)
        assert "\x1b" not in warnings.formatwarning(f"key {CLIPBOARD}", UserWarning, "x.py", 1)
    finally:
        logging.setLogRecordFactory(before)
    err = capsys.readouterr().err
    assert "unexpected key \\x1b]52" in err
    assert "a type \\x1b[31mred" in err
    assert "\x1b" not in err


@pytest.mark.slow  # imports every library in a process of its own
def test_each_library_logs_through_the_escaping_record(capfd: pytest.CaptureFixture[str]):
    code = (
        "import logging, warnings; from cloze.utils.terminal import library_output as o; o.escape_library_output();"
        "import transformers, datasets, huggingface_hub, accelerate, torch;"
        "names = 'transformers', 'datasets', 'huggingface_hub', 'accelerate', 'torch', 'deepspeed';"
        "[logging.getLogger(f'{name}.x').warning('%s \\x1b[31mx', name) for name in names];"
        "warnings.warn('warned \\x1b[31mx')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    err = capfd.readouterr().err
    assert "\x1b" not in err
    assert err.count("\\x1b[31mx") >= 7


def test_what_a_started_process_prints_is_escaped(capsys: pytest.CaptureFixture[str]):
    said = _follow([sys.executable, "-c", f"print({CLIPBOARD!r}, 'half', sep=chr(10), end='')"], 1, {})
    assert said == (0, "")
    assert capsys.readouterr().out == "\\x1b]52;c;ZXZpbA==\\x07\nhalf\n"


@pytest.mark.parametrize("word", [CLIPBOARD, 10**400, float("inf"), True, [], {"tokens": CLIPBOARD}, None])
def test_a_report_on_text_says_numbers_of_known_splits_only(word: object):
    facts = {name: word for name in ("files", "unknown_tokens", "lost_characters", "word", "empty_documents")}
    facts["repeated_documents"] = 0.5
    nested = {"tokens": word, "characters": word}
    for report in (word, {"train": word}, {"validation_in_train": word}, {CLIPBOARD: facts}):
        assert [*report_lines(report).values(), *warnings_of(report)] == []
    told = report_lines({"train": facts, "validation": {"word": nested}})
    assert told == {"train": "50.0 % repeated documents"}
    assert len(warnings_of({"train": facts, "validation": {"word": nested}})) == 1
