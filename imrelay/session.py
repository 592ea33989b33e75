"""A session: one browser socket, its user, its reader and its writer.

    CONNECTING --> OPEN --> CLOSING --> CLOSED

The reader is the WSGI greenlet: it checks what the browser sends and hands it to the publisher, and stops reading
while that is full. The writer blocks on the session's mailbox, where its consumer puts deliveries and the
publisher answers; what it has written it acknowledges to the broker. The two live and die together.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import gevent

from imrelay.broker.consumer import Consumer
from imrelay.broker.mailbox import Bell, Delivery, Mailbox
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.publication import Publication
from imrelay.broker.publisher import Publisher
from imrelay.broker.relays import RelayQueue
from imrelay.config import WebSocketConfig
from imrelay.errors import AnswerableError, BrokerUnavailable, InboxFull
from imrelay.hub import Hub
from imrelay.message import ack_frame, error_frame, to_node
from imrelay.mid import MessageIds
from imrelay.protocol import V1, Frame, Plain, choose
from imrelay.resends import Resends
from imrelay.submission import ClientAck, ClientPing, Submission, parse
from imrelay.websocket import ConnectionClosed, WebSocket

__all__ = ["Services", "Session", "State"]

logger = logging.getLogger(__name__)

#: Frames of one browser that are read but not yet answered; then its socket is not read.
_MAX_OWED = 256
#: Bytes of answers that wait for the writer; then the socket is not read. One answer may be larger.
_MAX_OWED_BYTES = 65_536
#: Bytes that are written to a browser at once, before they are acknowledged to the broker.
_CHUNK = 65_536
#: Seconds for the broker to confirm the end of a channel; then the session is forgotten all the same.
_DETACH_TIMEOUT = 2.0


class State(enum.Enum):
    """Where the life of a session stands."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Services:
    """What all sessions of a process share."""

    hub: Hub
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
        "_farewell",
        "_mailbox",
        "_owed",
        "_paid",
        "_protocol",
        "_received",
        "_resends",
        "_sent",
        "_services",
        "_since",
        "_websocket",
        "id",
        "state",
        "user",
    )

    def __init__(self, user: str, services: Services) -> None:
        """Join the hub; the socket is not upgraded yet."""
        self.user = user
        #: What the welcome of `imrelay.v1` names; empty for a plain client.
        self.id = ""
        self.state = State.CONNECTING
        self._services = services
        self._websocket: WebSocket | None = None
        #: Answers that the browser has not got yet, and who waits for them to be fewer.
        self._owed = 0
        self._paid = Bell()
        self._received = self._sent = 0
        self._resends: Resends | None = None
        #: Close code and reason for when the writer has nothing left to do.
        self._farewell = (1000, "")
        self._since = time.monotonic()
        self._mailbox = Mailbox(services.limits.max_send_buffer)
        self._consumer: Consumer = services.consumers.prepare(user, self._mailbox)
        self._protocol = self._choose(None)
        services.hub.join(self)

    def consume(self) -> None:
        """Begin to consume; returns at once, and does nothing once it was closed."""
        self._services.consumers.enqueue(self._consumer)

    def wait_attached(self, timeout: float) -> bool:
        """Block until messages for the user arrive here, or for `timeout` seconds; tell whether they do."""
        return self._consumer.wait_attached(timeout)

    def run(self, websocket: WebSocket) -> None:
        """Carry messages until the socket ends. Called in the greenlet of the WSGI handler."""
        self._websocket = websocket
        if self.state is not State.CONNECTING:  # closed during the handshake: the relay is stopping
            websocket.close(1012, "the relay is stopping")
            return
        writer: gevent.Greenlet | None = None
        try:
            self._open(websocket)
            writer = gevent.spawn(self._run_writer, websocket)
            writer.name = f"writer:{self.user}"
            self._read(websocket)
            self.close(1000, "")
        except Exception:
            self._log.exception("its reader met a fault of its own")
            self.close(1011, "a fault of the relay's")
        finally:
            try:
                self.close(1001, "going away")  # for when this greenlet was killed
            finally:
                self._leave(websocket, writer)

    def _open(self, websocket: WebSocket) -> None:
        self._protocol = self._choose(websocket.subprotocol)
        if isinstance(self._protocol, V1):
            self.id, _ = self._services.mids.next()
            self._services.hub.register(self)
        self._set_state(State.OPEN)
        self._log.info("open, protocol %s", websocket.subprotocol or "none")

    def _leave(self, websocket: WebSocket, writer: gevent.Greenlet | None) -> None:
        """See the session to its end: its writer, its socket, its place in the hub, its channel."""
        hub = self._services.hub
        try:
            if writer is not None:
                writer.join()
            # The hub counts it until the browser has answered the close frame. A process that ended before could
            # take back what the kernel still holds for it: with unread input, its sockets end with a reset.
            websocket.close()
            self._set_state(State.CLOSED)
            self._log.info(
                "closed with %s %s after %.1f s, %d received, %d sent",
                websocket.close_code,
                ascii(websocket.close_reason),
                time.monotonic() - self._since,
                self._received,
                self._sent,
            )
        finally:
            hub.leave(self)
            if self.id:
                # A browser that comes back now finds it until the broker has back what was not acknowledged.
                try:
                    self._consumer.wait_detached(_DETACH_TIMEOUT)
                finally:
                    hub.forget(self)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """End the session; returns at once, and does nothing the second time.

        The socket first, so that nothing more is taken; then the consumer, which gives the broker back what was
        not; then the mailbox, which ends the writer.
        """
        if self.state in (State.CLOSING, State.CLOSED):
            return
        self._set_state(State.CLOSING)
        try:
            if self._websocket is not None:
                self._websocket.close(code, reason, wait=False)
            else:
                self._services.hub.leave(self)
        finally:
            try:
                self._consumer.close()
            finally:
                self._mailbox.close()
                self._paid.ring()  # a reader that waits for its writer need not any more

    def wait_detached(self, timeout: float) -> bool:
        """Block, once it was closed, until the broker has back what was not taken; tell whether it has in time."""
        return self._consumer.wait_detached(timeout)

    def finish(self, code: int, reason: str) -> None:
        """End the session when what is under way to it has been written; returns at once."""
        if self.state is State.OPEN:
            self._farewell = (code, reason)
            self._mailbox.close()
        else:
            self.close(code, reason)

    def check(self) -> None:
        """End the session if its browser acknowledges nothing any more; called by the hub's sweeper."""
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

    def _set_state(self, state: State) -> None:
        logger.debug("session of %s: %s -> %s", ascii(self.user), self.state.value, state.value)
        self.state = state

    def _read(self, websocket: WebSocket) -> None:
        while messages := websocket.receive_messages():
            for payload, binary in messages:
                while self._is_owed_much and self.state is State.OPEN:
                    self._paid.wait()
                if self.state is not State.OPEN:
                    return
                self._owed += 1
                self._received += 1
                try:
                    frame = parse(payload, binary, self.user)
                    if isinstance(frame, Submission):
                        self._submit(frame, payload)
                    else:
                        self._control(frame)
                except AnswerableError as error:
                    self._mailbox.put(error_frame(error))

    @property
    def _is_owed_much(self) -> bool:
        """Whether so much waits to be answered, or to be written, that no more is read."""
        return self._owed >= _MAX_OWED or self._mailbox.frame_bytes >= _MAX_OWED_BYTES

    def _pay(self, count: int) -> None:
        """Note that the browser has got answers, or needs none; called from anywhere."""
        owed = self._owed
        self._owed = owed - count
        if owed >= _MAX_OWED:  # else nobody waits
            self._paid.ring()

    def _control(self, frame: ClientAck | ClientPing) -> None:
        answer = self._protocol.control(frame)
        if answer is not None:
            self._mailbox.put(answer)
        else:
            self._pay(1)

    def _submit(self, submission: Submission, sent: bytes) -> None:
        """Hand a message to the publisher; blocks while that is full. Raises `AnswerableError`.

        It keeps its message id where its sender was told that it may have arrived and sends the same bytes again.
        """
        if self._services.hub.is_draining:
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
            self._services.publisher.publish(publication)
        except AnswerableError as error:
            error.message_id = submission.message_id
            raise

    def _answer(self, publication: Publication, error: AnswerableError | None) -> None:
        """Tell the browser what became of its message; called by the publisher, from anywhere."""
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
            self._pay(1)

    def _run_writer(self, websocket: WebSocket) -> None:
        try:
            self._greet(websocket)
            while items := self._mailbox.take():
                self._paid.ring()  # a reader that waits for room in the mailbox
                self._write(websocket, items)
            self.close(*self._farewell)
        except ConnectionClosed:
            self.close()
        except Exception:
            self._log.exception("its writer met a fault of its own")
        finally:
            self.close(1011, "a fault of the relay's")  # also when this greenlet was killed

    def _greet(self, websocket: WebSocket) -> None:
        if isinstance(self._protocol, V1):
            limits = self._services.limits
            welcome = V1.welcome(
                self.user, self.id, ping_interval=limits.ping_interval, max_message_size=limits.max_message_size
            )
            websocket.send_messages([(welcome, False)])

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
            self._pay(answers)
