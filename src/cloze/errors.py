"""User-facing errors.

Every message is one line: the problem, its place, and what to do. `cloze.cli` prints it without a traceback
and exits with code 2. Anything else that is raised is a bug in Cloze and keeps its traceback.

    raise DataError("no field 'text'", where="corpus.jsonl", hint="the fields are: title, body; set --text_field")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any


class ClozeError(Exception):
    """An error with the problem (`what`), its place (`where`: a path, a flag, a record) and what to do (`hint`)."""

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, hint: str | None = None):
        self.what, self.where, self.hint = what, None if where is None else str(where), hint
        super().__init__(what, where, hint)

    def __reduce__(self) -> Any:
        """Return what pickle needs to make the error again."""
        return partial(type(self), where=self.where, hint=self.hint), (self.what,)

    def __str__(self) -> str:
        line = _short(self.what) if self.where is None else f"{_short(str(self.where))}: {_short(self.what)}"
        return " ".join((line if self.hint is None else f"{line}; {self.hint}").split())

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows of an exception that has this method: the line alone."""
        return [f"cloze: error: {self}"]


class ConfigError(ClozeError):
    """A flag, a YAML key, or a combination of them that cannot be used."""


class DataError(ClozeError):
    """A corpus or a prepared folder that cannot be read or holds nothing usable."""


class ModelError(ClozeError):
    """A model or tokenizer that cannot be loaded or does not fit the data."""


class CheckpointError(ClozeError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class LaunchError(ClozeError):
    """The processes that are running are not the ones that were launched."""


class HubError(ClozeError):
    """The Hub refused, or cannot be reached."""


class DiskError(ClozeError):
    """Nothing more can be written (disk full, no permission)."""


class OwnerError(ClozeError):
    """Another start owns the run folder, or has taken it over."""


class TrainingError(ClozeError):
    """Training cannot continue: the loss or gradients are not finite."""


class LostRank(ClozeError):
    """Another process of the run died, failed or hangs. The exit code is 75 if starting again may help.

    `loud`: rank 0 was lost, so another rank has to report it. `lost`: the record of the lost rank, as in error.json
    (see `cloze.distributed.resilience.error_records`); None if the rank is unknown, or if this rank itself hangs.
    """

    exit_code = 75

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        hint: str | None = None,
        exit_code: int = 75,
        loud: bool = False,
        lost: dict[str, Any] | None = None,
    ):
        super().__init__(what, where=where, hint=hint)
        self.exit_code, self.loud, self.lost = exit_code, loud, lost


class Stopped(BaseException):
    """A request to stop (a signal, the end of a job's time) ended the process cleanly.

    Not an Exception, as KeyboardInterrupt is not: a signal raises it wherever the main thread is, also inside
    `except Exception` around a library, which must not take it for an error of that library.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again

    def __init__(self, line: str, exit_code: int = 75):
        super().__init__(line)
        self.exit_code = exit_code


@contextlib.contextmanager
def error_phase(phase: str, step: int | None = None) -> Iterator[None]:
    """Record in any exception raised here the phase of the run and the steps done; the innermost phase counts. Also a
    decorator: `@error_phase("data")`."""
    try:
        yield
    except Exception as error:
        tag_phase(error, phase, step)
        raise


def tag_phase(error: BaseException, phase: str, step: int | None = None) -> None:
    """Record the phase in which an error happened, unless it is already recorded."""
    if not hasattr(error, "_cloze_phase"):
        error._cloze_phase = (phase, step)  # type: ignore[attr-defined]


def phase_of(error: BaseException) -> tuple[str, int | None]:
    """Return the phase in which an error happened (default: `start`) and the steps done by then."""
    return getattr(error, "_cloze_phase", ("start", None))


def mark_all_ranks(error: BaseException) -> None:
    """Record that every rank raises this error at the same place."""
    error._cloze_common = True  # type: ignore[attr-defined]


def is_common(error: BaseException) -> bool:
    """Return whether every rank is known to raise this error."""
    return getattr(error, "_cloze_common", False)


def _short(text: str) -> str:
    """Return at most 1,000 characters: very long paths lose their middle."""
    return text if len(text) <= 1000 else f"{text[:500]} ... {text[-495:]}"


def one_line(error: BaseException) -> str:
    """Return `ValueError: ` and the first line of its message; for a ClozeError its own line."""
    if isinstance(error, ClozeError):
        return str(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
