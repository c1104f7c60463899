"""Whoever holds or reaches a port of a run, and does not know its secret, neither takes part nor holds it up."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed

from cloze.distributed import rendezvous
from cloze.distributed.resilience.joining import REQUEST_BYTES, accept_ranks, join_main, listen, resolve
from cloze.distributed.resilience.json_socket import Link
from cloze.distributed.secret import NONCE_BYTES, authenticate, check_secret, proof
from cloze.errors import LaunchError

KEY = b"k" * 32
WRONG = b"w" * 32
SECONDS = 20.0


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls at the same time; what each returned, or the LaunchError or OSError it raised."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except (LaunchError, OSError) as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def meet(*keys: bytes | None) -> list[Any]:
    """One rank for each secret, over one store."""
    store = torch.distributed.HashStore()
    return together(
        *(lambda rank=rank, key=key: authenticate(store, rank, len(keys), key, 5) for rank, key in enumerate(keys))
    )


def test_ranks_with_the_same_secret_know_each_other_and_without_any_say_so():
    assert meet(KEY, KEY, KEY) == [True, True, True]
    assert meet(None, None) == [False, False]


@pytest.mark.parametrize("keys", [(KEY, WRONG), (KEY, None), (None, KEY), (KEY, KEY, WRONG)])
def test_a_rank_that_does_not_know_the_secret_is_refused_on_both_sides(keys: tuple[bytes | None, ...]):
    found = meet(*keys)
    assert isinstance(found[0], LaunchError) or keys[0] is None
    assert isinstance(found[-1], LaunchError)
    assert all("secret" in str(one) and "\n" not in str(one) for one in found if isinstance(one, LaunchError))


def test_what_holds_the_port_in_place_of_rank_0_cannot_answer_for_it():
    """It sees every message, and may send back any of them: of this rank, of another one, of another meeting."""
    store = torch.distributed.HashStore()
    nonce = b"n" * NONCE_BYTES
    store.set("cloze/hello/0", nonce)

    def impostor() -> None:
        store.wait(["cloze/proof/1"])
        store.set("cloze/answer/1", store.get("cloze/proof/1"))

    error, _ = together(lambda: authenticate(store, 1, 2, KEY, 5), impostor)
    assert "does not know this run's secret" in str(error)
    hello = store.get("cloze/hello/1")
    assert (
        len({proof(KEY, side, rank, world, nonce, hello) for side in "ab" for rank in (1, 2) for world in (3, 4)}) == 8
    )
    assert proof(KEY, "main", 1, 2, nonce, hello) != proof(KEY, "main", 1, 2, hello, nonce)


def test_silence_in_place_of_rank_0_is_one_line_after_the_time_limit():
    with pytest.raises(LaunchError, match=r"rank 0 did not answer within 0 s"):
        authenticate(torch.distributed.HashStore(), 1, 2, KEY, 0.1)


def test_a_secret_that_can_be_guessed_is_refused():
    assert check_secret(None) is None
    with pytest.raises(LaunchError, match=r"CLOZE_SECRET: .*16 characters"):
        check_secret("1234")


def flood(connection: socket.socket) -> None:
    """Send without an end, until the other side has had enough."""
    connection.settimeout(SECONDS)
    with contextlib.suppress(ConnectionError):
        while True:
            connection.sendall(b"x" * 65536)


STRANGERS: dict[str, bytes | None] = {
    "nothing": None,
    "a list": b"[]\n",
    "not ascii": "ключ\n".encode() * 20,
    "deep": b"[" * 100_000,
    "its own proof": b"\0\0\0\1" + b"n" * NONCE_BYTES + b"p" * 32,
    "rank 0": b"\0\0\0\0" + b"n" * NONCE_BYTES + b"p" * 32,
    "nearly all": b"x" * (REQUEST_BYTES - 1),
}


def test_strangers_neither_take_part_nor_hold_up_the_ranks():
    server, address = listen(["127.0.0.1"])
    port = server.getsockname()[1]
    assert address == "127.0.0.1"
    assert server.getsockname()[0] == "127.0.0.1"
    strangers = [socket.create_connection((address, port)) for _ in range(3) for _ in STRANGERS]
    for connection, sent in zip(strangers, [*STRANGERS.values()] * 3, strict=True):
        if sent is not None:
            connection.sendall(sent)
    endless = socket.create_connection((address, port))
    accepted, *joined, refused, _ = together(
        lambda: accept_ranks(server, KEY, 4, SECONDS),
        *(lambda rank=rank: join_main([address], port, KEY, rank, 4, SECONDS) for rank in (1, 2, 3)),
        lambda: join_main([address], port, WRONG, 1, 4, 0.2),
        lambda: flood(endless),
    )
    server.close()
    assert sorted(accepted) == [1, 2, 3]
    assert isinstance(refused, OSError)
    for rank, connection in enumerate(joined, 1):
        Link(accepted[rank]).send({"kind": "alive"})
        assert Link(connection).receive() == {"kind": "alive"}
    for connection in (*strangers, endless, *joined, *accepted.values()):
        connection.close()


def test_a_crowd_of_silent_strangers_does_not_keep_a_rank_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cloze.distributed.resilience.joining.MOST_STRANGERS", 3)
    server, address = listen(["127.0.0.1"])
    port = server.getsockname()[1]
    crowd = [socket.create_connection((address, port)) for _ in range(40)]
    accepted, joined = together(
        lambda: accept_ranks(server, KEY, 2, SECONDS), lambda: join_main([address], port, KEY, 1, 2, SECONDS)
    )
    assert sorted(accepted) == [1]
    for connection in (server, joined, *crowd, *accepted.values()):
        connection.close()


def test_ranks_that_do_not_come_are_waited_for_no_longer_than_the_limit():
    server, _ = listen(["127.0.0.1"])
    with server:
        assert accept_ranks(server, KEY, 2, 0.05) == {}


@pytest.mark.parametrize(
    "line", [b"[]\n", b"\xff\n", b"[" * 200_000 + b"\n", b"1" * (1 << 21), b"{}"], ids=lambda line: line[:4]
)
def test_a_message_that_is_none_ends_the_connection_and_nothing_else(line: bytes):
    here, there = socket.socketpair()

    def send() -> None:
        with contextlib.suppress(ConnectionError):
            there.sendall(line)
        there.close()

    sender = threading.Thread(target=send)
    sender.start()
    assert Link(here).receive() is None
    here.shutdown(socket.SHUT_RDWR)
    sender.join()


def test_the_watch_listens_where_the_ranks_meet_and_nowhere_else():
    server, address = listen(["203.0.113.7", "127.0.0.1"])
    with server:
        assert address == "", "neither is this machine's but the loopback, which others cannot reach"
    server, address = listen(resolve("127.0.0.1"))
    with server:
        assert (address, server.getsockname()[0]) == ("127.0.0.1", "127.0.0.1")
    assert resolve("no-such-host.invalid") == []


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a" * 300, "a..b"])
def test_a_name_of_rank_0_that_does_not_resolve_is_one_line(address: str):
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=.* does not know the name") as error:
        rendezvous.check_address(address)
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(LaunchError, match=r"MASTER_PORT=.* is taken"), rendezvous.joining():
            torch.distributed.TCPStore("127.0.0.1", taken.getsockname()[1], None, True, wait_for_workers=False)
