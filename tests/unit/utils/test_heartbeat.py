"""What takes long gives signs of progress, and those of other ranks and of a thread that is waited for count too."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from ranks import run_ranks, succeed

from cloze.checkpoint import safetensors_writer
from cloze.checkpoint.safetensors_writer import Entry, write_tensors
from cloze.utils.atomic_files import sha256, sync_tree
from cloze.utils.heartbeat import Progress, beat, beats, join_progressing


def here() -> int:
    return beats(threading.current_thread())


def test_progress_is_made_when_any_source_has_given_a_new_sign(monkeypatch):
    progress = Progress()
    monkeypatch.setattr("cloze.utils.heartbeat.time.monotonic", lambda: 10.0**9)
    progress.update(0, 0)
    progress.update(1, 0)
    assert progress.when < 10.0**9
    progress.update(1, 5)
    assert progress.when == 10.0**9
    progress.when = 0.0
    progress.update(1, 5)
    assert progress.when == 0.0
    progress.update(0, 2)
    assert (progress.when, progress.total) == (10.0**9, 7)


def test_writing_and_checking_files_are_signs_of_progress(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_WRITTEN_AT_ONCE", 100)
    values = torch.arange(100.0)
    entries = [Entry(name, torch.float32, (100,), lambda: values) for name in ("a", "b")]
    before = here()
    written = write_tensors(tmp_path / "file.safetensors", entries)
    assert here() - before == 2 * 4
    assert written.sha256 == sha256(tmp_path / "file.safetensors")
    before = here()
    sync_tree(tmp_path)
    assert here() - before == 1


def test_the_signs_of_a_thread_that_is_waited_for_are_those_of_the_one_that_waits():
    main, before, heard = threading.current_thread(), here(), threading.Event()

    def work() -> None:  # until the thread that waits has given a sign; else the test never ends
        while not heard.wait(0.01):
            beat()

    def listen() -> None:
        while beats(main) == before:
            heard.wait(0.01)
        heard.set()

    threading.Thread(target=listen, daemon=True).start()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    join_progressing(thread, 0.01)
    assert here() > before


def every_group(seconds: int) -> None:
    """What a rank does: all process groups of a start wait as long, DeepSpeed's and the one of --async_save too."""
    from cloze.distributed.collectives import make_group
    from cloze.distributed.world import RunShape, start

    start(RunShape(use_cpu=True, precision="no", timeout_seconds=seconds))
    make_group("gloo")
    torch.distributed.new_group([0, 1])
    groups = torch.distributed.distributed_c10d._world.pg_map
    found = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    assert len(found) >= 3
    torch.distributed.barrier()
    assert set(found) == {seconds}, found


def test_ddp_timeout_reaches_every_process_group(tmp_path: Path):
    succeed(run_ranks(every_group, 2, tmp_path / "log", seconds=77))
