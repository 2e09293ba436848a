"""An HTTP proxy on the loopback that makes trouble: the faults of a real network and a real store, on demand."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DROPPED_HEADERS = {"expect", "connection", "transfer-encoding", "keep-alive"}


@dataclass(frozen=True)
class Fault:
    """What to do with a request instead of passing it on.

    Attributes:
        status: answer this status and S3 error code.
        silence: say nothing for so many seconds, then close; with `cut_download`: after those bytes.
        cut_upload: close the connection after so many bytes of the request's body.
        cut_download: pass it on, and close the connection after so many bytes of the answer's body.
        lose_answer: pass it on, and close the connection without an answer.
    """

    status: int | None = None
    code: str = "InternalError"
    silence: float | None = None
    cut_upload: int | None = None
    cut_download: int | None = None
    lose_answer: bool = False


@dataclass
class Planned:
    """A fault for the next `times` requests of a method whose path has `text` in it."""

    fault: Fault
    times: float
    method: str
    text: str


@dataclass
class Seen:
    """A request that came."""

    method: str
    path: str
    sent: int = 0


@dataclass
class FaultProxy:
    """A proxy before the server on a port of this machine.

    Attributes:
        seen: all requests in the order they came, with the bytes of the answers' bodies.
    """

    server_port: int
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    planned: list[Planned] = field(default_factory=list)
    _server: Any = None
    _lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> FaultProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self.go_away()

    def start(self) -> None:
        """Listen: on a free port, or on that of before."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def go_away(self) -> None:
        """Refuse connections, and cut those that are open."""
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_all()
        self._server = None

    def plan(self, fault: Fault, times: float = 1, method: str = "", text: str = "") -> None:
        """Do `fault` to the next `times` requests of `method` ('' is any) with `text` in their path and query."""
        self.planned.append(Planned(fault, times, method, text))

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault for a request that came."""
        with self._lock:
            for planned in self.planned:
                if planned.times > 0 and planned.method in ("", method) and planned.text in path:
                    planned.times -= 1
                    return planned.fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Cut connections are what this is for."""

    def cut_all(self) -> None:
        for connection in list(self.open):
            _cut(connection)


def _cut(connection: socket.socket) -> None:
    """Close at once, with a reset."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def handle_request(self) -> None:
        seen = Seen(self.command, self.path)
        self.proxy.seen.append(seen)
        length = int(self.headers.get("Content-Length", 0))
        fault = self.proxy.take_fault(self.command, self.path)
        if fault is not None and fault.silence is not None and fault.cut_download is None:
            time.sleep(fault.silence)
            self.cut()
            return
        if fault is not None and fault.cut_upload is not None:
            self.rfile.read(min(fault.cut_upload, length))
            self.cut()
            return
        body = self.rfile.read(length)
        if fault is not None and fault.status is not None:
            self.answer_error(fault)
            return
        status, headers, answer = self.pass_on(body)
        if fault is not None and fault.lose_answer:
            self.cut()
            return
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in DROPPED_HEADERS | {"date", "server", "content-length"}:
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        declared = next((value for name, value in headers if name.lower() == "content-length"), str(len(answer)))
        self.send_header("Content-Length", declared if is_head else str(len(answer)))
        self.end_headers()
        if fault is not None and fault.cut_download is not None:
            answer = answer[: fault.cut_download]
        seen.sent = len(answer)
        self.wfile.write(answer)
        if fault is not None and fault.cut_download is not None:
            self.wfile.flush()
            time.sleep(fault.silence or 0.0)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request  # noqa: N815 (the library's names)

    def pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in DROPPED_HEADERS}
        connection.request(self.command, self.path, body=body, headers=headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, response.getheaders(), answer

    def answer_error(self, fault: Fault) -> None:
        assert fault.status is not None
        text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>as planned</Message></Error>".encode()
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def cut(self) -> None:
        self.close_connection = True
        _cut(self.connection)

    def log_message(self, *_: object) -> None:
        """Nothing: a test tells by `seen`."""
