"""The server of a `LocalHub`: HTTP/1.1 on the loopback interface, and its faults."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from .faults import Fault, other_byte

HOST = "127.0.0.1"


@dataclass
class Request:
    """A request. `parts` are the decoded components of the path."""

    method: str
    path: str
    parts: list[str]
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    def json(self) -> dict[str, Any]:
        values = json.loads(self.body or b"{}")
        return values if isinstance(values, dict) else {}

    @property
    def token(self) -> str | None:
        value = self.headers.get("Authorization") or ""
        return value.removeprefix("Bearer ") if value.startswith("Bearer ") else None


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Logged:
    """One line of the log: the request and the status of the response (0 if the connection was closed)."""

    method: str
    path: str
    status: int
    with_token: bool

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def answer(values: object, status: int = 200, **headers: str) -> Reply:
    """A JSON reply."""
    return Reply(status, json.dumps(values).encode(), {"Content-Type": "application/json", **headers})


class Server(ThreadingHTTPServer):
    """Listens on the loopback interface and passes each request to `respond`."""

    daemon_threads = True

    def __init__(self, respond: Callable[[Request], Reply]) -> None:
        super().__init__((HOST, 0), _Handler)
        self.respond = respond
        self.faults: list[Fault] = []
        self.log: list[Logged] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}"

    def struck_by(self, method: str, path: str) -> Fault | None:
        with self.lock:
            return next((fault for fault in list(self.faults) if fault.strikes(method, path)), None)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignored: a client that disconnects is not an error of the server."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Ignored: the log is `Server.log`."""

    def _handle(self) -> None:
        split = urlsplit(self.path)
        path = unquote(split.path)
        parts = [unquote(part) for part in split.path.split("/") if part]
        headers = {name.title(): value for name, value in self.headers.items()}
        body = self._body()
        request = Request(self.command, path, parts, dict(parse_qsl(split.query)), headers, body)
        fault = self.server.struck_by(self.command, path)
        kind = fault.kind if fault else ""
        if fault and kind in ("drop", "stall"):
            if kind == "stall":
                self.server.closing.wait(fault.seconds)
            self._write_down(request, 0)
            self._hang_up()
            return
        if kind == "garble":
            request.body = other_byte(body)
        if fault and kind == "status":
            values = {"error": f"status {fault.status}, requested by the test"}
            reply = answer(values, fault.status, **dict(fault.headers))
        else:
            with self.server.lock:
                reply = self.server.respond(request)
        if kind == "lose":
            self._write_down(request, 0)
            self._hang_up()
            return
        if kind == "corrupt":
            reply.body = other_byte(reply.body)
        self._write_down(request, reply.status)
        self._send(request, reply, cut=kind == "truncate")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, request: Request, reply: Reply, cut: bool) -> None:
        body, status, headers = reply.body, reply.status, dict(reply.headers)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range") or "")
        if wanted and status == 200 and request.method == "GET" and headers.get("Accept-Ranges"):
            total = len(body)
            first, last = wanted.groups()
            start = int(first) if first else max(0, total - int(last or 0))
            end = min(total, int(last) + 1) if first and last else total
            if start >= total:
                status, body, headers["Content-Range"] = 416, b"", f"bytes */{total}"
            else:
                status, body = 206, body[start:end]
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if request.method != "HEAD":  # the client would read a body as the next reply
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _write_down(self, request: Request, status: int) -> None:
        with self.server.lock:
            self.server.log.append(Logged(request.method, request.path, status, request.token is not None))
