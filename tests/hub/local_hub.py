"""A small Hugging Face Hub on this machine, for the real client to talk to over HTTP.

It stands in for the real Hub, which tests cannot reach: accounts with tokens, repositories with branches, commits, LFS
uploads, downloads. What is asked of it is kept in `log`, and faults can be planted.

    with LocalHub({"hf_write": {"name": "user", "role": "write"}}) as hub:
        subprocess.run([...], env={"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", ...})
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """Answer `status` to the next `times` requests of `method` whose path matches `pattern`."""

    method: str
    pattern: str
    status: int
    times: int = 1


@dataclass
class Repo:
    """A repository: branch -> {path: content}, and the commits of each branch."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, list[str]] = field(default_factory=lambda: {"main": ["0" * 40]})


class LocalHub:
    """The server; a context manager. `tokens`: token -> {"name": owner, "role": "read" or "write"}."""

    def __init__(self, tokens: dict[str, dict[str, str]]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.received: list[bytes] = []
        self.faults: list[Fault] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.files_url = f"http://localhost:{self.port}"  # another host name, as the real Hub's storage has

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        return self.repos[repo].branches[branch]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, content in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        """Find the route; check faults and rights first."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        self.hub.log.append((self.command, path))
        self.hub.received.append(body)
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.pattern, path):
                fault.times -= 1
                return self.answer(fault.status, {"error": "planted fault"})
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                return getattr(self, name)(body, **match.groupdict())
        return self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def account(self, write: bool = False) -> dict[str, str] | None:
        """The account of the request's token; answers 401 or 403 itself and gives None where it may not."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        account = self.hub.tokens.get(token)
        if account is None:
            self.answer(401, {"error": "Invalid credentials"})
        elif write and account["role"] != "write":
            self.answer(403, {"error": "the token has no write access"})
        else:
            return account
        return None

    def whoami(self, body: bytes) -> None:
        if account := self.account():
            auth = {"accessToken": {"role": account["role"], "displayName": "test"}}
            self.answer(200, {"name": account["name"], "type": "user", "auth": auth, "orgs": []})

    def create(self, body: bytes) -> None:
        if not (account := self.account(write=True)):
            return
        wanted = json.loads(body)
        owner = wanted.get("organization") or account["name"]
        name = f"{owner}/{wanted['name']}"
        if owner != account["name"]:
            return self.answer(403, {"error": "not your namespace"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, Repo(private))
        self.answer(status, {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def validate_yaml(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, rev: str) -> None:
        if not self.account(write=True):
            return
        held = self.hub.repos[repo].branches[rev]
        files = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(".safetensors")
            old = held.get(file["path"])
            oid = None
            if old is not None:
                header = b"blob %d\0" % len(old)
                oid = hashlib.sha256(old).hexdigest() if lfs else hashlib.sha1(header + old).hexdigest()
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files, "commitOid": self.hub.repos[repo].commits[rev][-1]})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        if not self.account(write=True):
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.files_url}/upload/{wanted['oid']}"}
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "checksum"})
        self.hub.blobs[oid] = body
        self.answer(200)

    def verify(self, body: bytes, repo: str) -> None:
        known = json.loads(body)["oid"] in self.hub.blobs
        self.answer(200 if known else 404)

    def commit(self, body: bytes, repo: str, rev: str) -> None:
        if not self.account(write=True):
            return
        target = self.hub.repos[repo]
        files = dict(target.branches[rev])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = hashlib.sha1(repr((rev, len(target.commits[rev]), sorted(files))).encode()).hexdigest()
        target.branches[rev] = target.branches[sha] = files
        target.commits[rev].append(sha)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def branch(self, body: bytes, repo: str, rev: str) -> None:
        if not self.account(write=True):
            return
        target = self.hub.repos[repo]
        if rev in target.branches:
            return self.answer(409, {"error": "Reference already exists"}, {"X-Error-Code": "BranchExists"})
        target.branches[rev] = dict(target.branches["main"])
        target.commits[rev] = list(target.commits["main"])
        self.answer(200)

    def visible(self, repo: str, rev: str) -> Repo | None:
        """The repository if it is there and its reader may see it; answers itself otherwise."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self.headers.get("Authorization")):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rev not in found.branches:
            self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return found
        return None

    def info(self, body: bytes, repo: str, rev: str = "main") -> None:
        if found := self.visible(repo, rev):
            siblings = [{"rfilename": path} for path in found.branches[rev]]
            sha = found.commits[rev][-1] if rev in found.commits else rev
            self.answer(200, {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings})

    def tree(self, body: bytes, repo: str, rev: str) -> None:
        if found := self.visible(repo, rev):
            entries = []
            for path, content in sorted(found.branches[rev].items()):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                if path.endswith(".safetensors"):
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                entries.append(entry)
            self.answer(200, entries)

    def resolve(self, body: bytes, repo: str, rev: str, path: str) -> None:
        found = self.visible(repo, rev)
        if found is None:
            return
        content = found.branches[rev].get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(content).hexdigest()
        sha = found.commits[rev][-1] if rev in found.commits else rev
        headers = {"X-Repo-Commit": sha, "ETag": f'"{digest}"'}
        if path.endswith(".safetensors"):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            headers["Location"] = f"{self.hub.files_url}/blob/{digest}"
            self.hub.blobs[digest] = content
            return self.answer(302, b"", headers)
        self.answer(200, content, headers)

    def blob(self, body: bytes, oid: str) -> None:
        self.answer(200, self.hub.blobs[oid])


_REPO, _REV = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<rev>[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", "preupload"),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", f"/{_REPO}.git/info/lfs/verify", "verify"),
    ("PUT", r"/upload/(?P<oid>\w+)", "upload"),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", "commit"),
    ("POST", f"/api/models/{_REPO}/branch/{_REV}", "branch"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", "info"),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}", "tree"),
    ("GET|HEAD", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    ("GET|HEAD", r"/blob/(?P<oid>\w+)", "blob"),
)
