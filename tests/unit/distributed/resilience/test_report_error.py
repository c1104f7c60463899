"""Who tells that a rank is lost: one process of those that can still be heard, on each machine that may be cut off."""

from __future__ import annotations

import pytest

from cloze.distributed.resilience.report_error import is_ours_to_tell
from cloze.errors import LostRank

# rank and local rank of four ranks on two machines
WORLD = [(0, 0), (1, 1), (2, 0), (3, 1)]


@pytest.mark.parametrize(("lost_is_rank_0", "tell"), [(False, [0]), (True, [0, 1, 2])])
def test_rank_0_tells_and_where_it_is_lost_every_machine_does(monkeypatch, lost_is_rank_0: bool, tell: list[int]):
    told = []
    for rank, local_rank in WORLD:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        if is_ours_to_tell(LostRank("rank x died", loud=lost_is_rank_0)):
            told.append(rank)
    assert told == tell
