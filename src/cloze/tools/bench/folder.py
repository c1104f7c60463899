"""Where a measurement keeps its files while it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloze.utils.atomic_files import remove_tree


@contextmanager
def work_folder(wanted: str | None) -> Iterator[Path]:
    """Yield an empty folder and delete it afterwards. `wanted`: the folder to create it in."""
    if wanted is not None:
        Path(wanted).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="cloze-bench-", dir=wanted))
    try:
        yield folder
    finally:
        remove_tree(folder, quietly=True)
