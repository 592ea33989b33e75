"""The bytes that a slow peer has not taken yet, and the two bounds on them.

    bytes   behind the write that is under way, at most `max_send_buffer` bytes wait. One write may be larger
            by itself and does not count, else a big message could never be sent to anybody; a second one may not.
    time    every write is taken by the kernel within `send_timeout` of being queued. One that is larger than
            `max_send_buffer` gets `send_timeout` for each `max_send_buffer` bytes that it has begun, so by
            default 1 MiB in 10 seconds, and something must be taken in each `send_timeout`. What is queued
            behind it gets as long as it does.

There is an outbox only while something waits.
"""

from __future__ import annotations

from collections import deque
from typing import Any

__all__ = ["MAX_WRITE", "Outbox", "Write"]

#: Bytes given to the kernel in one call at most, so that one socket's turn stays short.
MAX_WRITE = 262_144
#: Small writes are joined up to about this many bytes.
_JOIN = 65_536


class Write:
    """Bytes that were given in one call; whole frames."""

    __slots__ = ("data", "deadline", "is_large", "sender", "taken")

    def __init__(self, data: memoryview, deadline: float, is_large: bool) -> None:
        self.data = data
        self.deadline = deadline
        #: By itself over `max_send_buffer`.
        self.is_large = is_large
        #: The greenlet that is blocked until the bytes are taken, if any.
        self.sender: Any = None
        self.taken = False


class Outbox:
    """A queue of writes. Times are those of `time.monotonic`, in seconds."""

    __slots__ = ("_has_large", "_max_bytes", "_pong", "_stalls_at", "_started", "_timeout", "_waiting", "_writes")

    def __init__(self, *, max_bytes: int, timeout: float, started: bool) -> None:
        """`started`: the kernel took a part of the write that is added first."""
        self._writes: deque[Write] = deque()
        self._waiting = 0  # bytes of the writes that are not large
        self._has_large = False
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._started = started
        self._stalls_at = 0.0
        self._pong: Write | None = None

    def __bool__(self) -> bool:
        return bool(self._writes)

    @property
    def due(self) -> float:
        """The moment from which the peer counts as too slow, if nothing is taken until then."""
        return min(self._writes[0].deadline, self._stalls_at)

    @property
    def is_at_frame(self) -> bool:
        """Tell whether a frame could be sent now without landing inside another."""
        return not self._started

    def has_room(self, size: int) -> bool:
        """Tell whether a write of `size` bytes may be added."""
        if size > self._max_bytes:
            return not self._has_large
        if not self._writes or self._writes[0].is_large:
            return self._waiting + size <= self._max_bytes
        return self._waiting - len(self._writes[0].data) + size <= self._max_bytes

    def add(self, data: bytes | memoryview, now: float) -> Write:
        """Queue a write; the caller has checked `has_room`."""
        size = len(data)
        deadline = now + self._timeout * max(1, -(-size // self._max_bytes))
        if self._writes:
            deadline = max(deadline, self._writes[-1].deadline)
        else:
            self._stalls_at = now + self._timeout
        write = Write(memoryview(data), deadline, size > self._max_bytes)
        self._writes.append(write)
        if write.is_large:
            self._has_large = True
        else:
            self._waiting += size
        return write

    def add_pong(self, data: bytes, now: float) -> None:
        """Queue a pong in place of one that still waits: the latest ping alone needs an answer (RFC 5.5.3)."""
        if self._pong is None:
            self._pong = self.add(data, now)
        else:
            self._waiting += len(data) - len(self._pong.data)
            self._pong.data = memoryview(data)

    def next_bytes(self) -> bytes | memoryview:
        """Return what to give to the kernel next; after a refusal the same bytes again, perhaps more."""
        writes = self._writes
        head = writes[0].data
        if len(writes) == 1 or len(head) >= _JOIN:
            if writes[0] is self._pong:
                self._pong = None
            return head[:MAX_WRITE]
        self._pong = None  # it may be among those that are joined
        joined = bytearray()
        for write in writes:
            joined += write.data[: _JOIN - len(joined)]
            if len(joined) == _JOIN:
                break
        return memoryview(joined)

    def took(self, size: int, now: float) -> list[Write]:
        """Note that the kernel took `size` bytes; return the writes that are done."""
        done = []
        writes = self._writes
        self._stalls_at = now + self._timeout
        while size:
            write = writes[0]
            part = min(size, len(write.data))
            size -= part
            write.data = write.data[part:]
            if not write.is_large:
                self._waiting -= part
            self._started = len(write.data) > 0
            if not self._started:
                writes.popleft()
                write.taken = True
                if write.is_large:
                    self._has_large = False
                done.append(write)
        return done

    def drop(self) -> list[Write]:
        """Forget everything; return the writes that will never be taken."""
        dropped = list(self._writes)
        self._writes.clear()
        self._pong = None
        return dropped
