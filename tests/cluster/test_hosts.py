"""The hosts that other tests train on are what they are taken for."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from hosts import Host, Hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

LISTEN = """
import socket
server = socket.create_server(("", 5000), backlog=64)
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    while connection.recv(1 << 20):
        pass
    connection.sendall(b"!")
"""
SEND = """
import socket, sys, time
begin = time.monotonic()
connection = socket.create_connection(("a", 5000), timeout=1)
connected = time.monotonic() - begin
connection.settimeout(30)
connection.sendall(bytes(int(sys.argv[1])))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(1) == b"!"
print(connected)
"""


def send(host: Host, size: int) -> tuple[float, int]:
    """Send so many bytes to host a; the seconds it took to connect, and the bytes at the interface."""
    before = host.bytes_sent()
    return float(host.run("python3", "-c", SEND, str(size))), host.bytes_sent() - before


def test_hosts_have_names_cables_and_counters_of_their_own(tmp_path: Path):
    with Hosts(["a", "b"], tmp_path) as hosts:
        server = hosts["a"].start(["python3", "-c", LISTEN], stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        assert hosts["b"].run("hostname") == "b\n"
        seconds, sent = send(hosts["b"], 10**6)
        assert 10**6 < sent < 1.01 * 10**6
        hosts["b"].cut()
        with pytest.raises(subprocess.CalledProcessError, match="exit status 1"):
            send(hosts["b"], 10)
        hosts["b"].mend()
        send(hosts["b"], 10)
        hosts["b"].lengthen(delay=0.02, loss=0.05)
        seconds, sent = send(hosts["b"], 10**6)
        assert seconds > 0.04
        assert sent > 1.06 * 10**6, "what was lost is sent again, and each frame has headers"
    begin = time.monotonic()
    server.wait(timeout=10)
    assert time.monotonic() - begin < 5, "the end of a host is the end of what runs on it"


def test_the_remote_shell_is_like_ssh(tmp_path: Path):
    with Hosts(["a", "b"], tmp_path) as hosts:
        done = subprocess.run(
            [hosts.remote_shell(), "b", "cd / && hostname; cat; exit 3"], input=b"x", capture_output=True
        )
        assert (done.returncode, done.stdout) == (3, b"b\nx")
        assert subprocess.run([hosts.remote_shell(), "c", "true"], capture_output=True).returncode == 255
