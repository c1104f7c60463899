"""Another user of a machine, who holds a run's port or reaches one, runs no code in it and does not hold it up.

Hosts have networks of their own; the other user is `nobody`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus import TINY_MODEL
from hosts import Host, Hosts, why_not
from ranks import cloze_ranks, entering, run_ranks, start_ranks, succeed, wait_for

NOBODY = 65534
SECRET = "only the ranks of this run know it"

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.slow]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(["a", "b"], tmp_path) as hosts:
        yield hosts


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may write into, as /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def stranger(host: Host, attack: Callable[[], Any], log: Path) -> int:
    """Fork a process of `nobody` on a host, which attacks; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        host.move_in()
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        attack()
        code = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    os._exit(code)


def flags(prepared: Path, run: Path) -> list[str]:
    where = ["--dataset_name", str(prepared), "--output_dir", str(run), "--per_device_train_batch_size", "2"]
    return ["train", *TINY_MODEL, "--max_steps", "2", "--save_strategy", "no", "--ddp_timeout", "20", *where]


def on(hosts: Hosts, more: Callable[[], None] | None = None) -> Callable[[], None]:
    """To be called in a rank: the first one moves to host a, the second to b; both know the secret."""

    def install() -> None:
        hosts["ab"[int(os.environ["RANK"])]].move_in()
        os.environ |= {"MASTER_ADDR": hosts["a"].address, "LOCAL_RANK": "0", "CLOZE_SECRET": SECRET}
        if more is not None:
            more()

    return install


class Evil:
    """What runs a command where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"id -u > {self.mark}",)


def test_whoever_holds_the_port_in_place_of_rank_0_runs_no_code_in_other_ranks(
    hosts: Hosts, prepared: Path, tmp_path: Path, open_folder: Path
):
    mark, ready = open_folder / "mark", open_folder / "ready"
    port = 29555

    def attack() -> None:
        """Be rank 0 of the world that rank 1 looks for, and send it pickles by all of torch's collectives."""
        import torch.distributed as dist

        ready.touch()
        dist.init_process_group("gloo", init_method=f"tcp://{hosts['a'].address}:{port}", rank=0, world_size=2)
        for send in (
            lambda: dist.all_gather_object([None, None], Evil(mark)),
            lambda: dist.broadcast_object_list([Evil(mark)], 0),
            lambda: dist.scatter_object_list([None], [Evil(mark), Evil(mark)], 0),
        ):
            try:
                send()
            except (RuntimeError, ValueError):
                break

    def alone() -> None:
        os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_PORT=str(port))
        on(hosts)()

    pid = stranger(hosts["a"], attack, open_folder / "stranger.log")
    wait_for(ready.exists)
    outcomes = run_ranks(entering(flags(prepared, tmp_path / "run"), "ddp", alone), 1, tmp_path / "log", 120)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert not mark.exists(), "a pickle of another user was loaded"
    assert outcomes[0].code == 2, outcomes[0].output
    assert "CLOZE_SECRET: rank 0 did not answer" in outcomes[0].output
    assert "Traceback" not in outcomes[0].output
    assert not (tmp_path / "run").exists()


def besiege(address: str, port: int) -> None:
    """Send to the watch of a run what should not come, and say nothing on many connections, for a while."""
    sent = [b"[]\n", "ключ\n".encode() * 20, b"[" * 100_000, b'{"word": "x", "rank": 1}\n', b"", b"x" * 67]
    kept = []
    end = time.monotonic() + 4
    while time.monotonic() < end:
        for data in sent:
            try:
                connection = socket.create_connection((address, port), 1)
                connection.setblocking(False)
                connection.send(data)
            except OSError:
                continue
            kept = [*kept[-200:], connection]
        with contextlib.suppress(OSError, IndexError):
            kept[-1].send(b"y" * (1 << 20))


def test_whoever_reaches_the_watch_neither_ends_nor_holds_up_a_start(
    hosts: Hosts, prepared: Path, tmp_path: Path, open_folder: Path
):
    where = open_folder / "where"

    def show_the_watch() -> None:
        """Rank 0 writes down where its watch listens, and gives strangers time to come first."""
        from cloze.distributed.resilience import watchdog

        plain = watchdog.listen

        def listen(addresses: list[str]) -> tuple[socket.socket, str]:
            server, address = plain(addresses)
            where.with_name("new").write_text(f"{server.getsockname()[0]} {server.getsockname()[1]}")
            where.with_name("new").rename(where)
            time.sleep(1)
            return server, address

        watchdog.listen = listen

    def attack() -> None:
        wait_for(where.exists)
        address, port = where.read_text().split()
        besiege(address, int(port))

    pids = [stranger(hosts[name], attack, open_folder / f"stranger-{name}.log") for name in "ab"]
    outcomes = cloze_ranks(
        flags(prepared, tmp_path / "run"), 2, "ddp", tmp_path / "log", before=on(hosts, show_the_watch)
    )
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes == [0, 0], [log.read_text() for log in open_folder.glob("*.log")]
    succeed(outcomes)
    assert "cannot watch each other" not in "".join(outcome.output for outcome in outcomes)
    assert where.read_text().split()[0] == hosts["a"].address, "it listens where ranks meet, and not everywhere"


def test_another_user_cannot_read_the_secret(hosts: Hosts, open_folder: Path, tmp_path: Path):
    def wait() -> None:
        on(hosts)()
        os.execve("/bin/sleep", ["sleep", "30"], dict(os.environ))

    pids, _ = start_ranks(wait, 2, tmp_path / "log")
    found = open_folder / "found"

    def attack() -> None:
        texts = []
        for name in ("environ", "cmdline"):
            for pid in pids:
                try:
                    texts.append(Path(f"/proc/{pid}/{name}").read_text())
                except PermissionError:
                    texts.append(f"no permission for {name}")
        found.write_text("\n".join(texts))

    wait_for(lambda: all(b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids))
    pid = stranger(hosts["a"], attack, open_folder / "stranger.log")
    assert os.waitpid(pid, 0)[1] == 0
    for pid in pids:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    text = found.read_text()
    assert text.count("no permission for environ") == 2
    assert "sleep" in text
    assert SECRET not in text
