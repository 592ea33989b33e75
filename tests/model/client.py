"""A browser's socket without threads: bytes are read when the driver says so, which keeps the order of events."""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tests.support.websocket_peer import BINARY, CLOSE, PING, PONG, TEXT, close_frame, frame, handshake

__all__ = ["HandshakeRefused", "ModelClient", "split_v1"]

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 30.0
#: Bytes of the kernel's buffer for one browser; with `relay_program.SEND_BUFFER` no large message goes into it.
_RECEIVE_BUFFER = 4096
_V1 = re.compile(
    rb'\{"seq":(\d+),(?:"mid":("(?:[^"\\]|\\.)*"),)?(?:"time":\d+,)?'
    rb'"(message|message_base64)":(.*?)(,"redelivered":true)?\}',
    re.DOTALL,
)


class HandshakeRefused(AssertionError):
    """The handshake was not answered with 101."""


class ModelClient:
    """One WebSocket to a relay; `pump` takes in what has come, as (payload, is binary)."""

    def __init__(self, port: int, user: str, protocols: Sequence[str] = ()) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        headers = {"Sec_WebSocket_Protocol": ", ".join(protocols)} if protocols else {}
        self.sock.sendall(handshake(f"/{user}", **headers))
        self._in = b""
        self._out = b""
        while b"\r\n\r\n" not in self._in:
            data = self.sock.recv(65_536)
            if not data:
                raise HandshakeRefused(f"the handshake of {user} was cut: {self._in!r}")
            self._in += data
        head, _, self._in = self._in.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            self.sock.close()
            raise HandshakeRefused(f"the handshake of {user} was answered {head!r} {self._in!r}")
        self.sock.setblocking(False)
        #: The relay's close code; None where it sent no close frame.
        self.close_code: int | None = None
        #: Whether the TCP connection is at its end, and whether that was a reset.
        self.is_over = self.was_reset = False
        self._is_closing = False

    def send(self, payload: bytes, *, binary: bool = False) -> None:
        """Send a message; what the kernel does not take goes out with `pump`."""
        self._write(frame(BINARY if binary else TEXT, payload))

    def close(self) -> None:
        """Begin the closing handshake."""
        self._is_closing = True
        self._write(close_frame(1000))

    def reset(self) -> None:
        """End the TCP connection with a reset, as a browser that is killed."""
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        self.is_over = self.was_reset = True

    @property
    def incomplete(self) -> int:
        """How many bytes of a frame have been read that is not here as a whole."""
        return len(self._in)

    @property
    def wants_to_write(self) -> bool:
        """Whether bytes wait for the kernel."""
        return bool(self._out) and not self.is_over

    def _write(self, data: bytes) -> None:
        self._out += data
        self._flush()

    def _flush(self) -> None:
        while self._out and not self.is_over:
            try:
                self._out = self._out[self.sock.send(self._out) :]
            except BlockingIOError:
                return
            except OSError:  # what has come can still be read, up to the end or the reset
                self._out = b""

    def pump(self) -> list[tuple[bytes, bool]]:
        """Send what waits, and return the messages that have come; answers pings and the close frame."""
        self._flush()
        found: list[tuple[bytes, bool]] = []
        while not self.is_over:
            try:
                data = self.sock.recv(65_536)
            except BlockingIOError:
                break
            except OSError:
                self._end(reset=True)
                break
            if not data:
                self._end(reset=False)
            self._in += data
        found += self._parse()
        return found

    def _end(self, *, reset: bool) -> None:
        self.is_over, self.was_reset = True, reset
        self.sock.close()

    def _parse(self) -> list[tuple[bytes, bool]]:
        found = []
        at = 0
        data = self._in
        while len(data) >= at + 2:
            size, start = data[at + 1] & 127, at + 2
            if size == 126:
                size, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            elif size == 127:
                size, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
            if start > len(data) or len(data) < start + size:
                break
            opcode, payload = data[at] & 15, data[start : start + size]
            at = start + size
            if opcode in (TEXT, BINARY):
                found.append((payload, opcode == BINARY))
            elif opcode == PING:
                self._write(frame(PONG, payload))
            elif opcode == CLOSE:
                self.close_code = int.from_bytes(payload[:2], "big") if payload else 1005
                if not self._is_closing:
                    self._is_closing = True
                    self._write(close_frame(self.close_code if payload else None))
        self._in = data[at:]
        return found


def split_v1(payload: bytes) -> dict[str, Any] | None:
    """Take a numbered frame of imrelay.v1 apart; `body` is the bytes of the AMQP message, None for other frames.

    `bodies` are those that it may have been: text that is no JSON stands there as a string.
    """
    found = _V1.fullmatch(payload)
    if found is None:
        return None
    seq, mid, key, inner, redelivered = found.groups()
    bodies = [inner]
    if key == b"message_base64":
        bodies = [base64.b64decode(json.loads(inner))]
    elif inner.startswith(b'"'):
        bodies = [json.loads(inner).encode(), inner]
    return {
        "seq": int(seq),
        "mid": None if mid is None else json.loads(mid),
        "bodies": bodies,
        "redelivered": redelivered is not None,
    }
