"""WebSocket frames as a browser and as a server send them (RFC 6455, section 5.2)."""

from __future__ import annotations

import random
import struct

__all__ = ["BINARY", "CLOSE", "PING", "PONG", "TEXT", "frame", "parse_frame", "server_frame"]

#: Opcodes of RFC 6455, section 5.2.
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

_masks = random.Random(1)


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


def _head(opcode: int, size: int, masked: int) -> bytes:
    if size < 126:
        return bytes((0x80 | opcode, masked | size))
    if size < 65_536:
        return struct.pack("!BBH", 0x80 | opcode, masked | 126, size)
    return struct.pack("!BBQ", 0x80 | opcode, masked | 127, size)
