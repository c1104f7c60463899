"""What goes wrong on the way to the Hub: a model arrives whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from local_hub import Fault, LocalHub, Repo
from pushing import WRITE, Client, accepted, refused

OLD = {"config.json": b"{}", "model.safetensors": b"an older model", "README.md": b"# Old\n"}


@pytest.fixture
def old(hub: LocalHub) -> Repo:
    """A repository with an older model in it."""
    hub.repos["user/demo"] = Repo(private=False)
    hub.repos["user/demo"].commit("main", dict(OLD))
    return hub.repos["user/demo"]


def is_whole(hub: LocalHub, run_dir: Path) -> bool:
    files = hub.files("user/demo")
    return all(files[name] == (run_dir / "model" / name).read_bytes() for name in OLD)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/commit/main", 503),
        Fault("POST", "/commit/main", 429),
        Fault("POST", "/commit/main", hang_up_after=10),
        Fault("POST", "/objects/batch", 500),
    ],
    ids=lambda fault: f"{fault.pattern.strip('/')}-{fault.status if fault.hang_up_after is None else 'dropped'}",
)
def test_a_fault_that_passes_is_waited_for(hub: LocalHub, old: Repo, push: Client, run_dir: Path, fault: Fault):
    hub.faults = [fault]
    done = push(run_dir, "--repo", "demo")
    accepted(done)
    assert fault.times == 0
    assert is_whole(hub, run_dir)
    assert len(old.commits) == 3


def test_an_upload_that_breaks_in_the_middle_begins_again(hub: LocalHub, old: Repo, push: Client, run_dir: Path):
    weights = run_dir / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + os.urandom(50_000_000))  # the Hub does not look into it
    hub.faults = [Fault("PUT", "/lfs/", hang_up_after=25_000_000)]
    accepted(push(run_dir, "--repo", "demo"))
    assert hub.requests("PUT", "/lfs/") == 2
    assert is_whole(hub, run_dir)


def test_somebody_else_s_commit_in_between_is_kept(hub: LocalHub, old: Repo, push: Client, run_dir: Path):
    def meanwhile() -> None:
        old.commit("main", hub.files("user/demo") | {"theirs.txt": b"theirs"})

    hub.faults = [Fault("POST", "/preupload/main", call=meanwhile)]
    done = push(run_dir, "--repo", "demo")
    accepted(done)
    assert "the Hub answered 412; trying again" in done.stderr
    assert hub.files("user/demo")["theirs.txt"] == b"theirs"
    assert is_whole(hub, run_dir)


@pytest.mark.parametrize(("status", "says"), [(401, "the token is not valid"), (403, "may not write here")])
def test_a_token_that_expires_in_the_middle_changes_nothing(
    hub: LocalHub, old: Repo, push: Client, run_dir: Path, status: int, says: str
):
    hub.faults = [Fault("POST", "/commit/main", status, times=99)]
    assert says in refused(push(run_dir, "--repo", "demo"))
    assert hub.files("user/demo") == OLD
    assert hub.requests("POST", "/commit/main") == 1


def test_a_hub_without_xet_gets_the_model_by_lfs(hub: LocalHub, push: Client, run_dir: Path):
    pytest.importorskip("hf_xet")
    done = push(run_dir, "--repo", "demo", HF_HUB_DISABLE_XET="0")
    accepted(done)
    assert "uploading by LFS instead" in done.stderr
    assert hub.requests("GET", "xet-write-token") == 1
    assert hub.requests("PUT", "/lfs/") == 1
    assert is_whole(hub, run_dir)


def test_a_token_that_xet_refuses_is_one_line(hub: LocalHub, old: Repo, push: Client, run_dir: Path):
    pytest.importorskip("hf_xet")

    def expire() -> None:
        del hub.tokens[WRITE]

    hub.faults = [Fault("GET", "xet-write-token", call=expire)]
    assert "not valid" in refused(push(run_dir, "--repo", "demo", HF_HUB_DISABLE_XET="0"))
    assert hub.files("user/demo") == OLD
