"""What goes to the broker: the frames of one turn of the event loop are sent by one system call.

They are written at once while the kernel takes them, without a watcher; what it does not take waits in order, and
a watcher then sends it. Acknowledgements, which nobody waits for, are delayed by a few milliseconds and sent
together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import gevent

from imrelay.broker.stream import Stream

__all__ = ["Outbound"]

#: Event of libev's io watchers: the descriptor is writable.
_WRITE = 2
#: Seconds for which acknowledgements are delayed: sent one by one, each would take a system call on both sides.
#: What a crash in that time leaves unacknowledged is delivered again with the same message id.
_LATER = 0.005


class Outbound:
    """The frames that one connection sends; all of it may be called from the event loop.

    `on_failure` is called once with the `OSError` that a write met; nothing is sent from then on.
    """

    def __init__(self, on_failure: Callable[[OSError], None]) -> None:
        #: Called when the kernel has taken all that was to be sent, after it had not for a while.
        self.on_drained: Callable[[], None] | None = None
        self._on_failure = on_failure
        self._loop = gevent.get_hub().loop
        self._stream: Stream | None = None
        #: What was given to `emit` since the last flush.
        self._frames: list[bytes] = []
        self._flush_is_due = False
        # Begun by `again` and stopped when it fires: one without `repeat` fires at once when it is started anew.
        self._later = self._loop.timer(_LATER, _LATER)
        #: What the kernel did not take, in order.
        self._unsent: deque[memoryview] = deque()
        self._writer: Any = None

    def start(self, stream: Stream) -> None:
        """Send over this stream from now on."""
        self._stream = stream
        self._writer = self._loop.io(stream.fileno(), _WRITE)

    def stop(self) -> None:
        """Send nothing more, and forget what waits; to be called before the stream is closed."""
        self._stream = None
        self._frames.clear()
        self._unsent.clear()
        for watcher in (self._later, self._writer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._writer = None

    @property
    def has_unsent(self) -> bool:
        """Whether the kernel did not take all that was to be sent: see `on_drained`.

        What this turn of the event loop has yet to send does not count: it goes with the next that is sent.
        """
        return bool(self._unsent)

    @property
    def unsent_bytes(self) -> int:
        """How many bytes the kernel did not take."""
        return sum(map(len, self._unsent))

    def emit(self, frames: bytes) -> None:
        """Send complete frames, together with all others of this turn of the event loop."""
        self._frames.append(frames)
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.run_callback(self.flush)

    def emit_now(self, frames: bytes) -> None:
        """Send complete frames, and what waits to be sent, at once."""
        self._frames.append(frames)
        self.flush()

    def emit_later(self, frames: bytes) -> None:
        """Send complete frames with the next that are sent, or after `_LATER`."""
        self._frames.append(frames)
        if not self._flush_is_due and self._stream is not None and not self._later.active:
            self._later.again(self.flush)

    def flush(self) -> None:
        """Send now what waits to be sent."""
        self._flush_is_due = False
        frames, stream = self._frames, self._stream
        if stream is None:
            frames.clear()
            return
        if self._later.active:
            self._later.stop()
        if not frames:
            return
        data = b"".join(frames) if len(frames) > 1 else frames[0]
        frames.clear()
        if self._unsent:
            self._unsent.append(memoryview(data))
            return
        try:
            sent = stream.send(data)
        except OSError as exc:
            self._fail(exc)
            return
        if sent < len(data):
            self._unsent.append(memoryview(data)[sent:])
            self._wait(stream)

    def resume(self) -> None:
        """Go on after something was received, where TLS could not write before that."""
        if self._unsent and self._stream is not None and not self._writer.active:
            self._writer.start(self._on_writable)

    def _wait(self, stream: Stream) -> None:
        """Have the rest sent when that is possible: when the kernel takes it, or TLS has received something."""
        if stream.wants_to_read:
            self._writer.stop()
        elif not self._writer.active:
            self._writer.start(self._on_writable)

    def _on_writable(self) -> None:
        """Send one piece, as much as the kernel takes; other watchers have their turn before the next."""
        stream = self._stream
        if stream is None or not self._unsent:
            return
        data = self._unsent[0]
        try:
            sent = stream.send(data)
        except OSError as exc:
            self._fail(exc)
            return
        if sent == len(data):
            self._unsent.popleft()
        elif sent:
            self._unsent[0] = data[sent:]
        if self._unsent:
            self._wait(stream)
            return
        self._writer.stop()
        if self.on_drained is not None:
            self.on_drained()

    def _fail(self, error: OSError) -> None:
        self._unsent.clear()
        self._writer.stop()
        self._stream = None
        self._on_failure(error)
