"""A message: how it is read from a browser, named, and written to and read from an AMQP body.

Pure functions on bytes and text (PROTOCOL sections 1, 3, 4 and 6); nothing here waits or keeps a socket.
"""

from __future__ import annotations

import base64
import json
import os
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, NamedTuple, cast

from imrelay.errors import AnswerableError, BadId, BadJson, BadMessage, FromMismatch

__all__ = [
    "ClientAck",
    "ClientPing",
    "MessageIds",
    "Submission",
    "ack_frame",
    "check_id",
    "error_frame",
    "from_node",
    "is_json",
    "is_utf8",
    "mid_time_ms",
    "parse",
    "pong_frame",
    "to_node",
    "v1_frame",
]

#: Longest id of a user, in bytes of UTF-8.
MAX_ID_BYTES = 128
#: Longest `id` of a message, in bytes of UTF-8.
MAX_MESSAGE_ID_BYTES = 64
#: Deepest nesting of a message; the message itself is level 1.
MAX_LEVELS = 32


class Submission(NamedTuple):
    """A message that a browser sent and that passed all checks.

    `body` is what the recipient gets: the sender's bytes, with `from` added where the sender left it out.
    `message_id` is the client's own `id`, None where it asked for no answer.
    """

    to: str
    body: bytes
    binary: bool
    message_id: str | int | None


@dataclass(frozen=True, slots=True)
class ClientAck:
    """`{"ack":7}`: the browser has taken everything up to `seq` (PROTOCOL section 5)."""

    seq: int


@dataclass(frozen=True, slots=True)
class ClientPing:
    """`{"ping":any}`, which is answered with `{"pong":any}` (PROTOCOL section 5)."""

    value: Any


def check_id(value: str) -> str:
    """Return the id of a user unchanged, or raise `BadId` with the rule that it breaks."""
    if value.isascii() and value.isprintable() and "/" not in value and 0 < len(value) <= MAX_ID_BYTES:
        if value not in (".", ".."):
            return value
        raise BadId("'.' and '..' cannot be ids")
    if not value:
        raise BadId("an id has at least one character")
    if "/" in value:
        raise BadId("an id has no '/'")
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise BadId("an id has no control characters")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise BadId("an id is valid Unicode: this one has half of a surrogate pair") from None
    if size > MAX_ID_BYTES:
        raise BadId(f"an id has at most {MAX_ID_BYTES} bytes, this one {size}")
    return value


class _Ambiguous(dict[str, Any]):
    """An object in which `id`, `from` or `to` stands twice: readers would differ in which one counts."""


class _BigInteger(str):
    """An integer of more digits than Python converts; no id is that long, so its text will do."""


def _refuse_constant(name: str) -> Any:
    raise BadJson(f"not JSON: {name} is no JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        if any(keys.count(key) > 1 for key in ("id", "from", "to")):
            return _Ambiguous(made)
    return made


def _integer(digits: str) -> int | _BigInteger:
    try:
        return int(digits)
    except ValueError:
        return _BigInteger(digits)


_fast = json.JSONDecoder(parse_constant=_refuse_constant)
#: The C scanner of it: (text, start) -> (value, end).
_scan = cast(Any, _fast).scan_once
_careful = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_integer, object_pairs_hook=_object)


def parse(payload: bytes, text: str | None, user: str) -> Submission | ClientAck | ClientPing:
    """Read what the browser of `user` sent: the payload of a frame and, for a text frame, its decoded text.

    What has no `to` but an `ack` or a `ping` is no message but a frame of `imrelay.v1`. Raises `BadJson`,
    `BadMessage` or `FromMismatch`, with the message's `id` where that could be read.
    """
    binary = text is None
    if text is None:
        try:
            text = payload.decode()
        except UnicodeDecodeError as exc:
            raise BadJson(f"not UTF-8: byte {exc.start} of {len(payload)}") from None
    message = _load(text)
    if "to" not in message:
        if "ack" in message:
            return ClientAck(_sequence_number(message["ack"]))
        if "ping" in message:
            return ClientPing(message["ping"])
    message_id = _message_id(message)
    try:
        to = _party(message, "to")
        if "from" not in message:
            brace = payload.index(b"{") + 1
            payload = b"".join((payload[:brace], b'"from":{"id":', _quote(user), b"},", payload[brace:]))
        elif _party(message, "from") != user:
            raise FromMismatch("from.id is not the id of this session")
    except AnswerableError as exc:
        exc.message_id = message_id
        raise
    return Submission(to, payload, binary, message_id)


def _load(text: str) -> dict[str, Any]:
    """Decode the text of a message: an object, at most `MAX_LEVELS` deep, without NaN or infinities."""
    try:
        try:
            message = _decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than sys.get_int_max_str_digits()
            message = _careful.decode(text)
        if not isinstance(message, dict):
            raise BadJson("a message is a JSON object")
        if _may_repeat_keys(text, message):
            message = _careful.decode(text)
    except json.JSONDecodeError as exc:
        raise BadJson(f"not JSON: {exc.msg} at character {exc.pos}") from None
    except RecursionError:
        raise BadJson(f"nested deeper than {MAX_LEVELS} levels") from None
    if text.count("{") + text.count("[") > MAX_LEVELS:
        _check_depth(message)
    return cast(dict[str, Any], message)


def _decode(text: str) -> Any:
    """Decode as `_fast.decode` does, at half the cost where neither space nor error surrounds the value."""
    if text.startswith("{"):
        try:
            message, end = _scan(text, 0)
        except StopIteration:
            pass
        else:
            if end == len(text):
                return message
    return _fast.decode(text)


