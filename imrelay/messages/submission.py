"""Reads what a browser sends: a message, or a frame of `imrelay.v1` (PROTOCOL sections 1, 3 and 5).

Pure functions on bytes. A message is passed on as the bytes in which it came; what the relay needs of it is read
by msgspec, which checks the rest without making objects of it. Whatever is unusual or wrong is read by Python's
own json, which is slower and reports what is wrong.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any, NamedTuple

import msgspec

from imrelay.errors import AnswerableError, BadId, BadJson, BadMessage, FromMismatch

__all__ = ["ClientAck", "ClientPing", "Submission", "check_id", "is_utf8", "parse"]

#: Longest id of a user, in bytes of UTF-8.
MAX_ID_BYTES = 128
#: Longest `id` of a message, in bytes of UTF-8.
MAX_MESSAGE_ID_BYTES = 64
#: Deepest nesting of a message; the message itself is level 1.
MAX_LEVELS = 32
#: Bytes of a long message: in one of that size it is quicker to search for brackets than to count all.
_LONG = 1024
#: Ids that are remembered as valid.
_KNOWN_IDS = 4096


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


#: Most messages go to ids that have just been checked.
_check_known_id = lru_cache(_KNOWN_IDS)(check_id)


def is_utf8(octets: bytes) -> bool:
    """Tell whether bytes may go out as a text frame."""
    if octets.isascii():
        return True
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


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


_careful = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_integer, object_pairs_hook=_object)


class _To:
    """Where `to.id` stands."""


class _From:
    """Where `from.id` stands."""


class _Id:
    """Where the message's own `id` stands."""


class _Recipient(msgspec.Struct, gc=False):
    id: _To


class _Sender(msgspec.Struct, gc=False):
    id: _From


class _Read(msgspec.Struct, gc=False):
    """What the relay reads of a message; all else is checked to be JSON, and nothing is made of it."""

    to: _Recipient | msgspec.UnsetType = msgspec.UNSET
    sender: _Sender | msgspec.UnsetType = msgspec.field(name="from", default=msgspec.UNSET)
    id: _Id | msgspec.UnsetType = msgspec.UNSET
    ack: int | msgspec.UnsetType = msgspec.UNSET


#: The ids of the message that is being read, by where they stand.
_noted: dict[type, str | int] = {}


def _note(place: type, value: Any) -> Any:
    """Note an id where the decoder meets it, so that one that is given twice is noticed."""
    if place in _noted or not (type(value) is str or type(value) is int):
        raise ValueError("read it with json")
    _noted[place] = value
    return place()


_read = msgspec.json.Decoder(_Read, dec_hook=_note).decode
#: Makes a named tuple without the call of its `__new__`, which is slower.
_new: Callable[..., Submission] = tuple.__new__


def parse(payload: bytes, binary: bool, user: str) -> Submission | ClientAck | ClientPing:
    """Read what the browser of `user` sent; the payload of a text frame is known to be UTF-8.

    What has no `to` but an `ack` or a `ping` is no message but a frame of `imrelay.v1`. Raises `BadJson`,
    `BadMessage` or `FromMismatch`, with the message's `id` where that could be read.
    """
    _noted.clear()
    try:
        read = _read(payload)
        is_short = len(payload) < _LONG
        if not (is_short and payload.count(b"{") + payload.count(b"[") <= MAX_LEVELS) and _is_deep(payload):
            return _parse_carefully(payload, binary, user)
        to, sender, message_id = _noted.get(_To), _noted.get(_From), _noted.get(_Id)
        if to is None:
            if type(read.ack) is int and not _noted and not binary:
                return ClientAck(read.ack)
        elif (sender is None or sender == user) and not (binary and not is_utf8(payload)):
            to = _check_known_id(to if type(to) is str else str(to))
            if message_id is not None:
                _check_message_id(message_id)
            body = payload if sender is not None else _add_sender(payload, user)
            return _new(Submission, (to, body, binary, message_id))
    except (msgspec.DecodeError, AnswerableError, BadId, RecursionError, ValueError):
        pass
    return _parse_carefully(payload, binary, user)


#: For the depth all brackets are alike, and nothing counts but brackets and quotes.
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b'"[]{}'))
_BETWEEN_QUOTES = re.compile(rb'"[^"]*"')


def _has_many_brackets(text: bytes) -> bool:
    """Tell whether a text has over `MAX_LEVELS` that open; quicker for a long one than to count them all."""
    found = 0
    for bracket in (b"{", b"["):
        at = text.find(bracket)
        while at >= 0:
            found += 1
            if found > MAX_LEVELS:
                return True
            at = text.find(bracket, at + 1)
    return False


def _is_deep(text: bytes) -> bool:
    """Tell whether a JSON text is nested deeper than `MAX_LEVELS`: remove one level after the other."""
    if not _has_many_brackets(text):
        return False
    bare = text.replace(rb"\\", b"").replace(rb"\"", b"").translate(_BRACKETS, _NO_BRACKETS)
    bare = _BETWEEN_QUOTES.sub(b"", bare)
    for _ in range(MAX_LEVELS):
        bare = bare.replace(b"[]", b"")
    return bare != b""


def _add_sender(payload: bytes, user: str) -> bytes:
    brace = payload.index(b"{") + 1
    return b"".join((payload[:brace], b'"from":{"id":', _quote(user), b"},", payload[brace:]))


def _parse_carefully(payload: bytes, binary: bool, user: str) -> Submission | ClientAck | ClientPing:
    """Read a message with json; raise what is wrong with it."""
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
    message_id = _check_message_id(message["id"]) if "id" in message else None
    try:
        to = _party(message, "to")
        if "from" not in message:
            payload = _add_sender(payload, user)
        elif _party(message, "from") != user:
            raise FromMismatch("from.id is not the id of this session")
    except AnswerableError as exc:
        exc.message_id = message_id
        raise
    return Submission(to, payload, binary, message_id)


def _load(text: str) -> dict[str, Any]:
    """Decode the text of a message: an object, at most `MAX_LEVELS` deep, without NaN or infinities."""
    try:
        message = _careful.decode(text)
    except json.JSONDecodeError as exc:
        raise BadJson(f"not JSON: {exc.msg} at character {exc.pos}") from None
    except RecursionError:
        raise BadJson(f"nested deeper than {MAX_LEVELS} levels") from None
    if not isinstance(message, dict):
        raise BadJson("a message is a JSON object")
    if text.count("{") + text.count("[") > MAX_LEVELS:
        _check_depth(message)
    return message


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


def _check_message_id(value: Any) -> str | int:
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
