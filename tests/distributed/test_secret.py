"""A rank that does not know the secret of a run takes no part in it; and what ranks say to each other arrives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks, run_ranks, succeed

SECRET = "a long text that nobody guesses"


def exchange() -> None:
    """On each rank: join, and send values of every kind."""
    from cloze.cli.command_line import leave
    from cloze.distributed.collectives import gather, gather_to_main, raise_on_any_rank, run_on_main_and_broadcast
    from cloze.distributed.world import RunShape, start
    from cloze.errors import CheckpointError

    rank = start(RunShape(use_cpu=True, precision="no")).process_index
    assert gather("x" * rank * 100) == ["", "x" * 100, "x" * 200]
    parts = gather_to_main((None, {("a", rank): Path("b")}))
    assert parts == ([(None, {("a", one): Path("b")}) for one in range(3)] if rank == 0 else [])
    assert run_on_main_and_broadcast(lambda: (rank, Path("runs/x"))) == (0, Path("runs/x"))
    with pytest.raises(CheckpointError, match="w: bad"):
        raise_on_any_rank(CheckpointError("bad", where="w") if rank == 1 else None)
    leave(0)


def test_ranks_that_share_a_secret_exchange_values_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLOZE_SECRET", SECRET)
    succeed(run_ranks(exchange, 3, tmp_path))


def forget() -> None:
    """Rank 1 comes without the right secret."""
    os.environ["CLOZE_SECRET"] = SECRET + ("?" if os.environ["RANK"] == "1" else "")


def test_a_rank_with_another_secret_ends_the_start_in_one_line(prepared: Path, tmp_path: Path):
    flags = [*TINY_MODEL, "--max_steps", "1", "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    outcomes = cloze_ranks(["train", *flags], 2, "ddp", tmp_path, before=forget)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    assert "rank 1 did not prove to know this run's secret" in outcomes[0].output
    assert not (tmp_path / "run").exists()
    assert all("Traceback" not in outcome.output and SECRET not in outcome.output for outcome in outcomes)
