"""`cloze bench step` takes the step of a real run apart, alone and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import cloze_ranks, succeed

PARTS = ["data", "backbone", "head and loss", "backward", "optimizer", "communication", "rest"]


@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), ("ddp", 2), ("zero2", 2)])
def test_a_step_is_taken_apart(tmp_path: Path, engine: str, world_size: int):
    output, work = tmp_path / "step.json", tmp_path / "work"
    argv = ["bench", "step", "--sizes", "tiny-32", "--rounds", "2"]
    succeed(cloze_ranks([*argv, "--work_dir", str(work), "--output", str(output)], world_size, engine, tmp_path))
    found = json.loads(output.read_text())
    rows = {row[0]: row[1] for row in found["rows"]}
    assert list(rows) == [*PARTS, "sum, with a stop between parts", "the step as it runs"]
    for part in ("data", "backbone", "head and loss", "backward", "optimizer", "rest"):
        assert rows[part] > 0, part
    assert (rows["communication"] > 0) == (world_size == 2)
    assert rows["sum, with a stop between parts"] == pytest.approx(sum(rows[part] for part in PARTS))
    assert rows["the step as it runs"] > 0
    assert len(found["seconds_of_each_step"]) == 2 * 2
    measured = found["seconds_per_step_of_each_turn"]
    assert {"as it runs", *(["no exchange"] if engine == "ddp" else [])} == set(measured)
    assert all(len(seconds) == 2 * 2 for seconds in measured.values())
    noted = ["the step as it runs", *(["the gradient exchange"] if engine == "ddp" else [])]
    assert [note.split(":")[0] for note in found["notes"]] == noted  # too few for an interval
    assert found["ranks"] == world_size
    assert list(work.iterdir()) == []
