"""The opening handshake as a check of the WSGI environ (RFC 6455 section 4.2), and the Origin rule."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imrelay.websocket.deflate import Deflate, negotiate_deflate

__all__ = [
    "Handshake",
    "Refusal",
    "check_handshake",
    "is_loopback",
    "is_upgrade",
    "names_loopback",
    "origin_allowed",
]

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
#: A Host header: a name, an IPv4 address or one of IPv6 in brackets, and a port (RFC 9110 section 7.2).
HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+;=-]+)(?::(?P<port>[0-9]{0,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<netloc>.+)")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP answer in place of the upgrade; its body is `{"error": {"code": …, "message": …}}`."""

    status: int
    code: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the 101 answer says, and the codec if compression was agreed on."""

    accept: str
    subprotocol: str | None
    extensions: str | None
    deflate: Deflate | None


def is_upgrade(environ: Mapping[str, Any]) -> bool:
    """Tell whether the request asks for a WebSocket; everything else is plain HTTP."""
    return "websocket" in _tokens(environ.get("HTTP_UPGRADE", "").lower())


def check_handshake(
    environ: Mapping[str, Any], *, subprotocols: Sequence[str] = (), permessage_deflate: bool = False
) -> Handshake | Refusal:
    """Check a request that asks for a WebSocket; return what to agree on, or why not.

    `subprotocols` are those of the server, in its order of preference.
    """
    if environ.get("REQUEST_METHOD") != "GET":
        return _bad("a WebSocket handshake is a GET")
    if not _is_http_1_1(environ.get("SERVER_PROTOCOL", "")):
        return _bad("a WebSocket handshake needs HTTP/1.1")
    if HOST.fullmatch(environ.get("HTTP_HOST", "")) is None:
        return _bad("the Host header is missing or malformed")
    if "upgrade" not in _tokens(environ.get("HTTP_CONNECTION", "").lower()):
        return _bad("the Connection header does not name Upgrade")
    if environ.get("HTTP_TRANSFER_ENCODING") or environ.get("CONTENT_LENGTH", "0").strip("0"):
        return _bad("a WebSocket handshake has no body")
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != "13":
        version = ("Sec-WebSocket-Version", "13")
        return Refusal(426, "bad_version", "this server speaks WebSocket version 13 alone", (version,))
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "")
    if _KEY.fullmatch(key) is None:
        return _bad("Sec-WebSocket-Key is not the base64 form of 16 bytes")
    extensions = deflate = None
    if permessage_deflate and environ.get("HTTP_SEC_WEBSOCKET_EXTENSIONS"):
        try:
            agreed = negotiate_deflate(environ["HTTP_SEC_WEBSOCKET_EXTENSIONS"])
        except ValueError as error:
            return _bad(str(error))
        if agreed is not None:
            extensions, deflate = agreed
    offered = frozenset(_tokens(environ.get("HTTP_SEC_WEBSOCKET_PROTOCOL", "")))
    subprotocol = next((name for name in subprotocols if name in offered), None)
    accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()
    return Handshake(accept, subprotocol, extensions, deflate)


def origin_allowed(environ: Mapping[str, Any], allowed: Sequence[str]) -> bool:
    """Tell whether the page that opens this socket may: exact matches of scheme, host and port.

    With nothing in `allowed`, the page must come from the host that the request names; a Host without a port
    stands for the default port of the page's scheme, since a proxy may have taken off the TLS. A request
    without Origin is not from a browser and passes; `null`, or anything malformed, does not.
    """
    origin = environ.get("HTTP_ORIGIN")
    if origin is None:
        return True
    asked = _parse_origin(origin)
    if asked is None:
        return False
    if allowed:
        return any(asked == _parse_origin(entry) for entry in allowed)
    scheme, host, port = asked
    if environ.get("wsgi.url_scheme") == "https":
        scheme = "https"
    named = _parse_netloc(environ.get("HTTP_HOST", ""), _DEFAULT_PORTS.get(scheme))
    return named == (host, port)


def is_loopback(address: Any) -> bool:
    """Tell whether a socket's address (`getsockname`) is one that only programs of this machine reach.

    A Unix socket has a path and no address: only a proxy on this machine connects to it.
    """
    return isinstance(address, tuple) and _is_loopback_ip(str(address[0]))


def names_loopback(host: str) -> bool:
    """Tell whether a Host header names this machine as nobody's DNS can: localhost, 127.0.0.0/8 or [::1].

    A page of evil.example whose name suddenly resolves to 127.0.0.1 still sends `Host: evil.example`.
    """
    match = HOST.fullmatch(host)
    if match is None:
        return False
    name = match["host"].lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or _is_loopback_ip(name.strip("[]"))


def _is_loopback_ip(text: str) -> bool:
    if text == "127.0.0.1":  # as it mostly is; the rest takes several microseconds
        return True
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_handshake", message)


def _tokens(header: str) -> list[str]:
    return [token.strip(" \t") for token in header.split(",")]


def _is_http_1_1(version: str) -> bool:
    major, _, minor = version.removeprefix("HTTP/").partition(".")
    return major == "1" and minor.isascii() and minor.isdigit() and int(minor) >= 1


def _parse_origin(origin: str) -> tuple[str, str, int] | None:
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        return None
    scheme = match["scheme"].lower()
    netloc = _parse_netloc(match["netloc"], _DEFAULT_PORTS.get(scheme))
    return None if netloc is None else (scheme, *netloc)


def _parse_netloc(netloc: str, default_port: int | None) -> tuple[str, int] | None:
    match = HOST.fullmatch(netloc)
    if match is None:
        return None
    port = int(match["port"]) if match["port"] else default_port
    return None if port is None else (match["host"].lower(), port)
