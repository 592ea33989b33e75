"""What a relay writes: frames for a browser, and bodies for the broker (PROTOCOL sections 3 to 6).

Pure functions. `submission` reads what browsers send; the article's envelope is written and read here.
"""

from __future__ import annotations

import base64
import json
from json.encoder import encode_basestring
from typing import Any

from imrelay.errors import AnswerableError, BadMessage
from imrelay.messages.submission import ClientPing, is_utf8

__all__ = ["ack_frame", "error_frame", "from_node", "is_json", "pong_frame", "to_node", "v1_frame"]

_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def ack_frame(message_id: str | int, mid: str, time_ms: int) -> bytes:
    """Write the answer to a message that the broker confirmed (PROTOCOL section 3)."""
    # written by hand, since each message gets one: a JSON encoder takes five times as long
    written = str(message_id) if isinstance(message_id, int) else encode_basestring(message_id)
    return f'{{"ack":{{"id":{written},"mid":"{mid}","time":{time_ms}}}}}'.encode()


def error_frame(error: AnswerableError) -> bytes:
    """Write the answer to a message that was refused (PROTOCOL section 4)."""
    fields: dict[str, Any] = {"code": error.code, "message": str(error)}
    if error.message_id is not None:
        fields["id"] = error.message_id
    if error.temporary:
        fields["temporary"] = True
    if error.uncertain:
        fields["uncertain"] = True
    return _dump({"error": fields}).encode()


def pong_frame(ping: ClientPing) -> bytes:
    """Write the answer to a ping, as ASCII: its value may have half of a surrogate pair.

    Raises `BadMessage` for a number that was too large to be read, which JSON cannot write.
    """
    try:
        return json.dumps({"pong": ping.value}, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise BadMessage("ping holds a number that is out of range") from None


def v1_frame(
    seq: int, mid: str | None, time_ms: int | None, payload: bytes, is_message: bool, redelivered: bool
) -> bytes:
    """Write a message for `imrelay.v1` (PROTOCOL section 5); the message's own bytes stand inside.

    A body of another program that is no JSON (`is_message` false) is written as a string there, or under
    `message_base64` where it is no UTF-8 either.
    """
    if is_message:
        inner = b'"message":' + payload
    elif is_utf8(payload):
        inner = b'"message":' + encode_basestring(payload.decode()).encode()
    else:
        inner = b'"message_base64":"' + base64.b64encode(payload) + b'"'
    mid_part = b"" if mid is None else b'"mid":' + encode_basestring(mid).encode() + b","
    time_part = b"" if time_ms is None else b'"time":%d,' % time_ms
    return b'{"seq":%d,%b%b%b%b}' % (
        seq,
        mid_part,
        time_part,
        inner,
        b',"redelivered":true' if redelivered else b"",
    )


def is_json(body: bytes) -> bool:
    """Tell whether an AMQP body can stand inside a JSON text."""
    try:
        _decode(body.decode())
    except (ValueError, RecursionError):
        return False
    return True


def to_node(body: bytes, binary: bool) -> bytes:
    """Wrap a message as the article's Node.js server does (`envelope = node`)."""
    if binary:
        return _dump({"type": "binary", "binaryData": {"type": "Buffer", "data": list(body)}}).encode()
    return _dump({"type": "utf8", "utf8Data": body.decode()}).encode()


def from_node(body: bytes) -> tuple[bytes, bool] | None:
    """Unwrap a body of the article's Node.js server to (message, binary); None where it is none."""
    try:
        match json.loads(body):
            case {"type": "utf8", "utf8Data": str(text)}:
                # Node.js writes half of a surrogate pair as U+FFFD; so do we
                return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode(), False
            case {"type": "binary", "binaryData": {"type": "Buffer", "data": list(octets)}}:
                return bytes(octets), True
    except (ValueError, TypeError, RecursionError):
        pass
    return None
