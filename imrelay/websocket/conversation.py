"""The conversation with one peer, in the event loop: frames in and out, messages, liveness.

Messages wait for a greenlet that receives them, or are given to the application's callback, unless that has paused
them.

Pings are answered and closes seen whatever the application does meanwhile. There is one exception.
While as many messages wait as a socket keeps for a busy application, nothing is read: that is the back-pressure
to the peer. Pings, closes and the end of the connection are then seen when the application has taken them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from gevent.hub import Hub

from imrelay.websocket.closing import NEVER, Closing, SocketState
from imrelay.websocket.deflate import Deflate
from imrelay.websocket.exceptions import FrameError
from imrelay.websocket.frames import BINARY, CLOSE, PING, PONG, encode_close, encode_frame, read_close
from imrelay.websocket.parser import FrameParser
from imrelay.websocket.sweeper import sweeper_of
from imrelay.websocket.transport import Limits, resume

__all__ = ["Conversation", "OnMessage"]

logger = logging.getLogger(__name__)

#: Messages, and bytes of them, that wait for a busy application before the socket stops reading. The first is also
#: the number of frames that are parsed in one turn of the event loop, so that other sockets get their turn.
MAX_QUEUED_MESSAGES = 64
MAX_QUEUED_BYTES = 65_536
#: Seconds for the application to answer the messages that came before a close frame; then that is answered.
ANSWER_BEFORE_CLOSE = 1.0
#: With so many bytes received by the deadline of a pong, the peer is taken to be sending a large message first.
ALIVE_BYTES = 4096

#: Takes one message in the event loop: the payload, that of a text being UTF-8, and whether it is binary.
OnMessage = Callable[[bytes, bool], None]


_OPEN, _CLOSING, _LINGERING, _CLOSED = (
    SocketState.OPEN,
    SocketState.CLOSING,
    SocketState.LINGERING,
    SocketState.CLOSED,
)


class Conversation(Closing):
    """What a WebSocket does by itself, without the application. Nothing here blocks.

    It is one object with the transport below and the WebSocket above: there is one for each socket, and each
    further object would take memory.
    """

    __slots__ = (
        "_deflate",
        "_going_on",
        "_held",
        "_is_paused",
        "_mark",
        "_messages",
        "_next_ping",
        "_on_close",
        "_on_message",
        "_parser",
        "_pings",
        "_pong_due",
        "_queued",
        "_received",
        "_receiver",
        "subprotocol",
    )

    def __init__(
        self,
        sock: Any,
        hub: Hub,
        limits: Limits,
        *,
        subprotocol: str | None = None,
        deflate: Deflate | None = None,
    ) -> None:
        super().__init__(sock, hub, limits)
        #: The subprotocol that was agreed on, or None.
        self.subprotocol = subprotocol
        self._deflate = deflate
        self._parser = FrameParser(
            max_size=limits.max_message_size, inflate=None if deflate is None else deflate.inflate
        )
        #: Payload, and whether it is binary.
        self._messages: list[tuple[bytes, bool]] = []
        self._queued = 0  # bytes in _messages
        self._receiver: Any = None
        #: The application's callbacks, in place of a greenlet that receives.
        self._on_message: OnMessage | None = None
        self._on_close: Callable[[], None] | None = None
        #: Whether the application wants no messages for the moment.
        self._is_paused = False
        self._held = False  # too many messages wait: nothing is read
        self._going_on = False  # _go_on is scheduled
        self._received = 0
        self._mark = 0  # _received when the last ping was sent
        self._pings = 0
        self._pong_due = NEVER
        self._next_ping = NEVER

    def start(self, data: bytes = b"") -> None:
        """Begin to read; `data` is what the client sent after its handshake. Called once, by the handler."""
        limits = self._limits
        if limits.ping_interval > 0:
            self._next_ping = monotonic() + limits.ping_interval
        self.due = self._next_ping
        deadlines = (limits.ping_interval, limits.ping_timeout, limits.send_timeout, limits.close_timeout)
        shortest = min((seconds for seconds in deadlines if seconds > 0), default=1.0)
        sweeper_of(self._hub).add(self, shortest=shortest)
        self._start_reading()
        if data:
            self._received += len(data)
            self._take_in(data)

    # -- receiving -------------------------------------------------------------------------------------------

    def _on_bytes(self, data: bytes) -> None:
        self._received += len(data)
        if self._state is not _LINGERING:
            self._take_in(data)

    def _take_in(self, data: bytes) -> None:
        """Parse as much as one turn allows, hand messages over or wake the greenlet that waits, and read on."""
        messages = self._messages
        parser = self._parser
        pongs = []
        for opcode, payload in parser.parse(data, max(1, MAX_QUEUED_MESSAGES - len(messages))):
            if opcode <= BINARY:
                if self._state is _OPEN:
                    messages.append((payload, opcode == BINARY))
                    self._queued += len(payload)
            elif opcode == PING:
                pongs.append(encode_frame(PONG, payload))
            elif opcode == PONG:
                self._note_pong(payload)
            elif opcode == CLOSE:
                code, reason = read_close(payload)
                self._ending = code, reason, encode_close(None if code == 1005 else code)
        if parser.failure is not None:
            error: FrameError = parser.failure
            self._ending = error.code, error.reason, encode_close(error.code, error.reason)
        if pongs and self._state is _OPEN:
            self._write_frames(b"".join(pongs) if self._outbox is None else pongs[-1], pong=True)
        if messages and self._on_message is not None:
            self._hand_over(self._on_message)
        if self._ending is not None:
            self._stop_reading()
            if self._state is _CLOSING:
                self._ending = None
                self._linger()
            elif self._has_taken_all or self._state is not _OPEN:
                self._end_now()
            else:
                self.due = monotonic() + ANSWER_BEFORE_CLOSE
        if messages and self._receiver is not None:
            resume(self._receiver, self._hub)
        if not self._reading or parser.has_more or self._messages:
            self._read_on()

    def _hand_over(self, on_message: OnMessage) -> None:
        """Give the application the messages that wait, until it pauses them."""
        messages = self._messages
        taken = 0
        try:
            if not self._is_paused:
                for payload, binary in messages:  # ends at once where `close` throws them away
                    taken += 1
                    on_message(payload, binary)
                    if self._is_paused:
                        break
        except Exception:
            logger.exception("the application failed to take a message")
            self._drop_messages()
            self._on_bug()
            return
        del messages[:taken]
        self._queued = sum(len(payload) for payload, _ in messages) if messages else 0

    @property
    def _has_taken_all(self) -> bool:
        """Whether the application has taken all messages and has not paused them."""
        return not self._messages and not self._is_paused

    def _drop_messages(self) -> None:
        """Throw away what the application has not taken: it is the application that ends the socket."""
        self._messages.clear()
        self._queued = 0
        self._is_paused = False

    def _read_on(self) -> None:
        if self._state is _CLOSED or self._ending is not None:
            return
        if self._state is _LINGERING:
            self._start_reading()
        elif len(self._messages) >= MAX_QUEUED_MESSAGES or self._queued >= MAX_QUEUED_BYTES:
            self._held = True
            self._stop_reading()  # until receive_messages has taken them
        elif self._parser.has_more:
            self._stop_reading()  # the bytes that are here come first
            self._schedule()
        else:
            if self._held:
                self._held = False
                if self._pong_due is not NEVER:
                    # The pong may have waited in the kernel all the while.
                    self._pong_due = monotonic() + self._limits.ping_timeout
            self._start_reading()

    def _schedule(self) -> None:
        """Go on in the next turn of the event loop."""
        if not self._going_on:
            self._going_on = True
            self._turns.add(self._go_on)

    def _go_on(self) -> None:
        """Go on with messages that wait, or with bytes that are here already, or with what the kernel has."""
        self._going_on = False
        try:
            has_news = bool(self._messages) or self._ending is not None
            if has_news and self._on_message is not None and not self._is_paused:
                self._hand_over(self._on_message)
                if self._ending is not None and self._has_taken_all:
                    self._end_now()
                self._read_on()  # what is here already, in a turn of its own
            elif self._parser.has_more and self._ending is None and self._state in (_OPEN, _CLOSING):
                self._take_in(b"")
            else:
                self._read_on()
            self._tell_end()
        except Exception:
            logger.exception("reading a socket failed")
            self._on_bug()

    # -- liveness, in the sweeper ----------------------------------------------------------------------------

    def on_due(self, now: float) -> None:
        """Do what a deadline asks for."""
        if self._state is _OPEN:
            self._check_deadlines(now)
        elif self._state is not _CLOSED:
            self._finish(reset=self._outbox is not None)

    def _check_deadlines(self, now: float) -> None:
        if self._ending is not None:
            self._end_now()
            return
        outbox, limits = self._outbox, self._limits
        if outbox is not None and outbox.due <= now:
            self._give_up_on(f"bytes waited longer than {limits.send_timeout:g} s")
            return
        if self._pong_due <= now:
            if self._reading and self._received - self._mark < ALIVE_BYTES:
                self._on_lost(f"no pong within {limits.ping_timeout:g} s", reset=True)
                return
            self._mark = self._received
            self._pong_due = now + limits.ping_timeout
        elif self._pong_due is NEVER and self._next_ping <= now:
            self._pings = (self._pings + 1) & 0xFFFFFFFF
            self._mark = self._received
            self._pong_due = now + limits.ping_timeout
            self._next_ping = now + limits.ping_interval
            self._write_frames(encode_frame(PING, self._pings.to_bytes(4, "big")))
            if self._state is not _OPEN:
                return
        self.due = self._next_ping if self._pong_due is NEVER else self._pong_due
        if self._outbox is not None:
            self.due = min(self.due, self._outbox.due)

    def _note_pong(self, payload: bytes) -> None:
        if payload == self._pings.to_bytes(4, "big") and self._pong_due is not NEVER:
            self._pong_due = NEVER
            self.due = min(self.due, self._next_ping)

    # -- the end ---------------------------------------------------------------------------------------------

    def _tell_end(self) -> None:
        """Call `on_close`, once, when nothing can be sent any more and all that came before has been taken."""
        on_close = self._on_close
        if on_close is None or self._state is _OPEN or not self._has_taken_all:
            return
        self._on_message = self._on_close = None
        try:
            on_close()
        except Exception:
            logger.exception("the application failed to take note of the end of its WebSocket")

    def _wake_waiters(self) -> None:
        self._tell_end()
        if self._receiver is not None:
            resume(self._receiver, self._hub)
        closers, self._closers = self._closers, None
        for closer in closers or ():
            resume(closer, self._hub)
