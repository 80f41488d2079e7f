"""A fake of the Hugging Face Hub, on loopback; the client that talks to it is the real one.

Repositories are in memory, and faults happen by plan. Standard library only. It answers what
`huggingface_hub`, `transformers`, `peft` and `datasets` ask for over plain http; large files go by LFS (`HF_HUB_DISABLE_XET=1`)."""

import atexit
import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet", ".model")
_KEY = "LOOP_TESTS_HUB_" + os.environ.get("PYTEST_XDIST_WORKER", "")
if (
    _KEY not in os.environ
):  # what a worker of pytest starts has its port, the worker has one of its own
    _held = socket.socket()  # bound, so that nobody else is given its port, and never listened on
    _held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _held.bind(("127.0.0.1", 0))
    os.environ[_KEY] = str(_held.getsockname()[1])
    atexit.register(_held.close)
HUB_URL = f"http://127.0.0.1:{os.environ[_KEY]}"
"""The Hub of every test of this worker: libraries read their endpoint once, when they are
imported."""
Reply = tuple[int, dict[str, str], bytes]


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(
        self,
        status: int,
        code: str = "",
        message: str = "",
        body: bytes | None = None,
        **headers: str,
    ) -> None:
        super().__init__(status, code, message)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        told = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply = (
            status,
            {**{n: v for n, v in told.items() if v}, **headers},
            body if body is not None else json.dumps({"error": message}).encode(),
        )


@dataclass
class Fault:
    """What happens to the next `times` requests of a kind instead of, or after, an answer."""

    method: str
    path: str  # a regular expression, searched in the path
    times: int = 1
    status: int = 0  # answer this, and do nothing
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    drop: int | None = (
        None  # close the connection after so many bytes of the request's body, and do nothing
    )
    lose: bool = False  # do it, then close the connection in the place of the answer
    delay: float = 0.0  # seconds before it is done
    body: bytes | None = None  # answer this, with the status or 200, and do nothing
    spoil: bool = False  # answer with one byte of the body changed
    cut: int | None = None  # answer with only so many bytes of the body, then close
    act: Callable[[], object] | None = None  # done before it is
    after: Callable[[], object] | None = None  # done behind it, before the answer


@dataclass
class Repository:
    """Its states by commit, each a whole tree; branches, tags and pull requests are names of
    them."""

    private: bool = False
    gated: bool = False
    disabled: bool = False
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    requests: dict[int, tuple[str, str]] = field(default_factory=dict)  # number -> (author, commit)

    def add(self, files: dict[str, bytes], branch: str = "main", parent: str | None = None) -> str:
        """One commit more; an empty branch name leaves it without one."""
        seed = f"{parent}{len(self.trees)}{sorted((name, _sha256(c)) for name, c in files.items())}"
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.trees[commit], self.parents[commit] = files, parent
        if branch:
            self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str:
        """Raises: Refused."""
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        if pull and int(pull[1]) in self.requests:
            return self.requests[int(pull[1])][1]
        found = self.branches.get(revision) or self.tags.get(revision)
        if found is None and revision not in self.trees:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found or revision

    @property
    def files(self) -> dict[str, bytes]:
        """Of main."""
        return self.trees[self.branches["main"]]

    @property
    def commits(self) -> int:
        return len(self.trees)


