"""A cache of corpora that training prepares, named by a fingerprint of their contents and settings.

    prepared = open_or_prepare(config, tokenizer_name="roberta-base", folder=default_cache())

It runs before the process group exists, so nothing can time out. The processes of one machine wait for the first.
Machines that share the folder may do the same work twice, with the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from pathlib import Path

from cloze.config import BlocksConfig, PrepareConfig
from cloze.data.manifest import MANIFEST
from cloze.data.prepare.pipeline import Inputs, open_inputs, prepare, refuse_bad_records
from cloze.data.prepared.shards import Prepared, open_prepared
from cloze.utils.atomic_files import disk_errors
from cloze.utils.environment import processes
from cloze.utils.file_locks import locked, try_lock
from cloze.utils.terminal.console import say, warn

_OTHERS_WAIT_SECONDS = 60.0


def is_prepared(name: str) -> bool:
    """Return whether a dataset name is a folder made by `cloze prepare`."""
    return (Path(name) / MANIFEST).is_file()


def cached_name(config: BlocksConfig, inputs: Inputs) -> str:
    """Return `eli5-train-3f1c...`: the corpus's name, and a fingerprint of corpus, tokenizer and settings."""
    facts = json.dumps([inputs.facts, config.tokenizer_backend], sort_keys=True)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(str(inputs.corpus.description["dataset_name"])).name.split(".")[0])
    return f"{stem[:40]}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def open_or_prepare(config: BlocksConfig, tokenizer_name: str, folder: Path) -> Prepared:
    """Return the prepared folder of a corpus, from the cache or newly made. Raises what `prepare` raises."""
    inputs = open_inputs(config, tokenizer_name)
    output = folder / cached_name(config, inputs)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(BlocksConfig)}
    settings = PrepareConfig(**values, tokenizer_name=tokenizer_name, output=str(output))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f"{output.name}.lock"
    _let_the_first_begin(lock, output)
    with locked(lock, lambda: say("prepare", f"waiting for another process that makes {output}")) as is_alone:
        if not is_alone:
            warn(f"{folder}: its file system has no locks; another process may do the same work at the same time")
        if output.exists():
            say("prepare", f"from the cache: {output}")
        else:
            prepare(settings, inputs)
    prepared = open_prepared(output)
    refuse_bad_records(config, prepared)
    return prepared


def _let_the_first_begin(lock: Path, output: Path) -> None:
    """Wait until local rank 0, which shows the progress, has begun the work."""
    if processes.local_rank() == 0:
        return
    deadline = time.monotonic() + _OTHERS_WAIT_SECONDS
    while not output.exists() and time.monotonic() < deadline:
        try:
            held = try_lock(lock)
        except OSError:
            return
        if held is None:
            return
        os.close(held)
        time.sleep(0.2)
