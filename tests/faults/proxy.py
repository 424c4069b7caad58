"""A small proxy between a service and one of its servers, that refuses, hangs, cuts and corrupts when told to."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import Self

_CHUNK = 1 << 16
_PAUSE = 0.02


class Mode(StrEnum):
    """What becomes of connections, those that are open too."""

    PASS = "pass"
    REFUSE = "refuse"  # closed at once
    HANG = "hang"  # open, and nothing moves in either direction
    UNAVAILABLE = "unavailable"  # HTTP: every request is answered with 503
    FULL = "full"  # HTTP: what would be stored is answered with 507, the rest passes
    CUT = "cut"  # closed after some bytes have gone up
    CORRUPT = "corrupt"  # HTTP: a byte of each answer's body is another


class Proxy:
    """Passes bytes between whoever connects to `port` and a server."""

    def __init__(self, server: tuple[str, int] | str, host: str = "127.0.0.1") -> None:
        """Stand before a server: host and port, or the path of its socket."""
        self._server = server
        self._lock = threading.Lock()
        self._mode = Mode.PASS
        self._cut_after = 0
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((host, 0))
        self.host, self.port = self._listener.getsockname()[:2]
        self.spoiled = 0
        threading.Thread(target=self._accept, daemon=True, name="proxy").start()

    def set(self, mode: Mode, cut_after: int = 1000) -> None:
        """Change what becomes of connections; `cut_after` bytes have gone up when one is cut."""
        with self._lock:
            self._mode, self._cut_after = mode, cut_after
            if mode in (Mode.REFUSE, Mode.UNAVAILABLE, Mode.FULL):
                # Connections that are kept open would go around it.
                for each in list(self._open):
                    _end(each)

    @property
    def mode(self) -> Mode:
        """What becomes of connections now."""
        return self._mode

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True, name="proxied").start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self._mode is Mode.REFUSE:
                self.spoiled += 1
                return
            if self._mode is Mode.UNAVAILABLE:
                self.spoiled += 1
                _refuse_request(client, b"", "503 Service Unavailable", "ServiceUnavailable")
                return
            try:
                server = self._connect()
            except OSError:
                return
            with server:
                pair = {client, server}
                with self._lock:
                    self._open |= pair
                up = threading.Thread(target=self._pump, args=(client, server, True), daemon=True, name="up")
                up.start()
                self._pump(server, client, False)
                up.join()
                with self._lock:
                    self._open -= pair

    def _connect(self) -> socket.socket:
        if isinstance(self._server, str):
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            return server
        return socket.create_connection(self._server, timeout=10.0)

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        """Pass bytes until one side closes, or as the mode says."""
        moved = 0
        with suppress(OSError):
            source.settimeout(None)
            while data := source.recv(_CHUNK):
                while self._mode is Mode.HANG:
                    time.sleep(_PAUSE)
                if self._mode is Mode.FULL and up and data.startswith((b"PUT ", b"POST ")):
                    self.spoiled += 1
                    _refuse_request(source, data, "507 Insufficient Storage", "InsufficientStorage")
                    break
                if self._mode is Mode.CUT and up:
                    moved += len(data)
                    if moved > self._cut_after:
                        self.spoiled += 1
                        sink.sendall(data[: len(data) // 2])
                        break
                if self._mode is Mode.CORRUPT and not up:
                    data = self._corrupted(data)
                sink.sendall(data)
        _end(sink)
        _end(source)

    def _corrupted(self, data: bytes) -> bytes:
        """Change the last byte of what looks like an answer's body."""
        head, gap, body = data.partition(b"\r\n\r\n")
        binary = b"octet-stream" in head.lower() or not data.startswith(b"HTTP/")
        if data.startswith(b"HTTP/1.1 2") and binary and body:
            self.spoiled += 1
            return head + gap + body[:-1] + bytes([body[-1] ^ 1])
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        _end(self._listener)
        self._listener.close()
        self.set(Mode.REFUSE)


def _refuse_request(client: socket.socket, begun: bytes, status: str, code: str) -> None:
    """Answer a request, of which some bytes have come, with an error of S3, and let no other come."""
    client.settimeout(5.0)
    with suppress(OSError):
        request = begun
        while b"\r\n\r\n" not in request and (data := client.recv(_CHUNK)):
            request += data
        body = f"<Error><Code>{code}</Code><Message>faults</Message></Error>".encode()
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        client.sendall(head.encode() + b"Content-Type: application/xml\r\n\r\n" + body)
        # What the client still sends would else reset the connection before it has read the answer.
        client.shutdown(socket.SHUT_WR)
        while client.recv(_CHUNK):
            pass


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
