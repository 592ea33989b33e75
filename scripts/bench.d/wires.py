"""How each server is spoken to: the upgrade request, the login after it, and what surrounds a message."""

from __future__ import annotations

import json
import random
import struct

__all__ = [
    "CLOSE", "PING", "PONG", "PlainWire", "SocketIoWire", "StompWire", "frame", "message", "parse_frame",
    "server_frame",
]  # fmt: skip

#: Opcodes of RFC 6455, section 5.2.
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

_masks = random.Random(1)


def _head(opcode: int, size: int, masked: int) -> bytes:
    if size < 126:
        return bytes((0x80 | opcode, masked | size))
    if size < 65_536:
        return struct.pack("!BBH", 0x80 | opcode, masked | 126, size)
    return struct.pack("!BBQ", 0x80 | opcode, masked | 127, size)


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """Return a frame as a browser sends it, masked with a key of its own."""
    size = len(payload)
    mask = _masks.randbytes(4)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    masked = (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")
    return _head(opcode, size, 0x80) + mask + masked


def server_frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """Return a frame as a server sends it."""
    return _head(opcode, len(payload), 0) + payload


def parse_frame(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Return (first byte, begin, end of the payload) of a server's frame at `at`; None while it is not whole."""
    if len(data) < at + 2:
        return None
    size, begin = data[at + 1], at + 2
    if size >= 126:
        begin += 2 if size == 126 else 8
        if len(data) < begin:
            return None
        size = int.from_bytes(data[at + 2 : begin], "big")
    return (data[at], begin, begin + size) if len(data) >= begin + size else None


class PlainWire:
    """The article's protocol, `echo-protocol`: a WebSocket message is the message."""

    name = "plain"
    #: A message comes back in a frame that is known to the last byte before it is sent.
    is_fixed = True

    def path(self, user: str) -> str:
        """Return the target of the upgrade request."""
        return f"/{user}"

    def request(self, user: str, host: str) -> bytes:
        """Return the upgrade request."""
        return (
            f"GET {self.path(user)} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            f"{self.offers}Origin: http://{host}\r\n\r\n"
        ).encode()

    offers = "Sec-WebSocket-Protocol: echo-protocol\r\n"

    def login(self, user: str) -> list[tuple[bytes | None, bytes]]:
        """Return what to send after the upgrade, and how the answer to each begins."""
        return []

    def wrap(self, message: bytes, to: str) -> bytes:
        """Return the payload that carries a message to the server."""
        return message

    def wrap_back(self, message: bytes) -> bytes:
        """Return the payload that carries it from the server; only where `is_fixed`."""
        return message

    def unwrap(self, payload: bytes) -> bytes | None:
        """Return the message in a payload; None for one that is the protocol's own business."""
        return payload

    def reply(self, payload: bytes) -> bytes | None:
        """Return the answer to a payload that is the protocol's own business, if it wants one."""
        return None


class SocketIoWire(PlainWire):
    """Socket.IO 5 over Engine.IO 4: an event named `message` with the message as its object."""

    name = "socketio"
    offers = ""

    def path(self, user: str) -> str:
        return f"/socket.io/?EIO=4&transport=websocket&id={user}"

    def login(self, user: str) -> list[tuple[bytes | None, bytes]]:
        return [(None, b"0"), (b"40", b"40")]

    def wrap(self, message: bytes, to: str) -> bytes:
        return b'42["message",%b]' % message

    def wrap_back(self, message: bytes) -> bytes:
        return b'42["message",%b]' % message

    def unwrap(self, payload: bytes) -> bytes | None:
        return payload[13:-1] if payload.startswith(b'42["message",') else None

    def reply(self, payload: bytes) -> bytes | None:
        return b"3" if payload == b"2" else None


class StompWire(PlainWire):
    """STOMP 1.2 over WebSocket, as RabbitMQ speaks it; a message comes with a running number in its head."""

    name = "stomp"
    is_fixed = False
    offers = "Sec-WebSocket-Protocol: v12.stomp\r\n"

    def __init__(self, exchange: str, vhost: str, user: str, password: str) -> None:
        self._exchange = exchange
        self._connect = (
            f"CONNECT\naccept-version:1.2\nhost:{vhost}\nlogin:{user}\npasscode:{password}\nheart-beat:0,0\n\n\0"
        ).encode()

    def path(self, user: str) -> str:
        return "/ws"

    def login(self, user: str) -> list[tuple[bytes | None, bytes]]:
        subscribe = (
            f"SUBSCRIBE\nid:0\ndestination:/exchange/{self._exchange}/{user}\nack:auto\nreceipt:ready\n\n\0"
        ).encode()
        return [(self._connect, b"CONNECTED"), (subscribe, b"RECEIPT")]

    def wrap(self, message: bytes, to: str) -> bytes:
        return b"SEND\ndestination:/exchange/%b/%b\ncontent-length:%d\n\n%b\0" % (
            self._exchange.encode(),
            to.encode(),
            len(message),
            message,
        )

    def unwrap(self, payload: bytes) -> bytes | None:
        if not payload.startswith(b"MESSAGE"):
            return payload if payload.startswith(b"ERROR") else None
        return payload[payload.index(b"\n\n") + 2 : payload.rindex(b"\0")]


def message(sender: str, to: str, content: str, size: int = 0) -> bytes:
    """Return a message of the article's shape, filled up to `size` bytes."""
    text = json.dumps({"from": {"id": sender}, "to": {"id": to}, "content": content}, separators=(",", ":"))
    return (text[:-2] + "." * max(0, size - len(text)) + text[-2:]).encode()
