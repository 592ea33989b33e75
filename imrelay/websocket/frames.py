"""Frames of RFC 6455 as bytes: opcodes, what a server sends, and what stands in a close frame."""

from __future__ import annotations

from typing import Final

from imrelay.websocket.exceptions import FrameError

__all__ = [
    "BINARY",
    "CLOSE",
    "CONTINUATION",
    "FIN",
    "MASKED",
    "MAX_CONTROL",
    "PING",
    "PONG",
    "RSV1",
    "SHORT_BINARY",
    "SHORT_TEXT",
    "TEXT",
    "encode_close",
    "encode_frame",
    "is_valid_close_code",
    "read_close",
]

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

#: Bits of a frame's first byte, and of its second.
FIN, RSV1 = 0x80, 0x40
MASKED = 0x80

#: Bytes of payload that a control frame may have (RFC 6455 section 5.5).
MAX_CONTROL = 125

#: RFC 6455 section 7.4 and the IANA registry: 1004 is reserved, 1005, 1006 and 1015 are never sent.
_REGISTERED_CODES = frozenset((1000, 1001, 1002, 1003, *range(1007, 1015)))

#: The heads of frames with a payload of so many bytes.
SHORT_TEXT = tuple(bytes((FIN | TEXT, size)) for size in range(126))
SHORT_BINARY = tuple(bytes((FIN | BINARY, size)) for size in range(126))


def is_valid_close_code(code: int) -> bool:
    """Tell whether `code` may stand in a close frame."""
    return code in _REGISTERED_CODES or 3000 <= code <= 4999


def encode_head(opcode: int, size: int, rsv1: bool = False) -> bytes:
    """Return the head of an unfragmented, unmasked frame (RFC 6455 section 5.2)."""
    first = FIN | RSV1 | opcode if rsv1 else FIN | opcode
    if size < 126:
        return bytes((first, size))
    if size < 0x10000:
        return bytes((first, 126)) + size.to_bytes(2, "big")
    return bytes((first, 127)) + size.to_bytes(8, "big")


def encode_frame(opcode: int, payload: bytes, rsv1: bool = False) -> bytes:
    """Return one unfragmented, unmasked frame, as a server sends it."""
    size = len(payload)
    if size < 126 and not rsv1:
        if opcode == TEXT:
            return SHORT_TEXT[size] + payload
        if opcode == BINARY:
            return SHORT_BINARY[size] + payload
    return encode_head(opcode, size, rsv1) + payload


def encode_close(code: int | None, reason: str = "") -> bytes:
    """Return a close frame; without a code its payload is empty. A reason is cut to 123 bytes of UTF-8."""
    if code is None:
        return bytes((FIN | CLOSE, 0))
    told = reason.encode("utf-8", "replace")[: MAX_CONTROL - 2].decode("utf-8", "ignore").encode()
    return encode_frame(CLOSE, code.to_bytes(2, "big") + told)


def read_close(payload: bytes) -> tuple[int, str]:
    """Return code and reason of a close frame; 1005 where it has none (RFC 6455 section 7.1.5).

    Raises FrameError 1002 for a code that may not be sent, 1007 for a reason that is not UTF-8.
    """
    if not payload:
        return 1005, ""
    code = int.from_bytes(payload[:2], "big")
    if not is_valid_close_code(code):
        raise FrameError(1002, f"close code {code} may not be sent")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise FrameError(1007, "close reason is not UTF-8") from None
