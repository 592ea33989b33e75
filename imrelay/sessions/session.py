"""A session: one browser socket of one user, and the greenlet that runs it.

    CONNECTING --> OPEN --> CLOSING --> CLOSED

The greenlet is that of the WSGI request. It blocks on the session's mailbox, which gives it batches of deliveries
and of answers to the browser's own messages; each batch is written to the browser, and acknowledged to the broker.
What the browser sends is received in the event loop: see `intake`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping
from typing import Any

from imrelay.broker.codec import Delivery
from imrelay.broker.consumer import Consumer
from imrelay.sessions.intake import Intake, SessionState
from imrelay.sessions.services import Services
from imrelay.sessions.subprotocols import V1, Outgoing, Plain, choose
from imrelay.websocket import ConnectionClosed, WebSocket

__all__ = ["Session"]

logger = logging.getLogger(__name__)

#: Bytes that are written to a browser at once, before they are acknowledged to the broker.
_CHUNK = 65_536
#: Seconds for the broker to confirm the end of a channel; after that the session is forgotten.
_DETACH_TIMEOUT = 2.0


class _Log(logging.LoggerAdapter):  # type: ignore[type-arg]  # not subscriptable before Python 3.11
    """Puts the user before each line; ids come from clients, so they are escaped."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        user = (self.extra or {})["user"]
        return "session of {}: {}".format(ascii(user).replace("%", "%%"), msg), kwargs


