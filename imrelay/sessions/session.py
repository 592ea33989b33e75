"""A session: one browser socket, its user, and the greenlet that runs it.

    CONNECTING --> OPEN --> CLOSING --> CLOSED

The greenlet is that of the WSGI request. It blocks on the session's mailbox, which gives it batches of deliveries
and of answers to the browser's own messages; each batch is written to the browser, and acknowledged to the broker.
What the browser sends is checked and queued for the publisher in the event loop, where nothing blocks: while the
publisher has no room, or the browser has too many answers to come, the reading of this socket is paused.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from imrelay.broker.consumer import Consumer
from imrelay.broker.mailbox import Delivery, Mailbox
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.publication import Publication
from imrelay.broker.publisher import Publisher
from imrelay.broker.relay_queue import RelayQueue
from imrelay.errors import AnswerableError, BrokerUnavailable, InboxFull
from imrelay.messages.message_ids import MessageIds
from imrelay.messages.outgoing import ack_frame, error_frame, to_node
from imrelay.messages.submission import ClientAck, ClientPing, Submission, parse
from imrelay.sessions.registry import Registry
from imrelay.sessions.resends import Resends
from imrelay.sessions.subprotocols import V1, Frame, Plain, choose
from imrelay.settings.values import WebSocketConfig
from imrelay.websocket import ConnectionClosed, WebSocket

__all__ = ["Services", "Session", "SessionState"]

logger = logging.getLogger(__name__)

#: Frames of one browser that were read and not yet answered; with so many its socket is not read.
_MAX_UNANSWERED = 256
#: Bytes of answers that wait to be written; with so many the socket is not read. One answer may be larger.
_MAX_ANSWER_BYTES = 65_536
#: Bytes that are written to a browser at once, before they are acknowledged to the broker.
_CHUNK = 65_536
#: Seconds for the broker to confirm the end of a channel; then the session is forgotten all the same.
_DETACH_TIMEOUT = 2.0


class SessionState(enum.Enum):
    """Where the life of a session stands."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Services:
    """What all sessions of a process share."""

    registry: Registry
    consumers: ConsumerPool
    publisher: Publisher
    mids: MessageIds
    relays: RelayQueue
    limits: WebSocketConfig
    #: Whether bodies are wrapped as the article's Node.js server does (`envelope = node`).
    node_envelope: bool
    #: Messages that a socket remembers, to know repeats of them.
    remembered: int


