"""`cloze doctor` on two real ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import ranks


def test_two_ranks_are_measured_and_another_version_on_one_of_them_is_noticed(tmp_path: Path):
    def plant() -> None:
        import importlib.metadata

        real = importlib.metadata.version
        if os.environ["RANK"] == "1":
            importlib.metadata.version = lambda name: "0.0.1" if name == "accelerate" else real(name)

    shared = tmp_path / "shared"
    shared.mkdir()
    words = ["doctor", "--output_dir", str(shared), "--megabytes", "2", "--json", str(tmp_path / "found.json")]
    outcomes = ranks.cloze_ranks([*words, "--timeout", "30"], 2, "ddp", tmp_path / "logs", plant)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    assert outcomes[1].output == ""
    assert "BAD   accelerate" in outcomes[0].output
    assert "0.0.1" in outcomes[0].output
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    (link,) = found["links"]
    assert (link["backend"], link["ranks"]) == ("gloo", [0, 1])
    assert 0 < link["latency_us"] < 1e6
    assert all(0.001 < speed < 1000 for speed in link["gb_per_second"])
    assert [(one["rank"], one["reads"], one["written"]) for one in found["shared"]] == [(1, "", "")]
    assert list(shared.iterdir()) == []


def test_a_child_process_can_measure_and_a_rank_that_stays_away_is_an_error_of_its_pair(
    tmp_path: Path,
):
    def measure() -> None:
        from cloze.tools.doctor.links import measure_links
        from cloze.tools.doctor.meeting import join, part
        from cloze.tools.doctor.this_process import find_this_process

        meeting = join(find_this_process(os.environ), 30)
        (link,) = measure_links(meeting, [[(0, 1)]], "gloo", 1, apart=True) or [{}]
        meeting.timeout = 1
        lost = measure_links(meeting, [[(0, 7)]] if meeting.process.rank == 0 else [], "gloo", 1, apart=False)
        print(json.dumps([link, lost]), flush=True)
        os._exit(part(meeting, 0))

    outcomes = ranks.run_ranks(measure, 2, tmp_path)
    ranks.succeed(outcomes)
    link, (lost,) = json.loads(outcomes[0].output.splitlines()[-1])
    assert link["gb_per_second"][0] > 0
    assert lost["error"] == "rank 7 said nothing"


@pytest.mark.parametrize(("other", "code"), [("0123456789abcdef", 0), ("another-secret-text", 2), ("", 2)])
def test_ranks_without_the_same_secret_tell_each_other_nothing(tmp_path: Path, other: str, code: int):
    def meet() -> None:
        from cloze.errors import LaunchError
        from cloze.tools.doctor.meeting import join, part
        from cloze.tools.doctor.this_process import find_this_process

        os.environ["CLOZE_SECRET"] = other if os.environ["RANK"] == "1" else "0123456789abcdef"
        try:
            meeting = join(find_this_process(os.environ), 20)
        except LaunchError as error:
            print(error, flush=True)
            os._exit(2)
        os._exit(part(meeting, 0))

    outcomes = ranks.run_ranks(meet, 2, tmp_path)
    assert [outcome.code for outcome in outcomes] == [code, code], outcomes
    assert all(("secret" in outcome.output.lower()) == (code == 2) for outcome in outcomes)
