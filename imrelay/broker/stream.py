"""The TCP or TLS connection to a broker: look-up of the name, TCP, TLS, each with a deadline; then bytes.

Opening blocks the greenlet that does it. After that nothing here blocks: a stream reports when the kernel has no
bytes to read, or no room to write.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gevent
from gevent import socket as gevent_socket

__all__ = ["READ_SIZE", "Addresses", "Stream", "open_stream"]

#: Bytes that are read at once.
READ_SIZE = 65_536
#: Bytes that TLS encrypts at once.
_TLS_WRITE_SIZE = 65_536
#: Seconds for the resolver to find the addresses of a name.
_NAME_TIMEOUT = 10.0

#: What `getaddrinfo` returns for each address: family, type, protocol, canonical name, address.
_Address = tuple[int, int, int, str, Any]


class Addresses:
    """Finds the addresses of names; one lookup for a name at a time, however often it is asked for.

    The resolver cannot be interrupted: a lookup that is late goes on, and a second call waits for the same one.
    """

    def __init__(self) -> None:
        self._lookups: dict[tuple[str, int], gevent.Greenlet] = {}

    def find(self, host: str, port: int) -> list[_Address]:
        """Return the addresses of a name; block for `_NAME_TIMEOUT` at most. Raises `OSError`."""
        try:
            host.encode("idna")
        except UnicodeError as exc:  # gevent's threads would print it
            raise OSError(f"{host!r} cannot be the name of a host: {exc}") from None
        key = (host, port)
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = gevent.spawn(_look_up, host, port)
            lookup.name = f"lookup:{host}"
            lookup.rawlink(lambda _: self._lookups.pop(key, None))
        lookup.join(_NAME_TIMEOUT)
        if not lookup.ready():
            raise TimeoutError(f"the name {host} was not resolved within {_NAME_TIMEOUT:g} s")
        found = lookup.get()
        if isinstance(found, OSError):
            raise found
        return list(found)


def _look_up(host: str, port: int) -> list[_Address] | OSError:
    """Return the addresses or why there are none: an exception of a greenlet would be printed."""
    try:
        return list(gevent_socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except OSError as exc:
        return exc


class Stream:
    """A connected socket from which bytes are read and to which they are written; neither ever blocks."""

    __slots__ = ("_descriptor", "_sock", "deadline", "is_tls", "wants_to_read", "wants_to_write")

    def __init__(self, sock: Any, *, is_tls: bool, deadline: float) -> None:
        sock.settimeout(0.0)
        self._sock = sock
        # reads and writes do not block, so that they need not go through gevent's socket
        self._descriptor: int = sock.fileno()
        self.is_tls = is_tls
        #: Until when the AMQP handshake has to be done, by the monotonic clock.
        self.deadline = deadline
        #: TLS alone: whether `receive` can go on only when the kernel takes something, and `send` only when
        #: something was received (a change of keys).
        self.wants_to_write = self.wants_to_read = False

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def receive(self) -> bytes | None:
        """Return up to `READ_SIZE` bytes that have arrived; None where there are none, b"" at the end.

        Raises `OSError` where the connection is lost.
        """
        try:
            if not self.is_tls:
                return os.read(self._descriptor, READ_SIZE)
            self.wants_to_write = False
            data: bytes = self._sock.recv(READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        except ssl.SSLWantWriteError:
            self.wants_to_write = True
            return None
        return data

    @property
    def has_decrypted(self) -> bool:
        """Whether TLS holds decrypted bytes, which no watcher reports."""
        return self.is_tls and self._sock.pending() > 0

    def send(self, data: bytes | memoryview) -> int:
        """Write what the kernel takes, and return how much that was.

        TLS: what was not taken has to be given again, with the same bytes and at least as many: a part of it may
        have been sent already. Raises `OSError` where the connection is lost.
        """
        try:
            if not self.is_tls:
                return os.write(self._descriptor, data)
            self.wants_to_read = False
            return int(self._sock.send(memoryview(data)[:_TLS_WRITE_SIZE]))
        except (BlockingIOError, ssl.SSLWantWriteError):
            return 0
        except ssl.SSLWantReadError:
            self.wants_to_read = True
            return 0

    def set_low_water(self, size: int) -> None:
        """Have the kernel report the socket as readable only from so many bytes on (`SO_RCVLOWAT`)."""
        with suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def close(self) -> None:
        """Close the socket; nothing may be read or written afterwards."""
        self._descriptor = -1
        with suppress(OSError):
            self._sock.close()


def open_stream(
    addresses: list[_Address],
    *,
    step_timeout: float,
    timeout: float,
    prepare: Callable[[Any], None],
    tls: tuple[ssl.SSLContext, str] | None,
) -> Stream:
    """Connect to the first of the addresses that can be reached; block until that is done.

    `step_timeout` (seconds) is for TCP and for TLS, each; `timeout` is for all that has to be done with one
    address, and the stream's `deadline` says what is left of it. `prepare` sets options of each new socket. `tls`:
    the context, and the name that the broker's certificate has to be for. Raises what was wrong with the last
    address, an `OSError`.
    """
    problem: OSError = OSError("the name stands for no address")
    for family, kind, protocol, _, address in addresses:
        deadline = time.monotonic() + timeout
        try:
            sock = gevent_socket.socket(family, kind, protocol)
        except OSError as exc:  # a family of addresses that this machine does not have
            problem = exc
            continue
        try:
            prepare(sock)
            _connect(sock, address, step_timeout)
            if tls is not None:
                context, name = tls
                sock = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
                _shake_hands(sock, address, step_timeout)
            return Stream(sock, is_tls=tls is not None, deadline=deadline)
        except OSError as exc:
            sock.close()
            problem = exc
        except BaseException:  # the greenlet is killed
            sock.close()
            raise
    raise problem


def _connect(sock: Any, address: Any, timeout: float) -> None:
    sock.settimeout(timeout)
    try:
        sock.connect(address)
    except TimeoutError as exc:
        if exc.errno:  # the system's own, which comes later as a rule
            raise
        raise TimeoutError(f"no TCP connection to {_show(address)} within {timeout:g} s") from None


def _shake_hands(sock: Any, address: Any, timeout: float) -> None:
    """Do the handshake of TLS, with gevent's or the standard library's socket."""
    sock.settimeout(0.0)
    with gevent.Timeout(timeout, TimeoutError(f"no TLS with {_show(address)} within {timeout:g} s")):
        while True:
            try:
                return sock.do_handshake()  # type: ignore[no-any-return]
            except ssl.SSLWantReadError:
                gevent_socket.wait_read(sock.fileno())
            except ssl.SSLWantWriteError:
                gevent_socket.wait_write(sock.fileno())


def _show(address: Any) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
