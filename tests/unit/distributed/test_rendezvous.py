"""Where the processes of a run meet is checked before they wait for each other."""

from __future__ import annotations

import pytest

from cloze.distributed.rendezvous import joining
from cloze.errors import LaunchError


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}.items():
        monkeypatch.setenv(name, value)


def test_an_address_that_this_machine_does_not_know_is_refused_if_there_are_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASTER_ADDR", "a..b")
    with pytest.raises(LaunchError, match="does not know the name"), joining():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joining():
        pass


@pytest.mark.parametrize("line", ["EADDRINUSE", "the address is already in use"])
def test_a_port_that_is_taken_is_named(line: str):
    with pytest.raises(LaunchError, match="port 29999 of this machine is taken"), joining():
        raise RuntimeError(line)


def test_another_failure_to_join_stays_what_it_is():
    with pytest.raises(RuntimeError, match="something else"), joining():
        raise RuntimeError("something else")
