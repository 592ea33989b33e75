"""The end of a WebSocket: the closing handshake, and all other ways in which a socket ends.

    OPEN        messages go both ways
    CLOSING     our close frame is out, the peer's is awaited; messages are thrown away
    LINGERING   the last frame is written: what is left is flushed, and input drained until the peer is gone
    CLOSED      the TCP connection is gone

`close_code` and `close_reason` say from then on what has ended it.
"""

from __future__ import annotations

import enum
import logging
from abc import abstractmethod
from time import monotonic
from typing import Any

from gevent.hub import Hub

from imrelay.websocket.frames import encode_close
from imrelay.websocket.outbox import Write
from imrelay.websocket.sweeper import sweeper_of
from imrelay.websocket.transport import Limits, Transport

__all__ = ["NEVER", "Closing", "SocketState"]

logger = logging.getLogger(__name__)

#: The deadline of what has none.
NEVER = float("inf")


class SocketState(enum.Enum):
    """Where a socket is between the upgrade and the end of its TCP connection."""

    OPEN = "open"
    CLOSING = "closing"
    LINGERING = "lingering"
    CLOSED = "closed"


_OPEN, _CLOSING, _LINGERING, _CLOSED = (
    SocketState.OPEN,
    SocketState.CLOSING,
    SocketState.LINGERING,
    SocketState.CLOSED,
)


class Closing(Transport):
    """The states of one WebSocket and the changes between them. Nothing here blocks."""

    __slots__ = ("_closers", "_ending", "_state", "close_code", "close_reason")

    def __init__(self, sock: Any, hub: Hub, limits: Limits) -> None:
        super().__init__(sock, hub, limits)
        self.close_code: int | None = None
        self.close_reason = ""
        self._state = _OPEN
        #: The greenlets that wait for a change of the state.
        self._closers: list[Any] | None = None
        #: Code, reason and answer of an end that waits for the messages before it to be taken.
        self._ending: tuple[int, str, bytes] | None = None

    @abstractmethod
    def on_due(self, now: float) -> None:
        """Do what a deadline asks for; called by the sweeper."""

    @abstractmethod
    def _schedule(self) -> None:
        """Go on reading in the next turn of the event loop."""

    @abstractmethod
    def _wake_waiters(self) -> None:
        """Tell the application that the state has changed, and wake the greenlets that wait for that."""

    def _write_frames(self, frames: bytes, *, pong: bool = False) -> Write | None:
        """Write, and end the socket where that fails; return what waits."""
        try:
            return self._write(frames, pong=pong)
        except BufferError as error:
            self._give_up_on(str(error))
        except OSError as error:
            self._on_lost(f"connection lost: {error.strerror or error}")
        return None

    def _end_now(self) -> None:
        """Answer the peer's close frame, or its violation, now that the application has had its turn."""
        ending, self._ending = self._ending, None
        if ending is not None and self._state is _OPEN:  # else something else has ended it meanwhile
            code, reason, frame = ending
            self._end(code, reason, frame, _LINGERING)

    def _end(self, code: int, reason: str, frame: bytes, state: SocketState) -> None:
        """Leave OPEN with our last frame."""
        self.close_code, self.close_reason = code, reason
        self._enter(state)
        self.due = monotonic() + self._limits.close_timeout
        try:
            self._write(frame, last=True)
        except OSError:
            self._finish()
            return
        if state is _LINGERING:
            self._linger()
        elif not self._reading:
            self._schedule()

    def _linger(self) -> None:
        """Both close frames are sent: flush, send FIN, and drain what the peer still sends."""
        self._enter(_LINGERING)
        self.due = monotonic() + self._limits.close_timeout
        if self._outbox is None:
            self._half_close()
        self._start_reading()

    def _on_flushed(self) -> None:
        if self._state is _LINGERING:
            self._half_close()
            self._start_reading()  # an end of stream that came before is seen again

    def _give_up_on(self, reason: str) -> None:
        """End the socket of a peer that is too slow; the close frame is sent if the kernel takes it at once."""
        self.close_code, self.close_reason = 4408, f"too slow: {reason}"
        frame = encode_close(4408, self.close_reason)
        outbox = self._outbox
        if outbox is not None and outbox.is_at_frame:
            try:
                told = self._raw.send(frame) == len(frame)
            except OSError:
                told = False
            if told:
                self._outbox = None
                self._writer.stop()
                self._hub.loop.run_callback(self._wake_senders, outbox.drop())
                self._linger()
                return
        self._finish(reset=True)

    def _on_lost(self, reason: str, *, reset: bool = False) -> None:
        if self._state is _OPEN:
            self.close_code, self.close_reason = 1006, reason
        self._finish(reset=reset)

    def abort(self) -> None:
        """End the TCP connection at once, without a close frame."""
        self._on_lost("connection dropped")

    def _on_bug(self) -> None:
        if self._state is _OPEN:
            self._end(1011, "internal error", encode_close(1011, "internal error"), _LINGERING)
        else:
            self._finish()

    def _finish(self, *, reset: bool = False) -> None:
        if self._state is _CLOSED:
            return
        self._enter(_CLOSED)
        self.due = NEVER
        sweeper_of(self._hub).discard(self)
        self._release(reset=reset)

    def _enter(self, state: SocketState) -> None:
        """Change the state, and wake the greenlets that wait for that."""
        if state is self._state:
            return
        logger.debug("WebSocket %x: %s (%s %s)", id(self), state.value, self.close_code, self.close_reason)
        self._state = state
        self._hub.loop.run_callback(self._wake_waiters)

    def _on_end_of_stream(self) -> None:
        if self._state is _LINGERING and self._outbox is not None:
            self._stop_reading()  # half-closed by the peer, which may still take the rest
        elif self._state is _OPEN:
            self._on_lost("connection lost: end of stream")
        else:
            self._finish()