class Session(Intake):
    """One browser socket from the handshake to its end."""

    __slots__ = ("_consumer", "_ending", "_sent", "_since", "id")

    def __init__(self, user: str, services: Services) -> None:
        """Join the registry; the socket is not upgraded yet."""
        super().__init__(user, services)
        #: What the welcome of `imrelay.v1` names; empty for a plain client.
        self.id = ""
        self._sent = 0
        #: Close code and reason for when the mailbox is closed and empty.
        self._ending = (1000, "")
        self._since = time.monotonic()
        self._consumer: Consumer = services.consumers.prepare(user, self._mailbox)
        self._protocol = self._choose(None)
        services.registry.join(self)

    def consume(self) -> None:
        """Begin to consume; returns at once, and does nothing once it was closed."""
        self._services.consumers.enqueue(self._consumer)

    def wait_attached(self, timeout: float) -> bool:
        """Block until messages for the user arrive here, or for `timeout` seconds; tell whether they do."""
        return self._consumer.wait_attached(timeout)

    def run(self, websocket: WebSocket) -> None:
        """Carry messages until the socket ends. Called in the greenlet of the WSGI request."""
        self._websocket = websocket
        if self.state is not SessionState.CONNECTING:  # closed during the handshake: the relay is stopping
            websocket.close(1012, "the relay is stopping")
            return
        try:
            self._open(websocket)
            # Not a `for` loop over the mailbox: each socket that waits would take 1.3 KiB more of C stack.
            while batch := self._mailbox.take():  # blocks until there are deliveries or answers
                self._go_on_reading()
                self._write(websocket, batch)  # and acknowledges
            self.close(*self._ending)
        except ConnectionClosed:
            self.close()
        except Exception:
            self._log.exception("it met a fault of the relay's")
            self.close(1011, "a fault of the relay's")
        finally:
            try:
                self.close(1001, "going away")  # for when this greenlet was killed
            finally:
                self._leave(websocket)

    def _open(self, websocket: WebSocket) -> None:
        """Choose the protocol, greet, and receive from now on what the browser sends."""
        self._protocol = self._choose(websocket.subprotocol)
        if isinstance(self._protocol, V1):
            self.id, _ = self._services.mids.next()
            self._services.registry.register(self)
        self._set_state(SessionState.OPEN)
        self._log.info("open, protocol %s", websocket.subprotocol or "none")
        self._greet(websocket)
        websocket.on_message = self._receive  # in the event loop
        websocket.on_close = self.close

    def _greet(self, websocket: WebSocket) -> None:
        if isinstance(self._protocol, V1):
            limits = self._services.limits
            welcome = V1.welcome(
                self.user, self.id, ping_interval=limits.ping_interval, max_message_size=limits.max_message_size
            )
            websocket.send_messages([(welcome, False)])

    def _leave(self, websocket: WebSocket) -> None:
        """Finish the session: close its socket, give up its place in the registry, wait for its channel to end."""
        registry = self._services.registry
        try:
            # The session is counted until the browser has answered the close frame. If the process ended earlier,
            # unread input would make the kernel reset the connection and discard what is still to be sent.
            websocket.close()
            self._set_state(SessionState.CLOSED)
            self._log.info(
                "closed with %s %s after %.1f s, %d received, %d sent",
                websocket.close_code,
                ascii(websocket.close_reason),
                time.monotonic() - self._since,
                self._received,
                self._sent,
            )
        finally:
            registry.leave(self)
            if self.id:
                # A browser that resumes it waits until the broker has back what was not acknowledged.
                try:
                    self._consumer.wait_detached(_DETACH_TIMEOUT)
                finally:
                    registry.forget(self)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """End the session; returns at once, and does nothing the second time.

        Closes the socket first, so that nothing more is taken; then the consumer, so that the broker has back what
        was not taken; then the mailbox, which ends the greenlet. May be called in the event loop.
        """
        if self.state in (SessionState.CLOSING, SessionState.CLOSED):
            return
        self._set_state(SessionState.CLOSING)
        try:
            if self._websocket is not None:
                self._websocket.close(code, reason, wait=False)
            else:
                self._services.registry.leave(self)
        finally:
            try:
                self._consumer.close()
            finally:
                self._mailbox.close()
                waiting, self._waiting = self._waiting, None
                if waiting is not None:
                    self._services.publisher.withdraw(waiting)

    def wait_detached(self, timeout: float) -> bool:
        """Block after `close` until the broker has back what was not taken; tell whether that was in time."""
        return self._consumer.wait_detached(timeout)

    def finish(self, code: int, reason: str) -> None:
        """End the session when what is under way to it has been written; returns at once."""
        if self.state is SessionState.OPEN:
            self._ending = (code, reason)
            self._mailbox.close()
        else:
            self.close(code, reason)

    def check(self) -> None:
        """End the session if its browser has not acknowledged in time; called by the registry."""
        if self._protocol.is_overdue(self._services.limits.ack_timeout):
            self._log.warning("a message stayed unacknowledged over ack_timeout")
            self.close(4408, "messages stayed unacknowledged over ack_timeout")

    def _choose(self, subprotocol: str | None) -> Plain:
        services = self._services
        return choose(
            subprotocol,
            self._consumer,
            node_envelope=services.node_envelope,
            remembered=services.remembered,
        )

    @property
    def _log(self) -> _Log:
        """The log of this session; made at each use, since it is used twice in a session's life."""
        return _Log(logger, {"user": self.user})

    def _set_state(self, state: SessionState) -> None:
        logger.debug("session of %s: %s -> %s", ascii(self.user), self.state.value, state.value)
        self.state = state

    # -- writing to the browser, in the session's greenlet -----------------------------------------------------

    def _write(self, websocket: WebSocket, items: list[Delivery | bytes]) -> None:
        """Write answers and deliveries, about `_CHUNK` bytes or one item at a time."""
        encode = self._protocol.encode
        frames: list[Outgoing] = []
        taken: list[Delivery] = []
        size = answers = 0
        for item in items:
            if isinstance(item, bytes):
                frame: Outgoing | None = (item, False)
                length = len(item)
            else:
                try:
                    frame = encode(item)
                except Exception:  # it would end every session that it is delivered to
                    self._log.exception("a message could not be written and is discarded, mid %s", ascii(item.mid))
                    self._consumer.discard(item)
                    continue
                length = 0 if frame is None else len(frame[0])
            if size and size + length > _CHUNK:
                self._send(websocket, frames, taken, answers)
                frames, taken = [], []
                size = answers = 0
            size += length
            if frame is not None:
                frames.append(frame)
            if isinstance(item, bytes):
                answers += 1
            else:
                taken.append(item)
        self._send(websocket, frames, taken, answers)

    def _send(self, websocket: WebSocket, frames: list[Outgoing], taken: list[Delivery], answers: int) -> None:
        """Write in one go, and acknowledge to the broker what the browser's connection has taken."""
        if frames:
            websocket.send_messages(frames)
            self._sent += len(frames)
        if taken:
            self._protocol.written(taken)
        if answers:
            self._note_answered(answers)
