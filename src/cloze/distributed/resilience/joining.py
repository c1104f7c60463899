"""How the ranks' watches find each other: rank 0 listens, the others connect and prove that they belong to the run.

    server = listen(addresses)
    connections = accept_ranks(server, key, world_size, seconds=20)        # rank 0: {rank: socket}
    connection = join_main(addresses, port, key, rank, world_size, seconds=20)

Any other process that connects gets a random number and may send 68 bytes, which are compared before anything is read
from them. No such connection holds up the others: all are waited for at once, under one deadline.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import secrets
import selectors
import socket
import time
from collections.abc import Sequence

from cloze.distributed.secret import NONCE_BYTES, proof

_RANK_BYTES, _PROOF_BYTES = 4, 32
REQUEST_BYTES = _RANK_BYTES + NONCE_BYTES + _PROOF_BYTES
MOST_STRANGERS = 64  # connections beside those of the ranks that are waited for at once
_RETRY_SECONDS = 0.1
_BACKLOG = 1024  # the system may allow fewer; strangers may connect before the first rank is accepted


def resolve(host: str) -> list[str]:
    """Return the addresses of a host as this machine knows them, or none for an unknown name."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)))
    except OSError:
        return []


def listen(addresses: Sequence[str]) -> tuple[socket.socket, str]:
    """Listen at the first of `addresses` that is this machine's; return the server and the address, "" for all of them
    if none is. Addresses of the loopback count if there are no others."""
    outside = [one for one in addresses if not ipaddress.ip_address(one.split("%")[0]).is_loopback]
    for address in outside or addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):
            return socket.create_server((address, 0), family=family, backlog=_BACKLOG), address
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG), ""
    return socket.create_server(("", 0), backlog=_BACKLOG), ""


class _Guest:
    """A connection that has not proved anything yet."""

    def __init__(self, connection: socket.socket):
        self.connection, self.nonce, self.received = connection, secrets.token_bytes(NONCE_BYTES), b""
        connection.setblocking(False)
        connection.send(self.nonce)


def accept_ranks(server: socket.socket, key: bytes, world_size: int, seconds: float) -> dict[int, socket.socket]:
    """Accept the other ranks, which know `key`, for at most `seconds`; return the connections of those who came."""
    end = time.monotonic() + seconds
    found: dict[int, socket.socket] = {}
    guests: dict[socket.socket, _Guest] = {}
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(found) < world_size - 1 and (left := end - time.monotonic()) > 0:
            for event, _ in selector.select(left):
                if event.fileobj is server:
                    _admit(server, selector, guests, world_size + MOST_STRANGERS)
                elif event.fileobj in guests:
                    _hear(guests[event.fileobj], selector, guests, found, key, world_size)  # type: ignore[index]
    for connection in guests:
        connection.close()
    for connection in found.values():
        connection.setblocking(True)
    return found


def _admit(
    server: socket.socket, selector: selectors.BaseSelector, guests: dict[socket.socket, _Guest], most: int
) -> None:
    try:
        guest = _Guest(server.accept()[0])
        guests[guest.connection] = guest
        selector.register(guest.connection, selectors.EVENT_READ)
    except OSError:  # gone again, or no file descriptor is left
        most = 0
    while len(guests) > most:  # the oldest is closed; a rank connects again
        _dismiss(next(iter(guests.values())), selector, guests)


def _dismiss(guest: _Guest, selector: selectors.BaseSelector, guests: dict[socket.socket, _Guest]) -> None:
    del guests[guest.connection]
    selector.unregister(guest.connection)
    guest.connection.close()


def _hear(
    guest: _Guest,
    selector: selectors.BaseSelector,
    guests: dict[socket.socket, _Guest],
    found: dict[int, socket.socket],
    key: bytes,
    world_size: int,
) -> None:
    try:
        data = guest.connection.recv(REQUEST_BYTES - len(guest.received))
        guest.received += data
        if data and len(guest.received) < REQUEST_BYTES:
            return
        rank = _proved_rank(guest, key, world_size)
        if rank is None or rank in found:
            _dismiss(guest, selector, guests)
            return
        nonce = guest.received[_RANK_BYTES : _RANK_BYTES + NONCE_BYTES]
        guest.connection.send(proof(key, "watch main", rank, world_size, guest.nonce, nonce))
    except OSError:
        _dismiss(guest, selector, guests)
        return
    del guests[guest.connection]
    selector.unregister(guest.connection)
    found[rank] = guest.connection


def _proved_rank(guest: _Guest, key: bytes, world_size: int) -> int | None:
    if len(guest.received) != REQUEST_BYTES:
        return None
    rank = int.from_bytes(guest.received[:_RANK_BYTES], "big")
    nonce, given = guest.received[_RANK_BYTES:-_PROOF_BYTES], guest.received[-_PROOF_BYTES:]
    expected = proof(key, "watch rank", rank, world_size, guest.nonce, nonce)
    return rank if 0 < rank < world_size and hmac.compare_digest(given, expected) else None


def join_main(
    addresses: Sequence[str], port: int, key: bytes, rank: int, world_size: int, seconds: float
) -> socket.socket:
    """Connect to rank 0 at one of `addresses`, and return the connection once both sides have proved that they know
    `key`. Raises OSError if no process proves it within `seconds`."""
    end = time.monotonic() + seconds
    problem: OSError = TimeoutError("no address")
    while (left := end - time.monotonic()) > 0:
        for address in addresses:
            try:
                return _join_once(address, port, key, rank, world_size, end)
            except OSError as error:
                problem = error
        time.sleep(min(_RETRY_SECONDS, left))
    raise problem


def _join_once(address: str, port: int, key: bytes, rank: int, world_size: int, end: float) -> socket.socket:
    connection = socket.create_connection((address, port), max(0.1, end - time.monotonic()))
    try:
        main, own = _read(connection, NONCE_BYTES, end), secrets.token_bytes(NONCE_BYTES)
        connection.sendall(
            rank.to_bytes(_RANK_BYTES, "big") + own + proof(key, "watch rank", rank, world_size, main, own)
        )
        answer = _read(connection, _PROOF_BYTES, end)
        if not hmac.compare_digest(answer, proof(key, "watch main", rank, world_size, main, own)):
            raise ConnectionRefusedError("what listens there is not rank 0 of this run")
        connection.settimeout(None)
        return connection
    except BaseException:
        connection.close()
        raise


def _read(connection: socket.socket, length: int, end: float) -> bytes:
    """Read exactly `length` bytes before `end`."""
    received = b""
    while len(received) < length:
        connection.settimeout(max(0.01, end - time.monotonic()))
        data = connection.recv(length - len(received))
        if not data:
            raise ConnectionAbortedError("the connection was closed")
        received += data
    return received
