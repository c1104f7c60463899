"""Errors that a person can cause or can do something about.

Every message is one line: what is wrong, where, and what to do about it. `cloze.cli` prints it without a traceback
and exits with code 2. Anything else that is raised is a bug in Cloze and keeps its traceback.

    raise DataError("no field 'text'", where="corpus.jsonl", hint="the fields are: title, body; set --text_field")
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any


class ClozeError(Exception):
    """What is wrong, where (a path, a flag, a record), and what to do (`hint`)."""

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, hint: str | None = None):
        self.what, self.where, self.hint = what, None if where is None else str(where), hint
        super().__init__(what, where, hint)

    def __reduce__(self) -> Any:
        """Errors travel between ranks."""
        return partial(type(self), where=self.where, hint=self.hint), (self.what,)

    def __str__(self) -> str:
        line = self.what if self.where is None else f"{self.where}: {self.what}"
        return " ".join((line if self.hint is None else f"{line}; {self.hint}").split())


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


class TrainingError(ClozeError):
    """Training cannot go on: its numbers are none."""


class LostRank(ClozeError):
    """Another process of the run died, failed or hangs. Exit code 75 where starting again may help.

    `loud`: it was rank 0, so that another one has to say it.
    """

    exit_code = 75

    def __init__(
        self, what: str, *, where: object = None, hint: str | None = None, exit_code: int = 75, loud: bool = False
    ):
        super().__init__(what, where=where, hint=hint)
        self.exit_code, self.loud = exit_code, loud

    def is_ours_to_tell(self) -> bool:
        """Whether this process is to say it: rank 0 is; where that one is lost, rank 1 and the first rank of each
        machine are, since each machine may see the others no more."""
        rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        return rank == "0" or (self.loud and (rank == "1" or local_rank == "0"))


class Stopped(Exception):
    """Somebody asked for an end (a signal, the end of a job's time), and it was reached in good order."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again

    def __init__(self, line: str, exit_code: int = 75):
        super().__init__(line)
        self.exit_code = exit_code
