"""How the Hub of the tests (local_hub.py) answers each request of the real client, in LFS mode and in Xet mode.

What it keeps is in the `LocalHub` it belongs to; ROUTES at the end lists what it understands.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from xet_store import read_content

if TYPE_CHECKING:
    from local_hub import LocalHub


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to, and what it may do: `role` is "read", "write" or "fineGrained" (then `scopes` says
    what: entity -> permissions), `orgs` are further owners."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()
    scopes: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def may_write(self, repo: str) -> bool:
        """Whether the token may commit to a repository, or make it."""
        if self.role == "fineGrained":
            held = dict(self.scopes)
            return any("repo.write" in held.get(entity, ()) for entity in (owner_of(repo), repo))
        return self.role == "write" and owner_of(repo) in (self.name, *self.orgs)


@dataclass
class Repo:
    """A repository: commit -> {path: content}, and the commit each branch stands at."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[tuple[str, str]] = field(default_factory=list)  # (title, author)

    def sha(self, revision: str) -> str:
        """The commit of a branch, or the commit itself."""
        return self.branches.get(revision) or self.tags.get(revision, revision)

    def card_data(self, sha: str) -> dict[str, Any] | None:
        """The metadata of the card."""
        found = re.match(r"---\n(.*?)\n---", self.commits[sha].get("README.md", b"").decode(), re.DOTALL)
        return yaml.safe_load(found[1]) if found else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Put `files` on a branch; return the new commit."""
        seed = repr((branch, len(self.commits), [(path, git_oid(content)) for path, content in sorted(files.items())]))
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


def git_oid(content: bytes) -> str:
    """The name git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_lfs(path: str) -> bool:
    """Whether the Hub keeps a file in LFS."""
    return path.endswith((".safetensors", ".bin", ".arrow"))


def owner_of(repo: str) -> str:
    """The owner in `owner/name` or `datasets/owner/name`."""
    return repo.split("/")[-2]


class _Refused(Exception):
    """An answer that ends the request: status, error code of the Hub, message."""


