"""A small Hub of datasets on this machine, for the real `datasets` client to stream from over HTTP.

It stands in for the real Hub, which tests cannot reach: dataset repositories with branches, facts, file listings and
downloads with ranges, private repositories with tokens. It imitates no rate limits, no Xet, no dataset viewer.

    with DatasetHub() as hub:
        hub.add("owner/eli5", {"data/train-0.parquet": b"...", "README.md": b"..."}, branch="main")
        subprocess.run([...], env={"HF_ENDPOINT": hub.url, ...})
        hub.log                                     # ["GET /api/datasets/owner/eli5", ...]
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class DatasetHub:
    """The server: a context manager. `tokens`: who may read private repositories."""

    def __init__(self, tokens: tuple[str, ...] = ("hf_read",)):
        self.tokens = tokens
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # name -> branch -> path -> content
        self.private: set[str] = set()
        self.log: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> None:
        """Make a repository, or a branch of it."""
        self.repos.setdefault(name, {})[branch] = files
        if private:
            self.private.add(name)

    def commit(self, name: str, branch: str) -> str:
        """The commit that a branch points to."""
        content = b"".join(path.encode() + data for path, data in sorted(self.repos[name][branch].items()))
        return hashlib.sha1(name.encode() + content).hexdigest()

    def __enter__(self) -> DatasetHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: DatasetHub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        match = re.fullmatch(
            r"(/api)?/datasets/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info|resolve)/(?P<rest>.+))?", path
        )
        if match is None or match["name"] not in self.hub.repos:
            return self._send(401 if match else 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        name, rest = match["name"], match["rest"] or "main"
        allowed = self.headers.get("Authorization", "").removeprefix("Bearer ") in self.hub.tokens
        if name in self.hub.private and not allowed:
            return self._send(401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        branches = self.hub.repos[name]
        commits = {self.hub.commit(name, branch): branch for branch in branches}
        known = sorted([*branches, *commits], key=len, reverse=True)
        revision = next((each for each in known if rest == each or rest.startswith(f"{each}/")), None)
        if revision is None:
            return self._send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        branch = commits.get(revision, revision)
        return self._serve(name, branch, match["what"] or "revision", rest[len(revision) + 1 :], body)

    def _serve(self, name: str, branch: str, what: str, inside: str, body: bytes) -> None:
        files, commit = self.hub.repos[name][branch], self.hub.commit(name, branch)
        if what == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            facts = {"id": name, "sha": commit, "siblings": siblings, "private": name in self.hub.private}
            return self._send(200, facts | {"tags": [], "downloads": 0, "likes": 0})
        if what == "tree":
            return self._send(200, self._tree(inside, files, "recursive=true" in self.path.lower()))
        if what == "paths-info":
            wanted = json.loads(body)["paths"]
            known = {str(entry["path"]): entry for entry in self._tree("", files, recursive=True)}
            return self._send(200, [known[path] for path in wanted if path in known])
        if inside not in files:
            return self._send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        return self._send_file(files[inside], commit)

    def _tree(self, inside: str, files: dict[str, bytes], recursive: bool) -> list[dict[str, object]]:
        """Files and folders in a folder, or everywhere below it."""
        folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
        entries = {path: self._entry(path, files) for path in files}
        entries |= {path: {"type": "directory", "path": path, "oid": "0" * 40} for path in folders}
        below = {path: entry for path, entry in entries.items() if not inside or path.startswith(f"{inside}/")}
        depth = inside.count("/") + 1 if inside else 0
        return [below[path] for path in sorted(below) if recursive or path.count("/") == depth]

    @staticmethod
    def _entry(path: str, files: dict[str, bytes]) -> dict[str, object]:
        oid = hashlib.sha1(files[path]).hexdigest()
        return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}

    def _send_file(self, content: bytes, commit: str) -> None:
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(content)),
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self._send(200, content, headers)
        first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers)

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
