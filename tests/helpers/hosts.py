"""Hosts on one machine: each has its own network, name and processes, and a cable that can be cut or made a bad one.

    with Hosts(["a", "b"], tmp_path) as hosts:
        process = hosts["a"].start(["hostname"], stdout=subprocess.PIPE)
        hosts["b"].lengthen(delay=0.005, loss=0.01)
        hosts["b"].cut()
        hosts["b"].bytes_sent()

A host is a process that holds a network, mount, UTS and PID namespace; its end is the end of all that runs in it.
A bridge in one more namespace joins them, so that nothing of it is seen outside. Files are shared, as on NFS.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from repository import HELPERS, ROOT

NETWORK = "10.77.1"
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            return f"no `{tool}` here (Debian: apt-get install {package})"
    if os.geteuid() != 0:
        return "network namespaces need root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Hosts(["probe"], Path(folder)):
                return None
        except subprocess.CalledProcessError as error:
            return f"no network namespaces here: {(error.stderr or '').strip() or error}"


class Host:
    """One host: `name`, `address`, and what can be done to it. Made by `Hosts`."""

    def __init__(self, name: str, address: str, holder: int, hosts: Hosts):
        self.name, self.address, self._holder, self._hosts = name, address, holder, hosts
        self._plug = f"to-{name}"  # what is put into the bridge

    def command(self, words: list[str]) -> list[str]:
        """What starts `words` on this host, from outside."""
        return ["nsenter", f"--target={self._holder}", "--net", "--uts", "--mount", "--pid", "--", *words]

    def start(self, words: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a program on this host, in the repository's root, in a session of its own."""
        inside = self.command(["sh", "-c", 'cd "$0" && exec "$@"', str(ROOT), *words])
        return subprocess.Popen(inside, text=True, start_new_session=True, **options)

    def run(self, *words: str) -> str:
        """Run a program on this host to its end; what it printed. Raises CalledProcessError where it fails."""
        return _run(self.command(list(words)))

    def move_in(self) -> None:
        """Take this process, which has one thread, to this host's network and name; with the addresses of torch's."""
        for kind in ("net", "uts"):
            with open(f"/proc/{self._holder}/ns/{kind}") as namespace:
                if _libc.setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"setns: {kind} of {self.name}")
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"  # this process still reads the /etc/hosts of outside

    def cut(self) -> None:
        """Pull the cable: what is sent gets lost, and nobody is told."""
        self._hosts.at_hub("ip", "link", "set", self._plug, "nomaster")

    def mend(self) -> None:
        """Put the cable back."""
        self._hosts.at_hub("ip", "link", "set", self._plug, "master", "bridge0")

    def lengthen(self, delay: float = 0.0, loss: float = 0.0) -> None:
        """Make its cable a long and bad one: `delay` in seconds each way, `loss` as a share of the frames."""
        near, relay, at_hub = self._plug, f"relay-{self.name}", self._hosts.at_hub
        self.cut()
        self._plug = f"far-{self.name}"
        self.run(sys.executable, str(HELPERS / "whole_frames.py"), "eth0")
        at_hub("ip", "link", "add", self._plug, "type", "veth", "peer", "name", relay)
        for name in (self._plug, relay):
            at_hub(sys.executable, str(HELPERS / "whole_frames.py"), name)
            at_hub("ip", "link", "set", name, "up")
        ends = [near, relay, "--delay", str(delay), "--loss", str(loss)]
        self._hosts.at_hub_from_now_on(sys.executable, str(HELPERS / "slow_cable.py"), *ends)
        self.mend()

    def bytes_sent(self) -> int:
        """Bytes that went out of this host's interface, with headers."""
        return self._counts()[8]

    def bytes_received(self) -> int:
        """Bytes that came in at this host's interface, with headers."""
        return self._counts()[0]

    def _counts(self) -> list[int]:  # not from /sys, which shows the network of whoever mounted it
        return [int(word) for word in self.run("grep", "eth0:", "/proc/net/dev").split(":")[1].split()]


class Hosts:
    """Hosts of these names, from `with` on until its end. `folder` takes their common /etc/hosts."""

    def __init__(self, names: list[str], folder: Path):
        self._names, self._folder = names, folder
        self._processes: list[subprocess.Popen[str]] = []
        self._hosts: dict[str, Host] = {}
        self._hub = 0

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def at_hub(self, *words: str) -> None:
        """Run a program where all cables come together."""
        _run(["nsenter", f"--target={self._hub}", "--net", "--", *words])

    def at_hub_from_now_on(self, *words: str) -> None:
        """Start a program there that prints `ready`, and runs until the end."""
        self._start(["nsenter", f"--target={self._hub}", "--net", "--", *words])

    def remote_shell(self) -> str:
        """A program that is to `launch/multi_node` what ssh is: `PROGRAM HOST COMMAND` runs COMMAND on HOST."""
        program = self._folder / "remote-shell"
        lines = ["#!/bin/sh", "host=$1", "shift", 'case "$host" in']
        lines += [f'{host.name}) exec {" ".join(host.command(["sh", "-c"]))} "$*" ;;' for host in self]
        lines += ["esac", 'echo "remote-shell: no host $host" >&2', "exit 255", ""]
        program.write_text("\n".join(lines))
        program.chmod(0o755)
        return str(program)

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):  # the end of a holder is the end of its namespaces
            process.kill()
            process.wait()

    def _make(self) -> None:
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(self._names, 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        lines += [f"::ffff:{address} {name}" for name, address in addresses.items()]  # torch asks for names in IPv6
        table = self._folder / "etc-hosts"
        table.write_text("\n".join(lines) + "\n")
        self._hub = self._hold("--net")
        self.at_hub("ip", "link", "add", "bridge0", "type", "bridge")
        self.at_hub("ip", "link", "set", "bridge0", "up")
        for name, address in addresses.items():
            holder = self._hold("--net", "--uts", "--mount", "--pid", "--mount-proc")
            host = self._hosts[name] = Host(name, address, holder, self)
            host.run("hostname", name)
            host.run("mount", "--bind", str(table), "/etc/hosts")
            self.at_hub(
                *("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(holder))
            )
            self.at_hub("ip", "link", "set", f"to-{name}", "up")
            host.mend()
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")

    def _hold(self, *namespaces: str) -> int:
        """Start a process that holds these namespaces; its process number, as seen from outside."""
        words = ["unshare", *namespaces, "--fork", "--kill-child=KILL", "sh", "-c", "echo ready; exec sleep infinity"]
        outer = self._start(words).pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def _start(self, words: list[str]) -> subprocess.Popen[str]:
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(words, text=True, start_new_session=True, **quiet)
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "ready\n":
            raise subprocess.CalledProcessError(process.wait(), words, stderr=process.stderr.read())
        return process


def wait_for(condition: Callable[[], bool], seconds: float = 60.0, what: str = "") -> None:
    """Wait until `condition()` is true; fail after so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s {what}"
        time.sleep(0.05)


def _run(words: list[str]) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
