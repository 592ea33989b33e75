"""The intake of a session: what its browser sends, and the answers to that.

A message is checked and queued for the publisher in the event loop, where nothing blocks: while the publisher has
no room, or too many messages of this browser are unanswered, the reading of its socket is paused.
"""

from __future__ import annotations

import enum
import logging
from abc import ABC, abstractmethod

from imrelay.broker.mailbox import Mailbox
from imrelay.broker.publication import Publication
from imrelay.errors import AnswerableError, BrokerUnavailable, InboxFull
from imrelay.messages.outgoing import ack_frame, error_frame, to_node
from imrelay.messages.submission import ClientAck, ClientPing, Submission, parse
from imrelay.sessions.resends import Resends
from imrelay.sessions.services import Services
from imrelay.sessions.subprotocols import Plain
from imrelay.websocket import WebSocket

__all__ = ["Intake", "SessionState"]

#: Messages of one browser that are not yet answered; with so many its socket is not read.
_MAX_UNANSWERED = 256
#: Bytes of answers that wait to be written; with so many the socket is not read. One answer may be larger.
_MAX_ANSWER_BYTES = 65_536


class SessionState(enum.Enum):
    """Where the life of a session stands."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Intake(ABC):
    """The half of a session that receives from the browser.

    It is a base class and not an object of its own, to save memory: there is one for each socket.
    """

    __slots__ = (
        "_is_paused",
        "_mailbox",
        "_protocol",
        "_received",
        "_resends",
        "_services",
        "_unanswered",
        "_waiting",
        "_websocket",
        "state",
        "user",
    )

    _protocol: Plain

    def __init__(self, user: str, services: Services) -> None:
        """The socket is not upgraded yet; the subclass sets the protocol."""
        self.user = user
        self.state = SessionState.CONNECTING
        self._services = services
        self._websocket: WebSocket | None = None
        self._mailbox = Mailbox(services.limits.max_send_buffer)
        #: How many messages were read and are not yet answered.
        self._unanswered = 0
        #: The message for which the publisher has no room yet.
        self._waiting: Publication | None = None
        #: Whether the reading of the socket is paused.
        self._is_paused = False
        self._received = 0
        self._resends: Resends | None = None

    @abstractmethod
    def close(self, code: int = 1000, reason: str = "") -> None:
        """End the session."""

    @property
    @abstractmethod
    def _log(self) -> logging.LoggerAdapter:  # type: ignore[type-arg]  # not subscriptable before Python 3.11
        """The log, with the user before each line."""

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
        """Whether a message waits for room, or too many answers are missing or wait to be written."""
        return (
            self._unanswered >= _MAX_UNANSWERED
            or self._waiting is not None
            or self._mailbox.answer_bytes >= _MAX_ANSWER_BYTES
        )

    def _go_on_reading(self) -> None:
        """Resume the reading of the socket if there is no reason to pause; may be called from any greenlet."""
        if self._is_paused and not self._must_pause and self._websocket is not None:
            self._is_paused = False
            self._websocket.resume()

    def _on_room(self) -> None:
        """Called in the event loop when the publisher has taken the message that waited, or has refused it."""
        self._waiting = None
        self._go_on_reading()

    def _note_answered(self, count: int) -> None:
        """Note that messages are answered, or need no answer; may be called from any greenlet."""
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

        It keeps its former message id if its sender was told that it may have arrived, and sends the same bytes
        again.
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
        """Answer a message of the browser's; called by the publisher, in any greenlet or in the event loop."""
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
