"""A broker that follows the script of a test, in a thread: for what RabbitMQ does very rarely."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from pika import frame, spec

__all__ = ["BrokerSide", "FakeBroker"]

#: Seconds after which a wait fails; no measure of speed.
_PATIENCE = 20.0


class BrokerSide:
    """One connection to the fake broker, from its side; everything blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""

    def read(self, size: int) -> bytes:
        """Read so many bytes; fewer at the end of the stream."""
        while len(self._buffer) < size:
            data = self.sock.recv(65_536)
            if not data:
                break
            self._buffer += data
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def read_frame(self) -> Any:
        """Read a frame as pika decodes it; None at the end of the stream."""
        start = self.read(7)
        if len(start) < 7:
            return None
        rest = self.read(int.from_bytes(start[3:7], "big") + 1)
        return frame.decode_frame(start + rest)[1]

    def read_method(self, kind: type) -> Any:
        """Read up to a method of this kind, and return it."""
        while True:
            read = self.read_frame()
            assert read is not None, f"the stream ended before {kind.__name__}"
            if isinstance(getattr(read, "method", None), kind):
                return read.method

    def send(self, channel: int, *methods: Any) -> None:
        """Send methods."""
        self.sock.sendall(b"".join(frame.Method(channel, method).marshal() for method in methods))

    def start(self) -> None:
        """Take the protocol header and answer it."""
        assert self.read(8) == b"AMQP\x00\x00\x09\x01"
        self.send(0, spec.Connection.Start(0, 9, {"capabilities": {}}, "PLAIN", "en_US"))

    def open(self, *, heartbeat: int = 0) -> None:
        """Do the whole handshake."""
        self.start()
        self.read_method(spec.Connection.StartOk)
        self.send(0, spec.Connection.Tune(2047, 131_072, heartbeat))
        self.read_method(spec.Connection.Open)
        self.send(0, spec.Connection.OpenOk())

    def open_channel(self) -> int:
        """Open the channel that is asked for next; return its number."""
        while True:
            read = self.read_frame()
            if read is None:
                raise ConnectionError("the stream ended before channel.open")
            if isinstance(getattr(read, "method", None), spec.Channel.Open):
                self.send(read.channel_number, spec.Channel.OpenOk())
                return int(read.channel_number)


class FakeBroker:
    """Listens on a port of loopback and plays `script` for each connection; use it as a context.

    At the end of its script a connection is closed. A script that fails fails the test.
    """

    def __init__(
        self, script: Callable[[BrokerSide], None], *, tls: ssl.SSLContext | None = None, buffer: int = 0
    ) -> None:
        self._script = script
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        if buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = self._listener.getsockname()[1]
        #: Its URL.
        self.url = f"amqp{'s' if tls else ''}://ann:secret@127.0.0.1:{self.port}/"
        #: Set when a script has come to its end.
        self.played = threading.Event()
        self.failures: list[BaseException] = []
        self._connections: list[tuple[socket.socket, threading.Thread]] = []

    def __enter__(self) -> FakeBroker:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(_PATIENCE)
        for sock, thread in self._connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(_PATIENCE)
        if kind is None:
            assert not self.failures, self.failures

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._play, args=(sock,), daemon=True)
            self._connections.append((sock, thread))
            thread.start()

    def _play(self, sock: socket.socket) -> None:
        sock.settimeout(_PATIENCE)
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            self._script(BrokerSide(sock))
        except (OSError, AssertionError) as exc:
            if isinstance(exc, AssertionError):
                self.failures.append(exc)
        finally:
            self.played.set()
            sock.close()
