"""A small hub on loopback that answers huggingface_hub as the real one does, with faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".h5", ".msgpack")  # kept as the hub keeps large files, known by their sha256


class Request(NamedTuple):
    """A request: GET or HEAD, and the path."""

    method: str
    path: str

    @property
    def file(self) -> str:
        """Return the last part of the path."""
        return self.path.rpartition("/")[2]


class Fault(NamedTuple):
    """What happens to one answer: another status, or a body that breaks off, is held up or goes wrong after some bytes.

    A body that is "cut" or "reset" ends with its connection, one that is "short" says that this is all there is.
    """

    kind: str  # "status", "cut", "reset", "hold", "wrong" or "short"
    number: int = 0  # the status, or how many bytes are right


@dataclass
class Repository:
    """A repository's files by name; a gated one serves its listing but no file."""

    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        """Return the commit, 40 hexadecimal digits derived from the files."""
        return hashlib.sha1(b"".join(name.encode() + data for name, data in self.files.items())).hexdigest()

    def siblings(self) -> list[dict[str, object]]:
        """Return the listing as ?blobs=true gives it."""
        return [
            {"rfilename": name, "size": len(data), "blobId": git_hash(data)} | large(name, data)
            for name, data in self.files.items()
        ]


def large(name: str, data: bytes) -> dict[str, object]:
    """Return the extra fields of a large file in a listing."""
    if not name.endswith(LARGE):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}


def git_hash(data: bytes) -> str:
    """Return git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """A hub's repositories by org/name, the requests it received, and faults for the next answers.

    faults: for "GET model.safetensors", or "GET /api", the faults of the answers, one after the other; None is none.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: dict[str, list[Fault | None]] = field(default_factory=dict)
    sent: int = 0  # bytes of the body that is being held up
    closing: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, sent: int) -> None:
        """Wait until a body is held up after that many bytes."""
        deadline = time.monotonic() + 30
        while self.sent < sent:
            assert time.monotonic() < deadline, self.requests
            time.sleep(0.01)


class Handler(BaseHTTPRequestHandler):
    """Answer one connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path)
        self.hub.requests.append(request)
        key = f"{self.command} {'/api' if path.startswith('/api/') else request.file}"
        faults = self.hub.faults.get(key, [])
        fault = faults.pop(0) if faults else None
        if fault is not None and fault.kind == "status":
            return self.refuse(fault.number, "", "out of order")
        if listing := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            return self.tell(listing[1], listing[2] or "main")
        if file := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
            return self.bring(file[1], file[2], file[3], fault)
        return self.refuse(404, "", "no such page")

    def tell(self, name: str, revision: str) -> None:
        repository = self.found(name, revision)
        if repository is not None:
            listing = {"id": name, "sha": repository.commit, "siblings": repository.siblings()}
            self.reply(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def bring(self, name: str, revision: str, file: str, fault: Fault | None) -> None:
        repository = self.found(name, revision)
        if repository is None:
            return None
        if repository.gated:
            return self.refuse(401, "GatedRepo", f"Access to model {name} is restricted.\nPlease log in.")
        if file not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = repository.files[file]
        is_large = file.endswith(LARGE)
        etag = hashlib.sha256(data).hexdigest() if is_large else git_hash(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if is_large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return self.reply(200, headers, data, fault)
        start = int(wanted[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.reply(206, headers, data[start:], fault)

    def found(self, name: str, revision: str) -> Repository | None:
        """Return the repository, or answer that there is none and return None."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", repository.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        headers["X-Error-Message"] = message.replace("\n", " ")
        self.reply(status, headers, json.dumps({"error": message}).encode())

    def reply(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None) -> None:
        if fault is not None and fault.kind == "short":
            body, fault = body[: fault.number], None
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):  # the client has left
            if fault is None:
                self.wfile.write(body)
            elif fault.kind == "wrong":
                self.wfile.write(body[: fault.number] + bytes(byte ^ 1 for byte in body[fault.number :]))
            else:
                self.wfile.write(body[: fault.number])
                self.break_off(fault)

    def break_off(self, fault: Fault) -> None:
        """End the body early: close or reset the connection, or send nothing until the client leaves."""
        self.close_connection = True
        if fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault.kind == "hold":
            self.hub.sent = fault.number
            while not self.hub.closing.is_set():
                if select.select([self.connection], [], [], 0.05)[0]:
                    return


@contextlib.contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Run a hub within this context."""
    hub = Hub(repositories=repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
