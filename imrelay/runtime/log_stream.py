"""A text stream that never blocks its writers: a native thread writes the text to a descriptor.

A pipe that nobody reads, a terminal that is paused (Ctrl-S) or a slow disk delays the log and nothing else. What
does not fit into the queue meanwhile is dropped and counted; the count is written when there is room again.
"""

from __future__ import annotations

import errno
import io
import os
from collections import deque
from collections.abc import Callable

from gevent import monkey

__all__ = ["LogStream"]

#: What may wait to be written: pieces of text (a line each, as a rule), and bytes.
_MAX_PIECES, _MAX_BYTES = 10_000, 1_048_576
#: The share of either that has to be free before text is accepted again after some was dropped.
_ROOM_AGAIN = 0.5
#: Bytes that are written at once; a pipe takes 64 KiB by default.
_WRITE_SIZE = 16_384
#: Seconds before the next attempt to write after the system has refused one (a full disk).
_REFUSED_PAUSE = 0.1
#: Errors after which no other write can succeed: the reader of the pipe has gone, or the descriptor was closed.
_NOBODY_READS = (errno.EPIPE, errno.EBADF)

# The modules are patched: only the originals make and wait for native threads.
_make_lock = monkey.get_original("_thread", "allocate_lock")
_make_reentrant_lock = monkey.get_original("_thread", "RLock")
_start_thread = monkey.get_original("_thread", "start_new_thread")
_sleep = monkey.get_original("time", "sleep")


class LogStream(io.TextIOBase):
    """Takes text at once and writes it to `descriptor` in the order in which it came.

    `notice` makes the line that says how many lines were dropped; it is called in the native thread and may not
    use gevent. Text may be written from any greenlet and any thread, also while other text is being written (a
    finalizer that warns). `finish` has to be called before the process ends.
    """

    def __init__(
        self,
        descriptor: int,
        notice: Callable[[int], str],
        *,
        max_pieces: int = _MAX_PIECES,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        self._descriptor = descriptor
        self._notice = notice
        self._max_pieces, self._max_bytes = max_pieces, max_bytes
        #: Encoded text; a number stands for so many dropped lines.
        self._queue: deque[bytes | int] = deque()
        self._bytes = 0
        #: Lines dropped after the last that is in the queue; None while nothing is dropped.
        self._dropped: int | None = None
        #: Guards the queue and the counts; never held while writing.
        self._lock = _make_reentrant_lock()
        self._is_writing = False
        self._is_finished = False
        #: Released when there is something to write, and when everything has been written.
        self._work, self._done = _make_lock(), _make_lock()
        self._work.acquire()
        self._done.acquire()
        _start_thread(self._run_writer, ())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the text; what it lacks is escaped."""
        return "utf-8"

    def fileno(self) -> int:
        """Return the descriptor that is written to."""
        return self._descriptor

    def isatty(self) -> bool:
        """Tell whether a terminal reads it."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Tell that it takes text."""
        return True

    def write(self, text: str) -> int:
        """Queue text, or drop and count it where there is no room; returns at once."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if self._is_finished:
                return len(text)
            share = 1.0 if self._dropped is None else _ROOM_AGAIN
            if len(self._queue) >= share * self._max_pieces or self._bytes + len(data) > share * self._max_bytes:
                self._dropped = (self._dropped or 0) + text.count("\n")
                return len(text)
            if self._dropped is not None:
                self._queue.append(self._dropped)
                self._dropped = None
            self._queue.append(data)
            self._bytes += len(data)
            self._wake()
        return len(text)

    def finish(self, seconds: float) -> bool:
        """Block until everything has been written, for at most so many seconds; tell whether it has.

        What comes afterwards is thrown away. Idempotent.
        """
        with self._lock:
            self._is_finished = True
            is_writing = self._is_writing
        return not is_writing or bool(self._done.acquire(timeout=seconds))

    def _wake(self) -> None:
        if not self._is_writing:
            self._is_writing = True
            self._work.release()

    def _run_writer(self) -> None:
        """Write what is queued; runs in a thread of its own until the process ends."""
        while True:
            self._work.acquire()
            while pieces := self._take():
                self._write(pieces)
            if self._is_finished:
                self._done.release()
                return

    def _take(self) -> list[bytes | int]:
        """Take from the queue what is to be written next; nothing where it is empty."""
        pieces: list[bytes | int] = []
        size = 0
        with self._lock:
            while self._queue and size < _WRITE_SIZE:
                piece = self._queue.popleft()
                if isinstance(piece, bytes):
                    self._bytes -= len(piece)
                    size += len(piece)
                pieces.append(piece)
            if not pieces and self._dropped is not None:
                pieces.append(self._dropped)
                self._dropped = None
            if not pieces:
                self._is_writing = False
        return pieces

    def _write(self, pieces: list[bytes | int]) -> None:
        """Write all of it, however long that takes; where the system refuses it, it counts as dropped."""
        view = memoryview(b"".join(self._notice(p).encode() if isinstance(p, int) else p for p in pieces))
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:  # another process that shares the descriptor has made it non-blocking
                _sleep(_REFUSED_PAUSE)
            except OSError as exc:
                if exc.errno not in _NOBODY_READS:
                    with self._lock:
                        lost = sum(p if isinstance(p, int) else p.count(b"\n") for p in pieces)
                        self._dropped = (self._dropped or 0) + lost
                    _sleep(_REFUSED_PAUSE)
                return
