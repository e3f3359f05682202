"""A server on this machine that answers as Hugging Face and as ModelScope, and can misbehave.

`HubServer.repositories` maps "ORG/NAME" to {path: content}. `faults` maps a path (or "*" for every request)
to what goes wrong with it; a fault with `times` stops after so many answers.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1" * 40


@dataclass(kw_only=True)
class Fault:
    """One way to misbehave: an HTTP status, a connection cut after some bytes, or other content."""

    status: int | None = None
    error_code: str | None = None
    cut_after: int | None = None
    content: bytes | None = None
    redirect: str | None = None
    times: int = 1_000_000


@dataclass(kw_only=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass(kw_only=True)
class HubServer:
    """Both hubs. Start with `with server.running():`."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    commits: dict[str, str] = field(default_factory=dict)
    endpoint: str = ""
    _server: ThreadingHTTPServer | None = None

    def add_folder(self, model_id: str, folder: Path) -> None:
        """Serve the files of a folder as one repository."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.repositories[model_id] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

    def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        owner = self

        class Handler(HubHandler):
            hub = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening; later connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def asked_for(self, path: str) -> list[Request]:
        """The GET requests for the content of one file."""
        wanted = (f"/{path}", f"FilePath={path}")
        return [r for r in self.requests if r.method == "GET" and unquote(r.path).endswith(wanted)]

    def fault_of(self, path: str) -> Fault | None:
        """The fault that is due for this path, counted down."""
        fault = self.faults.get(path) or self.faults.get("*")
        if fault is None or fault.times <= 0:
            return None
        fault.times -= 1
        return fault


class HubHandler(BaseHTTPRequestHandler):
    """The requests that huggingface_hub 2.4 and modelscope_hub 0.5 make for downloads."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self.hub.requests.append(
            Request(
                method=self.command, path=self.path, headers={k.lower(): v for k, v in self.headers.items()}
            )
        )
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if fault := self.hub.fault_of("*"):
            self.fail(fault)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            files = [{"rfilename": name} for name in self.files(found[1])]
            self.answer(found[1], {"id": found[1], "sha": self.commit_of(found[2]), "siblings": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/.*)?", path):
            self.answer(found[1], [self.hugging_face_entry(*item) for item in self.files(found[1]).items()])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(found[1], found[3], found[2])
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            entries = [self.modelscope_entry(*item) for item in self.files(found[1]).items()]
            self.answer(found[1], {"Code": 200, "Success": True, "Data": {"Files": entries}})
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            self.send_file(found[1], query["FilePath"][0])
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/revisions", path):
            branches = {"Branches": [{"Revision": "master"}], "Tags": []}
            self.answer(found[1], {"Code": 200, "Data": {"RevisionMap": branches}})
        else:
            self.send(404, b"{}", {})

    do_HEAD = do_GET  # noqa: N815

    def files(self, model_id: str) -> dict[str, bytes]:
        return self.hub.repositories.get(model_id, {})

    def hugging_face_entry(self, name: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        lfs = {"oid": digest, "size": len(content), "pointerSize": 100}
        entry = {"type": "file", "path": name, "size": len(content), "oid": digest[:40]}
        return {**entry, "lfs": lfs} if name.endswith(".safetensors") else entry

    def modelscope_entry(self, name: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        return {"Path": name, "Type": "blob", "Size": len(content), "Sha256": digest}

    def answer(self, model_id: str, value: Any) -> None:
        if self.files(model_id):
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def commit_of(self, revision: str | None) -> str:
        known = self.hub.commits.get(revision or "main", COMMIT)
        return revision if revision in self.hub.commits.values() else known

    def send_file(self, model_id: str, name: str, revision: str | None = None) -> None:
        files = self.files(model_id)
        if name not in files:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound" if files else "RepoNotFound"})
        whole = files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(whole).hexdigest()}"',
            "X-Repo-Commit": self.commit_of(revision),
        }
        fault = self.hub.fault_of(name) if self.command == "GET" else None
        if fault and (fault.status or fault.redirect):
            return self.fail(fault)
        content = fault.content if fault and fault.content is not None else whole
        start, end = 0, len(content) - 1
        if found := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or end), end)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.send(
            206 if found else 200, content[start : end + 1], headers, fault.cut_after if fault else None
        )

    def fail(self, fault: Fault) -> None:
        headers = {"X-Error-Code": fault.error_code} if fault.error_code else {}
        if fault.redirect:
            return self.send(302, b"", {"Location": fault.redirect})
        self.send(fault.status or 500, b"{}", headers)

    def send(self, status: int, body: bytes, headers: dict[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut_after is None else body[:cut_after])
        if cut_after is not None and cut_after < len(body):
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def serve(server: HubServer) -> Iterator[HubServer]:
    """Run a server for the time of a fixture."""
    server.start()
    try:
        yield server
    finally:
        server.stop()
