"""The head of an HTTP request (RFC 9112): read within limits, and checked before anything is made of it.

What a proxy and this server could read differently is refused: requests are smuggled past a proxy that way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from imrelay.websocket.handshake import HOST, Refusal, is_upgrade

__all__ = ["Fields", "Framing", "Malformed", "check_request_line", "check_target", "framing_of", "read_fields"]

#: Bytes of all header lines together, and how many there may be.
MAX_HEAD, MAX_FIELDS = 32_768, 100

_REQUEST_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+ +[^\x00-\x20\x7f]+( +HTTP/[0-9]\.[0-9])?\r?\n")
_FIELD = re.compile(r"(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+):(?P<value>[^\x00-\x08\x0a-\x1f\x7f]*)\r?\n")
_LENGTH = re.compile(r"[0-9]{1,18}")
_ABSOLUTE = re.compile(r"https?://(?P<host>[^/?#]*)(?P<path>.*)", re.IGNORECASE | re.DOTALL)


class Malformed(ValueError):
    """The request cannot be served; `refusal` is the answer. A ValueError is what pywsgi expects."""

    def __init__(self, message: str, status: int = 400, code: str = "bad_request") -> None:
        super().__init__(message)
        self.refusal = Refusal(status, code, message)


@dataclass(frozen=True, slots=True)
class Framing:
    """Where the body of a request ends: after `length` bytes, or with the last of its chunks."""

    length: int
    chunked: bool


#: The framing of a request without a body.
_NO_BODY = Framing(0, False)


def check_request_line(line: str) -> None:
    """Raise `Malformed` for what is no request line (RFC 9112 section 3)."""
    if _REQUEST_LINE.fullmatch(line) is None:
        raise Malformed("the first line is no request: a method, a path and HTTP/1.1, separated by blanks")


class Fields:
    """The header fields of a request, in their order; names are compared without regard to case.

    It has what pywsgi and gunicorn ask of an `http.client.HTTPMessage`, whose parser takes seven times as long.
    """

    __slots__ = ("_fields",)

    #: What pywsgi asks for: nothing was wrong with them, else `Malformed` was raised.
    status = ""

    def __init__(self) -> None:
        #: Name in lower case, name, value.
        self._fields: list[tuple[str, str, str]] = []

    def add(self, name: str, value: str) -> None:
        """Append a field."""
        self._fields.append((name.lower(), name, value))

    def remove(self, name: str) -> None:
        """Remove all fields of a name, if there are any."""
        self._fields = [field for field in self._fields if field[0] != name.lower()]

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the value of the first field of a name."""
        lower = name.lower()
        for field in self._fields:
            if field[0] == lower:
                return field[2]
        return default

    def get_all(self, name: str) -> list[str]:
        """Return the values of all fields of a name."""
        return [field[2] for field in self._fields if field[0] == name.lower()]

    def items(self) -> list[tuple[str, str]]:
        """Return names and values; for gunicorn's access log."""
        return [(name, value) for _, name, value in self._fields]

    getheader = get  # the following are what pywsgi calls them
    __delitem__ = remove

    @property
    def headers(self) -> Iterator[str]:
        """The lines."""
        return (f"{name}: {value}\r\n" for _, name, value in self._fields)

    @property
    def typeheader(self) -> str | None:
        """The Content-Type."""
        return self.get("content-type")


def read_fields(stream: Any) -> Fields:
    """Read the header lines up to the empty one; raise `Malformed` for what is none, and beyond the limits."""
    fields = Fields()
    left, count = MAX_HEAD, 0
    while True:
        line: bytes = stream.readline(left)
        left -= len(line)
        if line in (b"\r\n", b"\n"):
            return fields
        if left <= 0:
            raise Malformed(f"the request head is over {MAX_HEAD} bytes")
        if count >= MAX_FIELDS:
            raise Malformed(f"the request has more than {MAX_FIELDS} headers")
        field = _FIELD.fullmatch(line.decode("latin-1"))
        if field is None:
            raise Malformed("a header line is no name, colon and value, or the head ended early")
        fields.add(field["name"], field["value"].lstrip(" \t"))
        count += 1


def check_target(target: str, method: str) -> tuple[str, str | None]:
    """Return path and query of a request target, and the host where it names one (RFC 9112 section 3.2).

    Such a host counts in place of the Host header. Raises `Malformed`.
    """
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        path = absolute["path"]
        return path if path.startswith("/") else f"/{path}", absolute["host"]
    if target.startswith("/") or (target == "*" and method == "OPTIONS"):
        return target, None
    raise Malformed("the request's target is no path")


def framing_of(fields: Fields, version: str) -> Framing:
    """Return where the body ends (RFC 9112 section 6); raise `Malformed` where that is not certain."""
    hosts = fields.get_all("host")
    is_plain = not is_upgrade({"HTTP_UPGRADE": ",".join(fields.get_all("upgrade"))})
    if len(hosts) > 1:
        raise Malformed("the request has several Host headers")
    if is_plain and not hosts and version == "HTTP/1.1":  # a WebSocket handshake has a check of its own
        raise Malformed("the request has no Host header")
    if is_plain and hosts and hosts[0] and HOST.fullmatch(hosts[0]) is None:
        raise Malformed("the Host header is malformed")
    codings, lengths = fields.get_all("transfer-encoding"), fields.get_all("content-length")
    if codings and lengths:
        raise Malformed("the request has both Content-Length and Transfer-Encoding")
    if codings:
        if version != "HTTP/1.1":
            raise Malformed("Transfer-Encoding needs HTTP/1.1")
        if len(codings) > 1 or codings[0].strip(" \t").lower() != "chunked":
            raise Malformed(
                "the only Transfer-Encoding that is understood is chunked", 501, "transfer_encoding_unknown"
            )
        return Framing(0, True)
    if not lengths:
        return _NO_BODY
    if len(lengths) > 1 or _LENGTH.fullmatch(lengths[0].strip(" \t")) is None:
        raise Malformed("Content-Length is no number of bytes, or stands there several times")
    return Framing(int(lengths[0]), False)