class Hub(ThreadingHTTPServer):
    """Users by token, repositories by kind and id, every request that came, and the faults that are
    still to come."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", int(os.environ[_KEY])), _Answer)
        self.users: dict[str, dict[str, Any]] = {}
        self.models: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[
            tuple[str, str, str | None]
        ] = []  # method, path with query, Authorization
        self.faults: list[Fault] = []

    def asked(self, method: str, path: str) -> int:
        """How many such requests came."""
        return sum(1 for m, p, _ in self.requests if m == method and re.search(path, p))

    def put_model(self, name: str, folder: Path, **how: bool) -> Repository:
        self.models[name] = Repository(**how)
        self.models[name].add(
            {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        )
        return self.models[name]

    def put_dataset(self, name: str, files: dict[str, bytes]) -> Repository:
        self.datasets[name] = Repository()
        self.datasets[name].add(files)
        return self.datasets[name]

    # What it answers. `user` is None for who gave no token.

    def answer(
        self, method: str, path: str, query: dict[str, list[str]], body: bytes, token: str | None
    ) -> Reply:
        """Raises: Refused."""
        user = None if token is None else self.users.get(token)
        if token is not None and user is None and not path.startswith("/lfs/"):
            raise Refused(401, "", "Invalid username or password.")
        for kind, routes in (("GET", _GETS), ("POST", _POSTS), ("PUT", _PUTS)):
            for pattern, name in routes.items() if kind == method else ():
                match = re.fullmatch(pattern, path)
                if match:
                    given = {
                        key: unquote(value) for key, value in match.groupdict(default="").items()
                    }
                    reply: Reply = getattr(self, name)(user=user, query=query, body=body, **given)
                    return reply
        raise Refused(404, "", f"nothing at {method} {path}")

    def find(self, kind: str, name: str, user: dict[str, Any] | None) -> Repository:
        repository = (self.models if kind == "models" else self.datasets).get(name)
        if repository is None or (repository.private and not (user and may_write(user, name))):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def whoami(self, user: dict[str, Any] | None, **_: Any) -> Reply:
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        return _json(
            {
                "name": user["name"],
                "type": "user",
                "orgs": [],
                "auth": {"accessToken": {"role": user["role"]}},
            }
        )

    def create(self, user: dict[str, Any] | None, body: bytes, **_: Any) -> Reply:
        asked = json.loads(body)
        owner = asked.get("organization") or (user or {}).get("name")
        name = f"{owner}/{asked['name']}"
        if user is None or user["role"] == "read" or not may_write(user, name):
            raise Refused(
                403,
                "",
                f"You don't have the rights to create a model under the namespace {owner!r}.",
            )
        if name in self.models:
            return (
                409,
                {},
                json.dumps(
                    {"error": "You already created this model repo", "url": f"{HUB_URL}/{name}"}
                ).encode(),
            )
        self.models[name] = Repository(private=asked.get("visibility") == "private")
        self.models[name].add(
            {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        return _json({"url": f"{HUB_URL}/{name}"})

    def info(
        self, user: dict[str, Any] | None, kind: str, name: str, revision: str, **_: Any
    ) -> Reply:
        repository = self.find(kind, name, user)
        commit = repository.resolve(revision or "main")
        about = {
            "id": name,
            "sha": commit,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
        }
        siblings = [
            {"rfilename": path, **_blob(path, content)}
            for path, content in repository.trees[commit].items()
        ]
        about |= {"disabled": repository.disabled, "siblings": siblings, "tags": [], "downloads": 0}
        about |= {
            "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": "2026-01-01T00:00:00.000Z",
        }
        return _json(about)

    def tree(
        self,
        user: dict[str, Any] | None,
        kind: str,
        name: str,
        revision: str,
        folder: str,
        **_: Any,
    ) -> Reply:
        repository = self.find(kind, name, user)
        files = repository.trees[repository.resolve(revision)]
        inside = {
            path: content
            for path, content in files.items()
            if not folder or path.startswith(folder + "/")
        }
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        return _json([_entry(path, content) for path, content in inside.items()])

    def paths_info(
        self,
        user: dict[str, Any] | None,
        kind: str,
        name: str,
        revision: str,
        body: bytes,
        **_: Any,
    ) -> Reply:
        repository = self.find(kind, name, user)
        files = repository.trees[repository.resolve(revision)]
        asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        return _json([_entry(path, files[path]) for path in asked if path in files])

    def refs(self, user: dict[str, Any] | None, kind: str, name: str, **_: Any) -> Reply:
        repository = self.find(kind, name, user)
        named = {
            "branches": ("refs/heads/", repository.branches),
            "tags": ("refs/tags/", repository.tags),
        }
        listed = {
            what: [
                {"name": ref, "ref": prefix + ref, "targetCommit": commit}
                for ref, commit in refs.items()
            ]
            for what, (prefix, refs) in named.items()
        }
        return _json({**listed, "converts": [], "pullRequests": []})

    def discussions(
        self, user: dict[str, Any] | None, name: str, query: dict[str, list[str]], **_: Any
    ) -> Reply:
        repository = self.find("models", name, user)
        found = [
            {
                "num": number, "title": "", "author": {"name": author}, "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open", "repo": {"name": name, "type": "model"}, "isPullRequest": True,
            }
            for number, (author, _) in repository.requests.items()
            if author == query.get("author", [author])[0]
        ]  # fmt: skip
        return _json({"count": len(found), "start": 0, "discussions": found})

    def resolve(
        self, user: dict[str, Any] | None, kind: str, name: str, revision: str, path: str, **_: Any
    ) -> Reply:
        repository = self.find("datasets" if kind else "models", name, user)
        if repository.gated:
            raise Refused(401, "GatedRepo", "Access is restricted")
        commit = repository.resolve(revision)
        if path not in repository.trees[commit]:
            raise Refused(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        content = repository.trees[commit][path]
        large = path.endswith(LARGE)
        etag = _sha256(content) if large else _git_oid(content)
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'} if large else {}
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, **linked}, content

    def validate_yaml(self, body: bytes, **_: Any) -> Reply:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return (
                400,
                {},
                json.dumps({"errors": [{"message": "no metadata"}], "warnings": []}).encode(),
            )
        return _json({"errors": [], "warnings": []})

    def _writable(
        self, user: dict[str, Any] | None, name: str, query: dict[str, list[str]]
    ) -> Repository:
        repository = self.find("models", name, user)
        if (
            user is None
            or user["role"] == "read"
            or not (may_write(user, name) or "create_pr" in query)
        ):
            raise Refused(403, "", "Forbidden: you do not have write access")
        return repository

    def preupload(
        self, user: dict[str, Any] | None, name: str, revision: str, body: bytes, **how: Any
    ) -> Reply:
        repository = self._writable(user, name, how["query"])
        files = repository.trees[repository.resolve(revision)]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": (
                    _blob(file["path"], files[file["path"]])["oid"]
                    if file["path"] in files
                    else None
                ),
            }
            for file in json.loads(body)["files"]
        ]
        return _json({"files": modes})

    def lfs_batch(self, user: dict[str, Any] | None, name: str, body: bytes, **_: Any) -> Reply:
        self._writable(user, name, {"create_pr": ["1"]})
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            upload = {"href": f"{HUB_URL}/lfs/{wanted['oid']}?X-Amz-Signature=0123456789abcdef"}
            verify = {"href": f"{HUB_URL}/lfs/{wanted['oid']}/verify"}
            needed = wanted["oid"] not in self.large
            objects.append(
                {**known, "actions": {"upload": upload, "verify": verify}} if needed else known
            )
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, body: bytes, **_: Any) -> Reply:
        if _sha256(body) != oid:
            raise Refused(400, "", "the content is not that of the oid")
        self.large[oid] = body
        return 200, {}, b""

    def lfs_verify(self, oid: str, **_: Any) -> Reply:
        if oid not in self.large:
            raise Refused(404, "", "never uploaded")
        return _json({})

    def commit(
        self, user: dict[str, Any] | None, name: str, revision: str, body: bytes, **how: Any
    ) -> Reply:
        repository = self._writable(user, name, how["query"])
        header, *changes = (json.loads(line) for line in body.splitlines())
        parent = repository.resolve(revision)
        if header["value"].get("parentCommit", parent) != parent:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repository.trees[parent])
        for change in changes:
            value = change["value"]
            if change["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise Refused(400, "", "a large file that was never uploaded")
                files[value["path"]] = self.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        pull = "create_pr" in how["query"]
        sha = repository.add(files, branch="" if pull else revision, parent=parent)
        done = {"success": True, "commitOid": sha, "commitUrl": f"{HUB_URL}/{name}/commit/{sha}"}
        if pull:
            number = len(repository.requests) + 1
            repository.requests[number] = (str((user or {})["name"]), sha)
            done["pullRequestUrl"] = f"{HUB_URL}/{name}/discussions/{number}"
        return _json(done)

    def make_tag(
        self, user: dict[str, Any] | None, name: str, revision: str, body: bytes, **how: Any
    ) -> Reply:
        repository, tag = self._writable(user, name, how["query"]), json.loads(body)["tag"]
        if tag in repository.tags:
            raise Refused(409, "", "Tag reference exists already")
        repository.tags[tag] = repository.resolve(revision)
        return _json({})

    def make_branch(
        self, user: dict[str, Any] | None, name: str, revision: str, body: bytes, **how: Any
    ) -> Reply:
        repository = self._writable(user, name, how["query"])
        if revision in repository.branches:
            raise Refused(409, "", "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.branches[revision] = repository.resolve(start)
        return _json({})


_REPO = r"(?P<name>[^/]+/[^/]+)"
_KIND = r"(?P<kind>models|datasets)"
_GETS = {
    r"/api/whoami-v2": "whoami",
    rf"/api/{_KIND}/{_REPO}(/revision/(?P<revision>[^/]+))?": "info",
    rf"/api/{_KIND}/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?": "tree",
    rf"/api/{_KIND}/{_REPO}/refs": "refs",
    rf"/api/models/{_REPO}/discussions": "discussions",
    rf"/((?P<kind>datasets)/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
}
_POSTS = {
    r"/api/repos/create": "create",
    r"/api/validate-yaml": "validate_yaml",
    rf"/api/{_KIND}/{_REPO}/paths-info/(?P<revision>[^/]+)": "paths_info",
    rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"/{_REPO}\.git/info/lfs/objects/batch": "lfs_batch",
    r"/lfs/(?P<oid>\w+)/verify": "lfs_verify",
    rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)": "commit",
    rf"/api/models/{_REPO}/tag/(?P<revision>[^/]+)": "make_tag",
    rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)": "make_branch",
}
_PUTS = {r"/lfs/(?P<oid>\w+)": "lfs_put"}


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer takes 40 ms

    def handle_one(self) -> None:
        given = self.headers.get("Authorization")
        self.server.requests.append((self.command, self.path, given))
        url = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        fault = next(
            (
                f
                for f in self.server.faults
                if f.times and f.method == self.command and re.search(f.path, url.path)
            ),
            None,
        )
        if fault is not None:
            fault.times -= 1
        if fault is not None and fault.drop is not None:
            self.rfile.read(fault.drop)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault is not None:
            threading.Event().wait(fault.delay)  # a test may have taken time.sleep for itself
            (fault.act or dict)()
        try:
            if fault is not None and fault.body is not None:
                raise Refused(fault.status or 200, body=fault.body)
            if fault is not None and fault.status:
                raise Refused(fault.status, "", fault.message, **fault.headers)
            token = given.removeprefix("Bearer ") if given else None
            status, headers, content = self.server.answer(
                method, url.path, parse_qs(url.query), body, token
            )
            (fault.after if fault and fault.after else dict)()
        except Refused as refused:
            status, headers, content = refused.reply
        if fault is not None and fault.lose:
            self.close_connection = True
            self.connection.close()
            return
        if fault is not None and fault.spoil and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(
                content if fault is None or fault.cut is None else content[: fault.cut]
            )
            if fault is not None and fault.cut is not None:
                self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def handle(self) -> None:
        with suppress(ConnectionError):  # who asked has gone
            super().handle()

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def may_write(user: dict[str, Any], name: str) -> bool:
    return name.partition("/")[0] == user["name"]


def _json(value: Any) -> Reply:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _blob(path: str, content: bytes) -> dict[str, Any]:
    """`oid` as preupload gives it; `blobId` and `lfs` as the repository's info does."""
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(content)}\nsize"
        f" {len(content)}\n".encode()
    )
    if not path.endswith(LARGE):
        return {"size": len(content), "oid": _git_oid(content), "blobId": _git_oid(content)}
    lfs = {"sha256": _sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return {"size": len(content), "oid": _sha256(content), "blobId": _git_oid(pointer), "lfs": lfs}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    blob = _blob(path, content)
    lfs = {"lfs": {"oid": blob["lfs"]["sha256"], **blob["lfs"]}} if "lfs" in blob else {}
    return {"type": "file", "path": path, "size": len(content), "oid": blob["blobId"], **lfs}
