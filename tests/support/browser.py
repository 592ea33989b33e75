"""A plain browser as the tests see it: a socket of websocket-client, and the article's JSON."""

from __future__ import annotations

import json
import re
import secrets
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol

import websocket

from tests.support.harness import eventually

__all__ = ["ULID", "Browser", "in_background", "wait_until_ready", "why_not_ready"]

#: Seconds after which a wait fails; no measure of speed. Shorter than `ping_interval`: each ping begins it anew.
PATIENCE = 20.0
#: What a `mid` looks like.
ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


class _Address(Protocol):
    @property
    def url(self) -> str: ...

    def socket_url(self, user: str) -> str: ...


class Browser:
    """One socket of one user; every wait is bounded by `PATIENCE`. `options` go to websocket-client."""

    def __init__(self, host: _Address, user: str, **options: Any) -> None:
        self.user = user
        self.socket = websocket.create_connection(host.socket_url(user), timeout=PATIENCE, **options)

    def __del__(self) -> None:
        """Close the TCP connection of a browser that its test has left open: else there is a ResourceWarning."""
        if "socket" in self.__dict__:  # it has been connected
            self.socket.shutdown()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Its own TCP port."""
        return int(self.socket.sock.getsockname()[1])

    def send(self, data: str | bytes) -> None:
        """Send a text frame or a binary frame as it is."""
        if isinstance(data, bytes):
            self.socket.send_binary(data)
        else:
            self.socket.send(data)

    def say(self, to: str | int, content: Any = "hello", **more: Any) -> str:
        """Send a message as the article's client does, and return the text that its recipient is to get."""
        text = json.dumps({"from": {"id": self.user}, "to": {"id": to}, "content": content, **more})
        self.send(text)
        return text

    def receive(self) -> str | bytes:
        """Return the next message: text or bytes, as it came."""
        opcode, data = self.socket.recv_data()
        assert opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY), f"it was closed: {data!r}"
        return data.decode() if opcode == websocket.ABNF.OPCODE_TEXT else data

    def read(self) -> Any:
        """Return what the JSON of the next text message says."""
        text = self.receive()
        assert isinstance(text, str), f"a binary message: {text!r}"
        return json.loads(text)

    def ack(self) -> dict[str, Any]:
        """Return the next message, which has to be an ack."""
        answer = self.read()
        assert set(answer) == {"ack"}, answer
        return dict(answer["ack"])

    def error(self) -> dict[str, Any]:
        """Return the next message, which has to be an error."""
        answer = self.read()
        assert set(answer) == {"error"}, answer
        return dict(answer["error"])

    def contents_until(self, last: Any) -> list[Any]:
        """Return the `content` of each message up to the one whose content is `last`, that one included."""
        return list(self._contents(last))

    def _contents(self, last: Any) -> Iterator[Any]:
        while True:
            message = self.read()
            assert "content" in message, message
            yield message["content"]
            if message["content"] == last:
                return

    def rest(self) -> list[str | bytes]:
        """Return all that was on its way to this socket: what comes before a message to itself and its ack.

        Only for the one socket of a user; others of the same user would get that message too.
        """
        mark = secrets.token_hex(8)
        text = self.say(self.user, mark, id=mark)
        found: list[str | bytes] = []
        left = 2
        while left:
            message = self.receive()
            if message == text or (isinstance(message, str) and message.startswith(f'{{"ack":{{"id":"{mark}"')):
                left -= 1
            else:
                found.append(message)
        return found

    def close_code(self) -> int | None:
        """Read to the close frame, answer it, end the TCP connection, and return the code."""
        while True:
            opcode, data = self.socket.recv_data(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                self.socket.shutdown()
                return int.from_bytes(data[:2], "big") if data else None

    def close(self) -> None:
        """Close it with the closing handshake."""
        with suppress(OSError, websocket.WebSocketException):
            self.socket.close(timeout=PATIENCE)
        self.socket.shutdown()  # where the handshake has failed

    def cut(self) -> None:
        """Cut its TCP connection with a reset, as a browser that is killed or loses its network."""
        self.socket.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.shutdown()


def in_background(function: Any, *arguments: Any) -> Future[Any]:
    """Call a function in a thread of its own; the future has its result."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future


def why_not_ready(host: _Address) -> str:
    """Return what /readyz says when the relay cannot accept messages; empty when it can."""
    try:
        with urllib.request.urlopen(f"{host.url}/readyz", timeout=PATIENCE):
            return ""
    except urllib.error.HTTPError as exc:
        if exc.code != 503:
            raise
        with exc:
            return str(json.load(exc)["error"]["message"])


def wait_until_ready(host: _Address) -> None:
    """Wait until the relay has found its broker: it listens before that."""
    eventually(lambda: not why_not_ready(host), PATIENCE)
