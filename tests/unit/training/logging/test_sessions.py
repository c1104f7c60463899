"""What a run was computed on: every start that its result came from, and no name of a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from cloze.training.engines.ddp import DDPEngine
from cloze.training.logging import sessions
from cloze.training.logging.sessions import note_session, read_sessions
from cloze.utils import run_files


def test_starts_whose_steps_are_done_again_are_dropped_and_hosts_have_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sessions.socket, "gethostname", lambda: "planted-host-17")
    engine = DDPEngine(Accelerator(cpu=True))
    for first_step in (0, 100, 150, 100):
        note_session(tmp_path, engine, first_step)
    kept = read_sessions(tmp_path)
    assert [one["first_step"] for one in kept] == [0, 100]
    assert (kept[0]["ranks"], kept[0]["hosts"], sum(kept[0]["devices"].values())) == (1, 1, 1)
    assert {"torch", "transformers"} <= set(kept[0]["versions"])
    assert "planted-host-17" not in (tmp_path / run_files.SESSIONS).read_text()


def test_a_damaged_list_is_begun_anew(tmp_path: Path):
    (tmp_path / run_files.SESSIONS).write_text("{cut")
    assert read_sessions(tmp_path) == []
    note_session(tmp_path, DDPEngine(Accelerator(cpu=True)), 7)
    assert [one["first_step"] for one in read_sessions(tmp_path)] == [7]
