"""A small Hub on this machine: the part of the Hub's protocol that its own client speaks when models come and go.

Model info with sizes, trees, files with ETag, X-Repo-Commit and ranges, repositories, branches, uploads by the LFS
batch interface, commits. It listens on a port that the system chooses, and remembers what was asked of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_of_the_tests"
Files = dict[str, bytes]


@dataclass
class Repo:
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, ref: str = "main", message: str = "") -> str:
        """A new commit with all of these files -> its hash."""
        told = repr((len(self.commits), sorted((name, _oid(data)) for name, data in files.items())))
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.messages.append(message)
        return sha


@dataclass
class Hub:
    """The server's state. `asked` holds (method, path, Range) of every request. `cut` breaks the connection once after
    so many bytes of the files that it names, `broken` answers them with 500.
    """

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    objects: Files = field(default_factory=dict)

    def add(self, repo: str, folder: Path, ref: str = "main") -> str:
        """A folder's files as a new commit of a repository -> its hash."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repos.setdefault(repo, Repo()).commit(files, ref)

    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for, in order."""
        place = r"/[^/]+/[^/]+/resolve/[^/]+/(.+)"
        found = [re.fullmatch(place, path) for verb, path, _ in self.asked if verb == "GET"]
        return [match[1] for match in found if match]


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append((self.command, path, self.headers.get("Range")))
        try:
            for pattern, method in _ROUTES:
                if found := re.fullmatch(pattern, path):
                    getattr(self, method)(**found.groupdict())
                    return
            raise _Refused(404, "EntryNotFound", f"no route {path}")
        except _Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._send(error.status, b"", {name: value for name, value in headers.items() if value})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, body: Any) -> None:
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    # ---- reading ---------------------------------------------------------------------------------------

    def _repo(self, repo: str) -> Repo:
        found = self.state.repos.get(repo)
        if found is None or (found.private and not self._trusted()):
            raise _Refused(401 if not self._trusted() else 404, "RepoNotFound", "Repository not found")
        return found

    def _trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _at(self, repo: str, revision: str | None) -> tuple[str, Files]:
        found = self._repo(repo)
        sha = found.refs.get(revision or "main", revision or "")
        if sha not in found.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, found.commits[sha]

    def info(self, repo: str, revision: str | None = None) -> None:
        sha, files = self._at(repo, revision)
        siblings = [{"rfilename": name, "size": len(data), "blobId": _oid(data)} for name, data in files.items()]
        self._json({"_id": sha[:24], "id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str) -> None:
        _, files = self._at(repo, revision)
        self._json([{"type": "file", "path": n, "size": len(data), "oid": _oid(data)} for n, data in files.items()])

    def resolve(self, repo: str, revision: str, name: str) -> None:
        sha, files = self._at(repo, revision)
        if self._repo(repo).gated and not self._trusted():
            raise _Refused(401, "GatedRepo", "Access to this model is restricted")
        if name not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        if name in self.state.broken:
            raise _Refused(500, "", "out of order")
        data, start, end = files[name], 0, len(files[name])
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(asked[1]), min(end, int(asked[2]) + 1 if asked[2] else end)
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        body = data[start:end]
        if self.command == "GET":
            cut = self.state.cut.pop(name, None)
            if cut is not None and cut < len(body):
                self._break_off(206 if asked else 200, body, cut, headers)
                return
        self._send(206 if asked else 200, body, headers)

    def _break_off(self, status: int, body: bytes, cut: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()
        self.close_connection = True

    # ---- writing ---------------------------------------------------------------------------------------

    def _writable(self, repo: str | None = None) -> Any:
        if not self._trusted():
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        if repo is not None:
            self._repo(repo)
        return json.loads(self.body) if self.body and self.body.count(b"\n") == 0 else None

    def create(self) -> None:
        body = self._writable()
        name = f"{body['organization']}/{body['name']}"
        if body["organization"] != "user":
            raise _Refused(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.state.repos:
            self._send(409, json.dumps({"url": f"{self.state.endpoint}/{name}"}).encode())
            return
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.state.repos[name] = Repo(private=private)
        self.state.repos[name].commit({".gitattributes": b""})
        self._json({"url": f"{self.state.endpoint}/{name}", "name": name})

    def branch(self, repo: str, name: str) -> None:
        self._writable(repo)
        refs = self._repo(repo).refs
        if name in refs:
            raise _Refused(409, "", "Reference already exists")
        refs[name] = refs["main"]
        self._json({})

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = self._writable(repo)["files"]
        large = (".safetensors", ".gz")
        told = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(large) else "regular",
                "shouldIgnore": False,
            }
            for one in files
        ]
        self._json({"files": told})

    def batch(self, repo: str) -> None:
        objects = self._writable(repo)["objects"]
        at = f"{self.state.endpoint}/lfs"
        actions = [
            one if one["oid"] in self.state.objects else {**one, "actions": {
                "upload": {"href": f"{at}/{one['oid']}"}, "verify": {"href": f"{at}/verify"},
            }}
            for one in objects
        ]  # fmt: skip
        self._json({"transfer": "basic", "objects": actions})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "", "another content than its name says")
        self.state.objects[oid] = self.body
        self._send(200, b"")

    def verify(self) -> None:
        one = json.loads(self.body)
        if len(self.state.objects.get(one["oid"], b"")) != one["size"]:
            raise _Refused(404, "", "not here")
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        self._writable(repo)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        files = dict(self._at(repo, revision)[1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.state.objects[value["oid"]]
        sha = self._repo(repo).commit(files, revision, lines[0]["value"]["summary"])
        url = f"{self.state.endpoint}/{repo}/commit/{sha}"
        self._json({"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (rf"/api/models/{_REPO}", "info"),
    (rf"/api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    (rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", "tree"),
    (rf"/api/models/{_REPO}/branch/(?P<name>.+)", "branch"),
    (rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    (rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"/lfs/verify", "verify"),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
)


def _oid(data: bytes) -> str:
    """A git blob's name."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