class Handler(BaseHTTPRequestHandler):
    """One request; a subclass of it carries the Hub in `hub`."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps({} if value is None else value).encode()
        self.send_response(status)
        for name, content in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        """Read the request, keep it, and hand it to its route unless a fault is due."""
        path = re.sub("^/api/datasets/", "/api/models/datasets/", urlsplit(self.path).path)
        fault = self.hub.planted(self.command, unquote(path))
        if fault and fault.hang_up_after is not None:
            return self._hang_up(unquote(path), fault.hang_up_after)
        body = self._read_body()
        self.hub.log.append((self.command, unquote(path)))
        self.hub.received.append(body)
        if fault and fault.call is not None:
            fault.call()
        elif fault:
            return self.answer(fault.status, {"error": "planted fault"})
        for methods, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                try:
                    return getattr(self, name)(
                        body, **{key: unquote(text) for key, text in match.groupdict().items() if text is not None}
                    )
                except _Refused as refused:
                    status, code, message = refused.args
                    return self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})
        return self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _hang_up(self, path: str, num_bytes: int) -> None:
        """Read the beginning of what is sent, then drop the connection."""
        self.hub.log.append((self.command, path))
        self.rfile.read(num_bytes)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def account(self) -> Account:
        """The account of the request's token; 401 where there is none."""
        account = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if account is None:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return account

    def writable(self, repo: str) -> Repo:
        """A repository that the request's token may write; 403 where it may not, 404 where there is none."""
        self.check_rights(repo)
        return self.visible(repo)

    def check_rights(self, repo: str) -> None:
        if not self.account().may_write(repo):
            raise _Refused(403, "", "you have no write access to this namespace")

    def visible(self, repo: str, rev: str = "main") -> Repo:
        """A repository that the request's token may read and that has this revision; 404 else."""
        found = self.hub.repos.get(repo)
        reader = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        owners = (reader.name, *reader.orgs) if reader else ()
        if found is None or (found.private and owner_of(repo) not in owners):
            raise _Refused(404, "RepoNotFound", "Repository not found")
        if found.sha(rev) not in found.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return found

    def whoami(self, body: bytes) -> None:
        account = self.account()
        token: dict[str, Any] = {"role": account.role, "displayName": "test"}
        if account.role == "fineGrained":
            scoped = [{"entity": {"name": name}, "permissions": list(held)} for name, held in account.scopes]
            token["fineGrained"] = {"global": [], "scoped": scoped}
        auth = {"type": "access_token", "accessToken": token}
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.orgs]
        self.answer(200, {"type": "user", "name": account.name, "auth": auth, "orgs": orgs})

    def create(self, body: bytes) -> None:
        account, wanted = self.account(), json.loads(body)
        owner = wanted.get("organization") or account.name
        name = ("datasets/" if wanted.get("type") == "dataset" else "") + f"{owner}/{wanted['name']}"
        self.check_rights(name)
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", **url})
        self.hub.repos[name] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.answer(200, {"name": name, "id": "1", **url})

    def validate_yaml(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, repo: str, rev: str) -> None:
        found = self.writable(repo)
        if rev in found.branches:
            raise _Refused(409, "", "Reference already exists")
        found.branches[rev] = found.branches["main"]
        self.answer(200)

    def _open_for(self, repo: str, rev: str) -> Repo:
        """A repository to commit to; for a pull request, any that can be seen."""
        if self._wants_pr() or rev.startswith("refs/pr/"):
            self.account()
        else:
            self.check_rights(repo)
        return self.visible(repo, rev)

    def _wants_pr(self) -> bool:
        return parse_qs(urlsplit(self.path).query).get("create_pr", ["0"])[0] in ("1", "true", "True")

    def tag(self, body: bytes, repo: str, rev: str) -> None:
        found, name = self.writable(repo), json.loads(body)["tag"]
        if name in found.tags:
            raise _Refused(409, "", "Tag already exists")
        found.tags[name] = found.sha(rev)
        self.answer(200)

    def discussions(self, body: bytes, repo: str) -> None:
        facts = {"createdAt": "2026-01-01T00:00:00.000Z", "status": "open", "isPullRequest": True}
        facts |= {"repo": {"name": repo.removeprefix("datasets/"), "type": "model"}}
        listed = [
            {"title": title, "num": number, "author": {"name": author}, **facts}
            for number, (title, author) in enumerate(self.visible(repo).pull_requests, 1)
        ]
        self.answer(200, {"discussions": listed, "count": len(listed), "start": 0})

    def xet_token(self, body: bytes, repo: str, rev: str, right: str) -> None:
        if self.hub.xet is None:
            raise _Refused(404, "", "no Xet storage here")
        if right == "write" and not self._wants_pr():
            self.check_rights(repo)
        facts = {"casUrl": f"local://{self.hub.xet}", "accessToken": "xet", "exp": int(time.time()) + 3600}
        names = {"X-Xet-Cas-Url": "casUrl", "X-Xet-Access-Token": "accessToken", "X-Xet-Token-Expiration": "exp"}
        self.answer(200, facts, {header: str(facts[name]) for header, name in names.items()})

    def preupload(self, body: bytes, repo: str, rev: str) -> None:
        found = self._open_for(repo, rev)
        held, files = found.commits[found.sha(rev)], []
        for path in (file["path"] for file in json.loads(body)["files"]):
            entry = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            if path in held:
                entry["oid"] = sha256(held[path]) if is_lfs(path) else git_oid(held[path])
            files.append(entry)
        self.answer(200, {"files": files, "commitOid": found.sha(rev)})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self.account()
        self.visible(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.files_url}/lfs/{wanted['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            raise _Refused(400, "", "the content is not what its name says")
        self.hub.blobs[oid] = body
        self.answer(200)

    def lfs_verify(self, body: bytes, repo: str) -> None:
        self.answer(200 if json.loads(body)["oid"] in self.hub.blobs else 404)

    def commit(self, body: bytes, repo: str, rev: str) -> None:
        found = self._open_for(repo, rev)
        with self.hub.lock:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = dict(found.commits[found.sha(rev)])
            opened: dict[str, Any] = {}
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header" and value.get("parentCommit", found.sha(rev)) != found.sha(rev):
                    raise _Refused(412, "", "A commit has happened since")
                if key == "header" and self._wants_pr():
                    found.pull_requests.append((value["summary"], self.account().name))
                    rev = f"refs/pr/{len(found.pull_requests)}"
                    opened = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{len(found.pull_requests)}"}
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self._uploaded(value["oid"])
                elif key == "deletedFile":
                    del files[value["path"]]
            sha = found.commit(rev, files)
        self.answer(
            200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True, **opened}
        )

    def _uploaded(self, oid: str) -> bytes:
        """What was uploaded under a SHA-256, by LFS or by Xet."""
        if oid not in self.hub.blobs and self.hub.xet is not None:
            xet_hash, content = read_content(self.hub.xet, oid)
            if sha256(content) != oid:
                raise _Refused(400, "", "the content is not what its name says")
            self.hub.blobs[oid], self.hub.xet_hashes[oid] = content, xet_hash
        if oid not in self.hub.blobs:
            raise _Refused(400, "", f"{oid} was not uploaded")
        return self.hub.blobs[oid]

    def refs(self, body: bytes, repo: str) -> None:
        found = self.visible(repo)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in found.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in found.tags.items()]
        self.answer(200, {"branches": branches, "tags": tags, "converts": []})

    def info(self, body: bytes, repo: str, rev: str = "main") -> None:
        found = self.visible(repo, rev)
        sha = found.sha(rev)
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        name = repo.removeprefix("datasets/")
        facts = {"sha": sha, "private": found.private, "siblings": siblings, "cardData": found.card_data(sha)}
        self.answer(200, {"id": name, "modelId": name, "tags": [], "downloads": 0, "likes": 0, **facts})

    def tree(self, body: bytes, repo: str, rev: str, inside: str | None = None) -> None:
        """Files and folders in a folder, or everywhere below it."""
        entries, folder = self._entries(repo, rev), inside or ""
        below = [path for path in sorted(entries) if not folder or path.startswith(f"{folder}/")]
        depth = folder.count("/") + 1 if folder else 0
        recursive = "recursive=true" in self.path.lower()
        self.answer(200, [entries[path] for path in below if recursive or path.count("/") == depth])

    def paths_info(self, body: bytes, repo: str, rev: str) -> None:
        entries, text = self._entries(repo, rev), body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        self.answer(200, [entries[path] for path in wanted if path in entries])

    def _entries(self, repo: str, rev: str) -> dict[str, dict[str, Any]]:
        found = self.visible(repo, rev)
        entries: dict[str, dict[str, Any]] = {}
        for path, content in found.commits[found.sha(rev)].items():
            for depth in range(1, path.count("/") + 1):
                folder = "/".join(path.split("/")[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40}
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if is_lfs(path):
                entries[path]["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return entries

    def resolve(self, body: bytes, repo: str, rev: str, path: str) -> None:
        found = self.visible(repo, rev)
        content = found.commits[found.sha(rev)].get(path)
        if content is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": found.sha(rev)}
        if not is_lfs(path):
            return self.answer(200, content, headers | {"ETag": f'"{git_oid(content)}"'})
        digest = sha256(content)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
        if digest in self.hub.xet_hashes:
            route = f"{self.hub.url}/api/models/{repo}/xet-read-token/{found.sha(rev)}"
            headers |= {"X-Xet-Hash": self.hub.xet_hashes[digest], "X-Xet-Refresh-Route": route}
        self.answer(302, b"", headers | {"Location": f"{self.hub.files_url}/lfs/{digest}"})

    def lfs_download(self, body: bytes, oid: str) -> None:
        self.answer(200, self.hub.blobs[oid], {"ETag": f'"{oid}"'})


_REPO, _REV = r"(?P<repo>(?:datasets/)?[\w.-]+/[\w.-]+)", r"(?P<rev>[\w.%-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", f"/api/models/{_REPO}/branch/{_REV}", "branch"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", "preupload"),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_upload"),
    ("POST", f"/{_REPO}.git/info/lfs/verify", "lfs_verify"),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", "commit"),
    ("POST", f"/api/models/{_REPO}/tag/{_REV}", "tag"),
    ("GET", f"/api/models/{_REPO}/discussions", "discussions"),
    ("GET", rf"/api/models/{_REPO}/xet-(?P<right>read|write)-token/{_REV}", "xet_token"),
    ("GET", f"/api/models/{_REPO}/refs", "refs"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", "info"),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}(?:/(?P<inside>.+))?", "tree"),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REV}", "paths_info"),
    ("GET|HEAD", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    ("GET|HEAD", r"/lfs/(?P<oid>\w+)", "lfs_download"),
)