def _may_repeat_keys(text: str, message: dict[str, Any]) -> bool:
    """Whether the text could hold a key twice that the relay reads (cheap; may say yes in vain).

    Escapes can spell any key, so a text with `\\u` always may.
    """
    to, sender = message.get("to"), message.get("from")
    ids = ("id" in message) + (type(to) is dict and "id" in to) + (type(sender) is dict and "id" in sender)
    return (
        text.count('"id"') != ids
        or text.count('"to"') != ("to" in message)
        or text.count('"from"') != ("from" in message)
        or "\\u" in text
    )


def _check_depth(message: dict[str, Any]) -> None:
    level: list[Any] = [message]
    for _ in range(MAX_LEVELS):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise BadJson(f"nested deeper than {MAX_LEVELS} levels")


def _party(message: dict[str, Any], key: str) -> str:
    """Return `to.id` or `from.id` as the text that counts."""
    party = message.get(key)
    if isinstance(party, _Ambiguous) or isinstance(message, _Ambiguous):
        raise BadMessage(f"id, from or to stands twice in the message or in its {key}")
    if not isinstance(party, dict) or "id" not in party:
        raise BadMessage(
            f"{key}.id is missing"
            if party is None or isinstance(party, dict)
            else f"{key} is not an object with an id"
        )
    value = party["id"]
    if type(value) is int:
        value = str(value)
    elif not isinstance(value, str):
        raise BadMessage(f"{key}.id is neither a string nor an integer")
    try:
        return check_id(value)
    except BadId as exc:
        raise BadMessage(f"{key}.id: {exc}") from None


def _message_id(message: dict[str, Any]) -> str | int | None:
    if "id" not in message:
        return None
    value: Any = message["id"]
    if type(value) is int or type(value) is str:
        try:
            if 0 < len(str(value).encode()) <= MAX_MESSAGE_ID_BYTES:
                return value
        except (UnicodeEncodeError, ValueError):  # ValueError: an integer of too many digits
            pass
    raise BadMessage(f"id is a string of 1 to {MAX_MESSAGE_ID_BYTES} bytes or an integer of as many digits")


def _sequence_number(value: Any) -> int:
    if type(value) is int:
        return value
    raise BadMessage("ack is not an integer")


def _quote(text: str) -> bytes:
    return encode_basestring(text).encode()


_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def ack_frame(message_id: str | int, mid: str, time_ms: int) -> bytes:
    """Write the answer to a message that the broker confirmed (PROTOCOL section 3)."""
    return _dump({"ack": {"id": message_id, "mid": mid, "time": time_ms}}).encode()


def error_frame(error: AnswerableError) -> bytes:
    """Write the answer to a message that was refused (PROTOCOL section 4)."""
    fields: dict[str, Any] = {"code": error.code, "message": str(error)}
    if error.message_id is not None:
        fields["id"] = error.message_id
    if error.temporary:
        fields["temporary"] = True
    return _dump({"error": fields}).encode()


def pong_frame(ping: ClientPing) -> bytes:
    """Write the answer to a ping, as ASCII: what it holds may be half of a surrogate pair.

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

    What another program published and is no JSON (`is_message` false) stands there as a string, or under
    `message_base64` where it is no UTF-8 either.
    """
    if is_message:
        inner = b'"message":' + payload
    elif is_utf8(payload):
        inner = b'"message":' + _dump(payload.decode()).encode()
    else:
        inner = b'"message_base64":"' + base64.b64encode(payload) + b'"'
    mid_part = b"" if mid is None else b'"mid":' + _dump(mid).encode() + b","
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
        _fast.decode(body.decode())
    except (ValueError, RecursionError, BadJson):
        return False
    return True


def is_utf8(body: bytes) -> bool:
    """Tell whether an AMQP body may go out as a text frame."""
    try:
        body.decode()
    except UnicodeDecodeError:
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


_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [high + low for high in _BASE32 for low in _BASE32]


def _base32(number: int, pairs: int) -> str:
    return "".join(_PAIRS[number >> shift & 1023] for shift in range(10 * pairs - 10, -1, -10))


def mid_time_ms(mid: str | None) -> int | None:
    """Return the milliseconds since 1970 in a message id of a relay; None where it is none."""
    if mid is None or len(mid) != 26:
        return None
    try:
        digits = [_BASE32.index(character) for character in mid[:10]]
    except ValueError:
        return None
    return sum(digit << 5 * place for place, digit in enumerate(reversed(digits)))


class MessageIds:
    """Makes the relay's own ids of messages: ULIDs, which are unique, and in order within this process.

    26 characters of Crockford's base 32: 48 bits of milliseconds since 1970, then 80 that begin at random in
    each millisecond and count up within it. `clock` returns seconds since 1970.
    """

    __slots__ = ("_clock", "_count", "_head", "_random", "_time_ms")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._random = random.Random(os.urandom(32))
        self._time_ms = 0
        self._head = ""
        self._count = 0

    def next(self) -> tuple[str, int]:
        """Return a new id and its time in milliseconds since 1970; a clock set back does not undo the order."""
        now = int(self._clock() * 1000)
        if now > self._time_ms:
            self._time_ms = now
            self._head = _base32(now, 5) + _base32(self._random.getrandbits(50), 5)
            self._count = self._random.getrandbits(29)
        else:
            self._count += 1
        count = self._count
        mid = self._head + _PAIRS[count >> 20 & 1023] + _PAIRS[count >> 10 & 1023] + _PAIRS[count & 1023]
        return mid, self._time_ms
