"""A Hub on this machine: repos with commits, branches and pull requests, behind the routes that the client uses."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # files by path, by commit
    refs: dict[str, str] = field(default_factory=dict)  # commits by branch or pull request

    def commit(self, ref: str, files: dict[str, File]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.refs[ref]].items()}


@dataclass
class Fault:
    """What goes wrong with requests that match."""

    method: str
    path: str  # regular expression
    status: int | None = None  # of the answer; None cuts the connection in the middle of the request
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Hub:
    """The state of the server, for tests to prepare and to look at."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.other_types: set[str] = set()  # names of datasets and Spaces
        self.users = {"hf_writer": "user", "hf_reader": "reader"}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.tamper: Callable[[dict[str, File]], object] = lambda files: None  # with the files of each new commit
        self.answer: Callable[[dict[str, str]], object] = lambda answer: None  # that a commit gets
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def add(self, name: str, folder: Path, **settings: bool) -> Repo:
        """Makes a model repo of the files in `folder`."""
        repo = self.repos[name] = Repo(**settings)
        files = {path.name: File(path.read_bytes(), is_lfs(path.name)) for path in folder.iterdir() if path.is_file()}
        repo.commit("main", files)
        return repo

    def repo(self, name: str, token: str | None) -> Repo:
        """The repo, if the token may see it."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and self.users.get(token or "") != name.split("/")[-2]):
            raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def resolve(self, repo: Repo, revision: str) -> str:
        """The commit that a branch, a pull request or a commit's own name stands for."""
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".parquet"))


def entry_of(path: str, file: File) -> dict:
    """A file in the answers to questions about files."""
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
    return entry


class Handler(BaseHTTPRequestHandler):
    """One request; the routes are the methods named in `ROUTES`."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def handle_any(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        path = url.path
        length = int(self.headers.get("Content-Length") or 0)
        with hub.lock:
            hub.requests.append(f"{self.command} {unquote(path)}")
            fault = next((f for f in hub.faults if f.method == self.command and re.search(f.path, path)), None)
            if fault:
                fault.times -= 1
                hub.faults = [fault for fault in hub.faults if fault.times]
        if fault and fault.status is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        try:
            if fault and fault.status:
                raise HubError(fault.status, "injected", **fault.headers)
            if self.token and self.token not in hub.users:
                raise HubError(401, "Invalid credentials in Authorization header")
            for method, pattern, route in ROUTES:
                if method in (self.command, "GET" if self.command == "HEAD" else "") and (
                    match := re.fullmatch(pattern, path)
                ):
                    route(self, hub, *(unquote(group) for group in match.groups()))
                    return
            raise HubError(404, f"no route for {self.command} {path}")
        except HubError as error:
            self.reply({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def writable(self, name: str) -> None:
        if self.token is None:
            raise HubError(401, "Unauthorized")
        if self.server.hub.users[self.token] != name.split("/")[-2]:
            raise HubError(403, "You don't have the required permissions")

    def whoami(self, hub: Hub) -> None:
        if self.token is None:
            raise HubError(401, "Unauthorized")
        self.reply({"name": hub.users[self.token], "type": "user", "orgs": []})

    def validate_yaml(self, hub: Hub) -> None:
        self.reply({"errors": [], "warnings": []})

    def create_repo(self, hub: Hub) -> None:
        settings = json.loads(self.body)
        owner = settings.get("organization") or hub.users.get(self.token or "")
        prefix = "spaces/" if settings.get("type") == "space" else ""
        name = f"{prefix}{owner}/{settings['name']}"
        self.writable(name)
        if name in hub.repos or name in hub.other_types:
            raise HubError(409, "You already created this repo")
        private = settings.get("private") or settings.get("visibility") == "private"
        hub.repos[name] = Repo(private=bool(private))
        hub.repos[name].commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        self.reply({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def create_branch(self, hub: Hub, name: str, branch: str) -> None:
        self.writable(name)
        repo = hub.repo(name, self.token)
        if branch in repo.refs:
            raise HubError(409, "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self.reply({})

    def info(self, hub: Hub, name: str, revision: str = "main") -> None:
        repo = hub.repo(name, self.token)
        oid = hub.resolve(repo, revision)
        files = [{"rfilename": path} for path in repo.commits[oid]]
        self.reply({"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": files, "tags": []})

    def paths_info(self, hub: Hub, name: str, revision: str) -> None:
        repo = hub.repo(name, self.token)
        files = repo.commits[hub.resolve(repo, revision)]
        wanted = parse_qs(self.body.decode())["paths"]
        self.reply([entry_of(path, files[path]) for path in wanted if path in files])

    def tree(self, hub: Hub, name: str, revision: str, folder: str = "") -> None:
        repo = hub.repo(name, self.token)
        files = repo.commits[hub.resolve(repo, revision)]
        if folder:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        entries = [entry_of(path, file) for path, file in files.items()]
        self.reply(entries)

    def download(self, hub: Hub, name: str, revision: str, path: str) -> None:
        repo = hub.repo(name, self.token)
        if repo.gated:
            raise HubError(403, "Access to this model is restricted", "GatedRepo")
        oid = hub.resolve(repo, revision)
        file = repo.commits[oid].get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self.reply(file.content, headers=headers)

    def preupload(self, hub: Hub, name: str, revision: str) -> None:
        repo = hub.repo(name, self.token)
        if not self.query.get("create_pr"):
            self.writable(name)
        there = repo.commits[hub.resolve(repo, revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path) else "regular"
            oid = there[path].oid if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": files})

    def lfs_batch(self, hub: Hub, name: str) -> None:
        hub.repo(name, self.token)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in hub.lfs:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, hub: Hub, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "not the content that was announced")
        hub.lfs[oid] = self.body
        self.reply(b"")

    def commit(self, hub: Hub, name: str, revision: str) -> None:
        repo = hub.repo(name, self.token)
        creates_pr = bool(self.query.get("create_pr"))
        if not creates_pr:
            self.writable(name)
        head = hub.resolve(repo, revision)
        files = dict(repo.commits[head])
        for line in self.body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header" and not creates_pr and value.get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            if kind == "lfsFile":
                files[value["path"]] = File(hub.lfs[value["oid"]], lfs=True)
            if kind == "deletedFile":
                del files[value["path"]]
        hub.tamper(files)
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        oid = repo.commit(f"refs/pr/{number}" if creates_pr else revision, files)
        url = f"{self.server.url}/{name}"
        pull_request = {"pullRequestUrl": f"{url}/discussions/{number}"} if creates_pr else {}
        answer = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, **pull_request}
        hub.answer(answer)
        self.reply(answer)


NAME = "((?:spaces/|datasets/)?[^/]+/[^/]+)"  # those of Spaces begin with "spaces/"
API = f"/api/(?:models/|(?=spaces/|datasets/)){NAME}"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", f"{API}/branch/(.+)", Handler.create_branch),
    ("POST", f"{API}/preupload/(.+)", Handler.preupload),
    ("POST", f"{API}/commit/(.+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(.+)", Handler.lfs_upload),
    ("GET", API, Handler.info),
    ("GET", f"{API}/revision/(.+)", Handler.info),
    ("POST", f"{API}/paths-info/(.+)", Handler.paths_info),
    ("GET", f"{API}/tree/([^/]+)", Handler.tree),
    ("GET", f"{API}/tree/([^/]+)/(.+)", Handler.tree),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.download),
]


class Server(ThreadingHTTPServer):
    """Serves a `Hub` on a free port of this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = Hub()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are no error."""


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