class _Log(logging.LoggerAdapter):  # type: ignore[type-arg]  # not subscriptable before Python 3.11
    """Puts the user before each line; ids come from clients, so they are escaped."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        user = (self.extra or {})["user"]
        return "session of {}: {}".format(ascii(user).replace("%", "%%"), msg), kwargs


class Session:
    """One browser socket from the handshake to its end."""

    __slots__ = (
        "_consumer",
        "_ending",
        "_is_paused",
        "_mailbox",
        "_protocol",
        "_received",
        "_resends",
        "_sent",
        "_services",
        "_since",
        "_unanswered",
        "_waiting",
        "_websocket",
        "id",
        "state",
        "user",
    )

    def __init__(self, user: str, services: Services) -> None:
        """Join the registry; the socket is not upgraded yet."""
        self.user = user
        #: What the welcome of `imrelay.v1` names; empty for a plain client.
        self.id = ""
        self.state = SessionState.CONNECTING
        self._services = services
        self._websocket: WebSocket | None = None
        #: Frames that were read and not yet answered.
        self._unanswered = 0
        #: The message for which the publisher has no room yet.
        self._waiting: Publication | None = None
        #: Whether the browser is not read for the moment.
        self._is_paused = False
        self._received = self._sent = 0
        self._resends: Resends | None = None
        #: Close code and reason for when the mailbox is closed and empty.
        self._ending = (1000, "")
        self._since = time.monotonic()
        self._mailbox = Mailbox(services.limits.max_send_buffer)
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
            # Not a `for` loop over the mailbox: each socket would take 1.3 KiB more, of C stack, while it waits.
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
        """See the session to its end: its socket, its place in the registry, its channel."""
        registry = self._services.registry
        try:
            # It is counted until the browser has answered the close frame. A process that ended before could
            # take back what the kernel still holds for it: with unread input, its sockets end with a reset.
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
                # A browser that comes back now finds it until the broker has back what was not acknowledged.
                try:
                    self._consumer.wait_detached(_DETACH_TIMEOUT)
                finally:
                    registry.forget(self)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """End the session; returns at once, and does nothing the second time.

        The socket first, so that nothing more is taken; then the consumer, which gives the broker back what was
        not; then the mailbox, which ends the greenlet. May be called in the event loop.
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
        """Block, once it was closed, until the broker has back what was not taken; tell whether it has in time."""
        return self._consumer.wait_detached(timeout)

    def finish(self, code: int, reason: str) -> None:
        """End the session when what is under way to it has been written; returns at once."""
        if self.state is SessionState.OPEN:
            self._ending = (code, reason)
            self._mailbox.close()
        else:
            self.close(code, reason)

    def check(self) -> None:
        """End the session if its browser acknowledges nothing any more; called by the registry's sweeper."""
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
        """Made when it is needed, which is twice in a session's life."""
        return _Log(logger, {"user": self.user})

    def _set_state(self, state: SessionState) -> None:
        logger.debug("session of %s: %s -> %s", ascii(self.user), self.state.value, state.value)
        self.state = state

    # -- what the browser sends, in the event loop ------------------------------------------------------------

    def _receive(self, payload: bytes, binary: bool) -> None:
        """Check what the browser sent, and queue it for the publisher. Does not block."""
        if self.state is not SessionState.OPEN:
            return
        self._received += 1
        self._unanswered += 1
        try:
            frame = parse(payload, binary, self.user)
            if isinstance(frame, Submission):
                self._submit(frame, payload)
            else:
                self._control(frame)
        except AnswerableError as error:
            self._mailbox.put(error_frame(error))
        except Exception:
            self._log.exception("what its browser sent met a fault of the relay's")
            self.close(1011, "a fault of the relay's")
            return
        if self._must_pause and self._websocket is not None:
            self._is_paused = True
            self._websocket.pause()

    @property
    def _must_pause(self) -> bool:
        """Whether a message waits for room, or so much is to be answered or written that no more is read."""
        return (
            self._unanswered >= _MAX_UNANSWERED
            or self._waiting is not None
            or self._mailbox.answer_bytes >= _MAX_ANSWER_BYTES
        )

    def _go_on_reading(self) -> None:
        """Read the browser again, if there is no longer a reason to pause; called from anywhere."""
        if self._is_paused and not self._must_pause and self._websocket is not None:
            self._is_paused = False
            self._websocket.resume()

    def _on_room(self) -> None:
        """The message that waited is with the publisher, or was refused; called in the event loop."""
        self._waiting = None
        self._go_on_reading()

    def _note_answered(self, count: int) -> None:
        """Note that frames are answered, or need no answer; called from anywhere."""
        self._unanswered -= count
        if self._is_paused:
            self._go_on_reading()

    def _control(self, frame: ClientAck | ClientPing) -> None:
        answer = self._protocol.control(frame)
        if answer is not None:
            self._mailbox.put(answer)
        else:
            self._note_answered(1)

    def _submit(self, submission: Submission, sent: bytes) -> None:
        """Queue a message for the publisher, or have it wait for room there. Raises `AnswerableError`.

        It keeps its message id where its sender was told that it may have arrived and sends the same bytes again.
        """
        if self._services.registry.is_draining:
            raise BrokerUnavailable("the relay is stopping; this message was not accepted", submission.message_id)
        body = to_node(submission.body, submission.binary) if self._services.node_envelope else submission.body
        again = None
        if self._resends is not None and submission.message_id is not None:
            again = self._resends.find(submission.message_id, sent, submission.binary)
        mid, time_ms = again or self._services.mids.next()
        publication = Publication(
            submission.to,
            body,
            submission.binary,
            mid,
            time_ms,
            submission.message_id,
            self._answer,
            sent,
        )
        try:
            if not self._services.publisher.publish(publication, self._on_room):
                self._waiting = publication
        except AnswerableError as error:
            error.message_id = submission.message_id
            raise

    def _answer(self, publication: Publication, error: AnswerableError | None) -> None:
        """Tell the browser what became of its message; called by the publisher, from anywhere."""
        try:
            self._put_answer(publication, error)
        except Exception:
            self._log.exception("an answer to its browser met a fault of the relay's")
            self.close(1011, "a fault of the relay's")

    def _put_answer(self, publication: Publication, error: AnswerableError | None) -> None:
        if error is not None:
            error.message_id = publication.message_id
            if publication.message_id is not None and (error.uncertain or isinstance(error, InboxFull)):
                self._resends = self._resends or Resends()
                self._resends.remember(
                    publication.message_id,
                    publication.sent,
                    publication.binary,
                    publication.mid,
                    publication.time_ms,
                )
            self._mailbox.put(error_frame(error))
        elif publication.message_id is not None:
            if self._resends is not None:
                self._resends.forget(publication.message_id)
            self._mailbox.put(ack_frame(publication.message_id, publication.mid, publication.time_ms))
        else:
            self._note_answered(1)

    # -- what the browser gets, in the session's greenlet -----------------------------------------------------

    def _write(self, websocket: WebSocket, items: list[Delivery | bytes]) -> None:
        """Write answers and deliveries, about `_CHUNK` bytes or one item at a time."""
        encode = self._protocol.encode
        frames: list[Frame] = []
        taken: list[Delivery] = []
        size = answers = 0
        for item in items:
            if isinstance(item, bytes):
                frame: Frame | None = (item, False)
                length = len(item)
            else:
                try:
                    frame = encode(item)
                except Exception:  # it would end every session that it comes to
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

    def _send(self, websocket: WebSocket, frames: list[Frame], taken: list[Delivery], answers: int) -> None:
        """Write in one go, and acknowledge to the broker what the browser's connection has taken."""
        if frames:
            websocket.send_messages(frames)
            self._sent += len(frames)
        if taken:
            self._protocol.written(taken)
        if answers:
            self._note_answered(answers)
