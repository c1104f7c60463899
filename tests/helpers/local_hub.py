"""A small Hugging Face Hub on this machine, for the real client to talk to over HTTP.

It stands in for the real Hub, which tests cannot reach: accounts and their tokens, repositories with branches and
commits, tags, pull requests, datasets; uploads and downloads in LFS mode (weights through a second host name, as on
the real one) and in Xet mode (through hf_xet's own file-based store). It answers the requests that `huggingface_hub`
makes and keeps what is sent, so that a pushed model can be pulled again. Limits it does not imitate: rate limits,
quotas, histories.

The client reads HF_ENDPOINT when it is imported, so it has to run in a process of its own:

    with LocalHub({"hf_write": Account("user"), "hf_read": Account("user", role="read")}) as hub:
        hub.faults.append(Fault("POST", "/commit/", 503, times=2))
        subprocess.run([...], env={"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_write", ...})
        hub.files("user/name")          # {"config.json": b"...", ...}
        hub.log                         # [("GET", "/api/whoami-v2"), ...]
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_requests import Account, Handler, Repo

__all__ = ["Account", "Fault", "LocalHub", "Repo"]


@dataclass
class Fault:
    """What is to go wrong with the next `times` requests of `method` whose path matches `pattern`: answer `status`,
    drop the connection when so many bytes of the body have come, or `call` something and answer as always."""

    method: str
    pattern: str
    status: int = 503
    times: int = 1
    hang_up_after: int | None = None
    call: Callable[[], object] | None = None


class LocalHub:
    """The server: `start` and `stop`, or a context manager. `tokens`: token -> its account."""

    def __init__(self, tokens: dict[str, Account]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.log: list[tuple[str, str]] = []  # (method, path) of every request
        self.received: list[bytes] = []  # the body of every request
        self.faults: list[Fault] = []
        self.xet: Path | None = None  # the folder of the Xet storage; without it there is none
        self.xet_hashes: dict[str, str] = {}  # SHA-256 -> Xet hash of what came through it
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.files_url = f"http://localhost:{self.port}"  # another host name, else the client follows it unasked

    def start(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds: path -> content."""
        found = self.repos[repo]
        return found.commits[found.sha(branch)]

    def requests(self, method: str, pattern: str) -> int:
        """How many requests of `method` matched `pattern`."""
        return sum(asked == method and re.search(pattern, path) is not None for asked, path in self.log)

    def planted(self, method: str, path: str) -> Fault | None:
        """The fault that is due for this request."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None
