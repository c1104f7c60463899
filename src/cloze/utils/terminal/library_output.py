"""What libraries print and log, apart from Cloze's own lines.

with own_stdout():          # print() of a library is dropped, console.say() is not
    command.run(config)
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from cloze.utils.foreign.paths import visible
from cloze.utils.terminal.json_events import is_json
from cloze.utils.terminal.redact import redacted


def escape_library_output() -> None:
    """Escape what a terminal would obey in the log lines and warnings of libraries: names in foreign files are in
    them. For a process of Cloze's own, not for one that imports it."""
    logging.setLogRecordFactory(_Record)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *given, **named: visible(redacted(plain(*given, **named)))


class _Record(logging.LogRecord):
    """A log line without colours, which a foreign name may contain as well, and with its traceback escaped."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        if self.exc_info and self.exc_info[0] is not None:  # formatters use exc_text if it is set
            self.exc_text = visible(redacted(logging.Formatter().formatException(self.exc_info)))
        if self.stack_info:
            self.stack_info = visible(redacted(self.stack_info))

    def getMessage(self) -> str:
        return visible(redacted(super().getMessage()))


class HiddenOutput:
    """Stand for stdout while a command runs: what libraries print is dropped; Cloze writes to `stream`."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Drop a text."""
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def own_stdout() -> Iterator[None]:
    """Keep what libraries print out of stdout in the block. With --log_format json it becomes events of its own."""
    if is_json():
        yield
        return
    stream = sys.stdout
    sys.stdout = HiddenOutput(stream)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout = stream


def own_stream() -> TextIO:
    """Return the stream that Cloze writes its lines to: stdout, also inside `own_stdout`."""
    return sys.stdout.stream if isinstance(sys.stdout, HiddenOutput) else sys.stdout
