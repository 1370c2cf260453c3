"""A Hugging Face Hub in memory: the HTTP API that `huggingface_hub` needs for pushing and loading models, no more.

LFS files go by the basic LFS transfer. Where hf_xet is installed the client takes Xet without asking the server, so
it needs HF_HUB_DISABLE_XET=1. Requests that are not implemented are answered with 501 and stand in `Hub.requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


USER = "user"
TOKEN = "hf_test"
LFS_SUFFIXES = (".bin", ".pt", ".safetensors")


@dataclass
class Reply:
    """An answer. A `body` that is not bytes goes out as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is an error. By `code` the client chooses the exception that it raises."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.reply = Reply({"error": message}, status, {name: value for name, value in headers.items() if value})


@dataclass(frozen=True)
class Commit:
    """A commit's id, and all files of the repository after it."""

    oid: str
    files: dict[str, bytes]


def content_id(path: str, content: bytes) -> str:
    """The id of a file's content: SHA-256 for an LFS file, and what git calls it for any other."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


ROUTES: list[tuple[list[str], re.Pattern[str], Callable[..., Reply]]] = []


def route(methods: str, template: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Register a handler. `{repo}` is two segments of a URL's path, `{path}` all of the rest, another name is one."""
    segments = {"repo": "[^/]+/[^/]+", "path": ".+"}
    pattern = re.sub(r"{(\w+)}", lambda m: f"(?P<{m[1]}>{segments.get(m[1], '[^/]+')})", template.replace(".", r"\."))

    def register(handler: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((methods.split(), re.compile(pattern), handler))
        return handler

    return register


class Hub:
    """The repositories, and what the server answers about them.

    Args:
        port (`int`): where the server listens. The content of LFS files is on another host name, as the Hub has it.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.storage_url = f"http://localhost:{port}/storage"
        self.repos: dict[str, dict[str, list[Commit]]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self._lock = threading.Lock()

    def branches(self, repo: str) -> dict[str, list[Commit]]:
        """The commits of each branch of a repository, oldest first."""
        if repo not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[repo]

    def commit(self, repo: str, revision: str = "main") -> Commit:
        """The head of a branch, or the commit with that id."""
        branches = self.branches(repo)
        if revision in branches:
            return branches[revision][-1]
        for commit in sum(branches.values(), []):
            if commit.oid == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a branch or a commit."""
        return self.commit(repo, revision).files

    def answer(self, method: str, path: str, token: str, body: bytes) -> Reply:
        """Answer a request, and keep a record of it."""
        try:
            with self._lock:
                reply = self._dispatch(method, path, token, body)
        except Refusal as refusal:
            reply = refusal.reply
        self.requests.append((method, path, reply.status))
        return reply

    def _dispatch(self, method: str, path: str, token: str, body: bytes) -> Reply:
        if token != TOKEN and (method == "POST" or path == "/api/whoami-v2"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        for methods, pattern, handler in ROUTES:
            match = pattern.fullmatch(path)
            if match and method in methods:
                return handler(self, body, **{name: unquote(part) for name, part in match.groupdict().items()})
        raise Refusal(501, f"{method} {path} is not implemented")

    def _new_commit(self, repo: str, branch: str, files: dict[str, bytes]) -> Commit:
        commits = self.repos[repo].setdefault(branch, [])
        oid = hashlib.sha1(f"{repo} {branch} {len(commits)}".encode()).hexdigest()
        commits.append(Commit(oid, files))
        return commits[-1]

    @route("GET", "/api/whoami-v2")
    def _whoami(self, body: bytes) -> Reply:
        return Reply({"type": "user", "name": USER, "orgs": []})

    @route("POST", "/api/repos/create")
    def _create_repo(self, body: bytes) -> Reply:
        repo = f"{json.loads(body).get('organization') or USER}/{json.loads(body)['name']}"
        exists = repo in self.repos
        if not exists:
            self.repos[repo] = {}
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            self._new_commit(repo, "main", {".gitattributes": attributes.encode()})
        return Reply({"name": repo, "url": f"{self.url}/{repo}"}, 409 if exists else 200)

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def _create_branch(self, body: bytes, repo: str, branch: str) -> Reply:
        if branch in self.branches(repo):
            raise Refusal(409, f"Reference {branch} exists already")
        self.repos[repo][branch] = [self.commit(repo, json.loads(body).get("startingPoint", "main"))]
        return Reply({}, 201)

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, body: bytes) -> Reply:
        return Reply({"errors": [], "warnings": []})

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def _preupload(self, body: bytes, repo: str, revision: str) -> Reply:
        present = {path: content_id(path, content) for path, content in self.files(repo, revision).items()}
        answers = []
        for path in (item["path"] for item in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": present.get(path)})
        return Reply({"files": answers})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _lfs_batch(self, body: bytes, repo: str) -> Reply:
        self.branches(repo)
        answers = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(body)["objects"]]
        for answer in answers:
            if answer["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.storage_url}/{answer['oid']}"}}
        return Reply({"transfer": "basic", "objects": answers})

    @route("GET", "/storage/{oid}")
    def _fetch(self, body: bytes, oid: str) -> Reply:
        return Reply(self.objects[oid])

    @route("PUT", "/storage/{oid}")
    def _store(self, body: bytes, oid: str) -> Reply:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The content is not what was announced")
        self.objects[oid] = body
        return Reply()

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def _add_commit(self, body: bytes, repo: str, revision: str) -> Reply:
        if revision not in self.branches(repo):
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(self.files(repo, revision))
        for key, value in ((item["key"], item["value"]) for item in map(json.loads, body.splitlines())):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.objects:
                files[value["path"]] = self.objects[value["oid"]]
            elif key != "header":
                raise Refusal(400, f"Cannot commit {key} {value}")
        oid = self._new_commit(repo, revision, files).oid
        return Reply({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"})

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def _model_info(self, body: bytes, repo: str, revision: str = "main") -> Reply:
        commit = self.commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return Reply({"id": repo, "sha": commit.oid, "private": False, "tags": [], "siblings": siblings})

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def _tree(self, body: bytes, repo: str, revision: str, path: str = "") -> Reply:
        """All files below a folder, as `recursive=True` has them. Folders themselves are not listed."""
        prefix = f"{path}/" if path else ""
        entries: list[dict[str, Any]] = []
        for name, content in sorted(self.files(repo, revision).items()):
            if name.startswith(prefix):
                entry = {"type": "file", "path": name, "oid": content_id(name, content), "size": len(content)}
                lfs = {"lfs": {"oid": entry["oid"], "size": len(content), "pointerSize": 134}}
                entries.append(entry | (lfs if name.endswith(LFS_SUFFIXES) else {}))
        if not entries:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        return Reply(entries)

    @route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> Reply:
        commit = self.commit(repo, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
        content = commit.files[path]
        oid = content_id(path, content)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{oid}"'}
        if not path.endswith(LFS_SUFFIXES):
            return Reply(content, headers=headers)
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return Reply(status=302, headers=headers | {"Location": f"{self.storage_url}/{oid}"})


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, and writes what the hub answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        reply = self.server.hub.answer(self.command, urlsplit(self.path).path, token, body)
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *args: Any) -> None:
        """Say nothing: `Hub.requests` is the record."""


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = Hub(self.server_address[1])


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve an empty hub on a free port of this machine until the end of the `with` block."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()
