"""The body of a request, read by its length or in chunks, within limits of size and time.

pywsgi's own reader reads a body to its end although the application did not ask for it, character by character,
however long that is, and lets no other greenlet run while bytes are there.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, NoReturn

import gevent

from imrelay.websocket.fairness import yield_turn
from imrelay.websocket.handshake import Refusal

__all__ = ["NO_BODY", "Allowance", "BodyError", "RequestBody", "SocketReader"]

#: Bytes that one line with the size of a chunk may have, its extensions included, and all extensions of a body.
_MAX_SIZE_LINE, _MAX_EXTENSIONS = 1024, 16_384
#: Trailers of a chunked body, which are thrown away: their number and their bytes.
_MAX_TRAILERS, _MAX_TRAILER_BYTES = 32, 8192
#: Bytes read in one go; a length that a client announces allocates nothing.
_PIECE = 65_536
#: Seconds that a greenlet reads before all others get a turn.
_TURN = 0.001

_SIZE_LINE = re.compile(rb"(?P<size>[0-9A-Fa-f]{1,16})(?P<extensions>[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n")


class BodyError(OSError):
    """The body cannot be read; `refusal` is what the handler answers if the application has not begun to."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Allowance:
    """Seconds that may be spent on waiting for a client in all; use it as a context around each wait.

    It raises `TimeoutError` when they are used up.
    """

    __slots__ = ("_begun", "_left", "_timeout")

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._begun = 0.0
        self._timeout: gevent.Timeout | None = None

    def __enter__(self) -> None:
        self._begun = monotonic()
        self._timeout = gevent.Timeout.start_new(max(0.0, self._left))

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        timeout, self._timeout = self._timeout, None
        assert timeout is not None
        timeout.close()
        self._left -= monotonic() - self._begun
        if error is timeout:
            raise TimeoutError("the client took too long") from None


class SocketReader(io.RawIOBase):
    """The raw stream below a `BufferedReader`: every read of the client's socket goes through it.

    While bytes keep coming a greenlet would never wait, and no other would run: so it yields after `_TURN`.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._since = monotonic()
        #: What is left of the time for the body, while one is read.
        self.allowance: Allowance | None = None

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes; 0 at the end of the stream. Raises OSError."""
        if self._sock.gettimeout() != 0.0 and monotonic() - self._since > _TURN:
            yield_turn()
            self._since = monotonic()
        allowance = self.allowance
        if allowance is None:
            return int(self._sock.recv_into(buffer))
        with allowance:
            return int(self._sock.recv_into(buffer))


class RequestBody:
    """`wsgi.input` (PEP 3333) of one request. Reading raises `BodyError`, from then on each time."""

    __slots__ = ("_before", "_chunked", "_extensions", "_left", "_max_size", "_read", "_stream", "failure")

    def __init__(
        self,
        stream: Any,
        *,
        length: int = 0,
        chunked: bool = False,
        max_size: int | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """`before` is called once, before the first read: the client may wait for 100 (RFC 9110 section 10.1.1).

        `max_size` in bytes bounds what is read; None does not.
        """
        self._stream = stream
        self._chunked = chunked
        #: Bytes of the body, or of the chunk, that have not been read.
        self._left = length
        self._max_size = max_size
        self._read = self._extensions = 0
        self._before = before
        #: Why no more can be read, if so.
        self.failure: BodyError | None = None
        if max_size is not None and length > max_size:
            self.failure = BodyError(_too_large(max_size))

    @property
    def is_complete(self) -> bool:
        """Whether all of it was read: then the next request follows in the stream."""
        return self.failure is None and not self._left and not self._chunked

    @property
    def unread(self) -> float:
        """Bytes that are left, as far as the client has announced them."""
        return float("inf") if self.failure is not None or self._before is not None else self._left

    def read(self, size: int | None = -1) -> bytes:
        """Read so many bytes, fewer only at the end; all that is left where `size` is negative or None."""
        pieces: list[bytes] = []
        left = float("inf") if size is None or size < 0 else size
        while left and (piece := self._some(int(min(left, _PIECE)), line=False)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def readline(self, size: int | None = -1) -> bytes:
        """Read up to the end of a line, but so many bytes at most."""
        pieces: list[bytes] = []
        left = float("inf") if size is None or size < 0 else size
        while left and (piece := self._some(int(min(left, _PIECE)), line=True)):
            pieces.append(piece)
            left -= len(piece)
            if piece.endswith(b"\n"):
                break
        return b"".join(pieces)

    def readlines(self, hint: int | None = None) -> list[bytes]:
        """Read the lines that are left."""
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def drain(self, size: int) -> bool:
        """Throw away what is left, up to so many bytes; tell whether that was all of it."""
        try:
            while size > 0 and self.unread <= size and (piece := self._some(min(size, _PIECE), line=False)):
                size -= len(piece)
        except BodyError:
            return False
        return self.is_complete

    def _discard(self) -> None:
        """Called by pywsgi when the application has answered; the handler sees to it by `drain`."""

    def _some(self, size: int, *, line: bool) -> bytes:
        """Read at least one byte, and as many as `size`, of what is left; nothing at its end."""
        if self.failure is not None:
            raise self.failure
        before, self._before = self._before, None
        try:
            if before is not None:
                before()
            if self._chunked and not self._left:
                self._left = self._next_chunk()
            size = min(size, self._left)
            if not size:
                return b""
            piece: bytes = self._stream.readline(size) if line else self._stream.read(size)
            if not piece or (len(piece) < size and not (line and piece.endswith(b"\n"))):
                self._fail(_bad("the request's body ended early"))
            self._left -= len(piece)
            self._read += len(piece)
            if self._chunked and not self._left and self._stream.read(2) != b"\r\n":
                self._fail(_bad("a chunk of the request's body is longer than it says"))
        except BodyError:
            raise
        except TimeoutError:
            self._fail(Refusal(408, "request_timeout", "the request's body took too long"))
        except OSError as error:
            self._fail(_bad(f"the connection broke: {error.strerror or error}"))
        return piece

    def _next_chunk(self) -> int:
        """Read the size of the next chunk; 0 at the last one, whose trailers are read, too."""
        line: bytes = self._stream.readline(_MAX_SIZE_LINE)
        found = _SIZE_LINE.fullmatch(line)
        if found is None:
            self._fail(_bad("the size of a chunk is malformed, or has too long an extension"))
        size = int(found["size"], 16)
        self._extensions += len(found["extensions"] or b"")
        if self._extensions > _MAX_EXTENSIONS:
            self._fail(_bad(f"the extensions of the body's chunks are over {_MAX_EXTENSIONS} bytes"))
        if self._max_size is not None and self._read + size > self._max_size:
            self._fail(_too_large(self._max_size))
        if not size:
            self._skip_trailers()
            self._chunked = False
        return size

    def _skip_trailers(self) -> None:
        left = _MAX_TRAILER_BYTES
        for _ in range(_MAX_TRAILERS + 1):
            line: bytes = self._stream.readline(left)
            left -= len(line)
            if line == b"\r\n":
                return
            if left <= 0 or _TRAILER.fullmatch(line) is None:
                break
        self._fail(_bad("the trailers of the request's body are malformed, or too many"))

    def _fail(self, refusal: Refusal) -> NoReturn:
        self.failure = BodyError(refusal)
        raise self.failure from None


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_request", message)


def _too_large(size: int) -> Refusal:
    return Refusal(413, "too_large", f"the request's body is over {size} bytes, the limit here")


#: The body of a request that has none, and of one whose body has been dealt with.
NO_BODY = RequestBody(None)
