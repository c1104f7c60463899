"""A plan without a terminal is short lines, one fact each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cloze.tools.planning import report


def test_a_choice_is_one_short_fact_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(report, "cells", lambda plan, row: ["zero2", *["123.4G (567.8G)"] * 14])
    plan: Any = SimpleNamespace(rows=[SimpleNamespace(choice=SimpleNamespace(name="zero2"))])
    report._lines(plan)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["choice", "zero2"]
    assert len(lines) == 15
    assert max(map(len, lines)) < 60
