"""The relay queue: a relay ends the former session of a browser that has come back, in this process or another.

    imrelay.relays (fanout) --> relay.<incarnation> (exclusive), one for each process

    type     JSON body            meaning
    end      {"user","session"}   end this session, and answer to `reply_to` when the broker has back what it had
    ended    {"session"}          there is no such session (any more)

The incarnation of a process is part of the ids of its sessions, so that another process can reach it by the
default exchange, with `mandatory`: a returned message means that the process is gone or has lost its connection;
it is asked again for a while. All is published over the publishing connection and received over a consuming one,
each on a channel of its own that comes back after every loss.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable

import gevent
from gevent.event import AsyncResult, Event
from pika import spec

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection, ConnectionState
from imrelay.broker.reminders import Reminders
from imrelay.errors import ChannelLost
from imrelay.runtime.loops import run_for_ever

__all__ = ["RelayQueue"]

logger = logging.getLogger(__name__)

_EXCHANGE = "imrelay.relays"
_QUEUE = "relay."
_NAME = re.compile(r"relay\.[0-9A-HJKMNP-TV-Z]{10}")
#: Bounds of the queue of a relay that does not consume: messages, and milliseconds that each waits.
_MAX_LENGTH, _TTL = 10_000, 60_000
#: Messages that are acted upon at the same time.
_PREFETCH = 64
#: Largest body that is read, in bytes.
_MAX_BODY = 65_536
#: Longest time that a handshake waits for the end of the session that it resumes, in seconds.
_END_TIMEOUT = 2.0
#: The part of it for what has just lost its link: this relay's channel, or the other one's queue.
_BACK_TIMEOUT = 0.5
#: Pause after a channel was lost, and after the broker has refused one, in seconds.
_LOST_PAUSE, _REFUSED_PAUSE = 0.1, 5.0


class RelayQueue:
    """The queue of this process, and its messages to the queues of others.

    `wait_for_connection` blocks until there is a connection to consume on; it returns None where none will come.
    `end_here(user, session, timeout)` ends a session of this process, if it is one of this user, and
    blocks until the broker has back what it had not acknowledged, or for `timeout` seconds.
    `wait_given_back(user, timeout)` blocks until nobody consumes from the user's inbox, or for `timeout` seconds.
    """

    def __init__(
        self,
        incarnation: str,
        *,
        wait_for_connection: Callable[[], Connection | None],
        publishing: Connection,
        end_here: Callable[[str, str, float], None],
        wait_given_back: Callable[[str, float], bool],
    ) -> None:
        self._incarnation = incarnation
        self._wait_for_connection = wait_for_connection
        self._publishing = publishing
        self._end_here = end_here
        self._wait_given_back = wait_given_back
        #: The channel that receives, and the one that sends; None while there is none.
        self._receiver: Channel | None = None
        self._sender: Channel | None = None
        self._can_send = Event()
        #: The callers that wait for the end of a session, by its id; each gets whether its relay has answered.
        self._waiting: dict[str, list[AsyncResult]] = {}
        self._reminders = Reminders(lambda user, session: self._ask(user, session, _END_TIMEOUT))
        self._refused = ""
        self._greenlets: list[gevent.Greenlet] = []

    def start(self) -> None:
        """Begin to receive and to send; returns at once."""
        for role in (self._run_receiver, self._run_sender):
            name = f"relay-queue:{role.__name__.removeprefix('_run_')}"
            self._greenlets.append(run_for_ever(role, name=name, pause=_REFUSED_PAUSE))

    def stop(self) -> None:
        """Receive and send nothing more: to others this relay is gone. Blocks for a moment at most."""
        gevent.killall(self._greenlets)
        self._reminders.stop()

    def end_session(self, user: str, session: str) -> None:
        """End a session of a user's on whatever relay, by the id that its welcome named.

        Blocks until the broker has back what that session had not acknowledged, for `_END_TIMEOUT` at most. Where
        its relay cannot be reached, it is asked again for a minute. This blocks for `_BACK_TIMEOUT` then, unless
        that relay is back earlier, or nobody consumes from the user's inbox.
        """
        incarnation = session[10:20]
        if incarnation == self._incarnation:
            self._end_here(user, session, _END_TIMEOUT)
            return
        until = time.monotonic() + _END_TIMEOUT
        self._can_send.wait(_BACK_TIMEOUT)
        if self._ask(user, session, max(0.0, until - time.monotonic())):
            return
        ended = self._reminders.add(incarnation, user, session)
        left = min(_BACK_TIMEOUT, until - time.monotonic())
        if left > 0:
            given_back = gevent.spawn(self._wait_given_back, user, left)
            try:
                gevent.wait([given_back, ended], timeout=left, count=1)
            finally:
                given_back.kill()

    def _ask(self, user: str, session: str, timeout: float) -> bool:
        """Ask the relay of a session to end it; block until it answers, and tell whether it has.

        Blocks for `timeout` seconds at most. Returns early where it has no queue, or nothing can be sent to it or
        heard of it.
        """
        answer: AsyncResult = AsyncResult()
        self._waiting.setdefault(session, []).append(answer)
        try:
            is_sent = self._send(_QUEUE + session[10:20], "end", session, user=user)
            return is_sent and self._receiver is not None and bool(answer.wait(timeout))
        finally:
            waiting = self._waiting[session]
            waiting.remove(answer)
            if not waiting:
                del self._waiting[session]

    def _send(self, queue: str, kind: str, session: str, **more: str) -> bool:
        """Send a message to another relay, if that is possible now; return whether it was sent."""
        sender = self._sender
        if sender is None or self._publishing.state is not ConnectionState.OPEN:
            return False
        properties = spec.BasicProperties(
            type=kind,
            content_type="application/json",
            message_id=session,
            reply_to=_QUEUE + self._incarnation,
            app_id="imrelay",
        )
        try:
            sender.publish_to_queue(queue, json.dumps({"session": session, **more}).encode(), properties)
        except ChannelLost as exc:
            logger.debug("nothing could be sent to %s: %s", queue, exc)
            return False
        return True

    def _run_receiver(self) -> None:
        while True:
            connection = self._wait_for_connection()
            if connection is None:
                return
            self._survive("the relay queue", self._receive, connection)

    def _run_sender(self) -> None:
        while True:
            if self._publishing.wait_open():
                self._survive("the channel to other relays", self._keep_sender)

    def _survive(self, what: str, live: Callable[..., None], *arguments: object) -> None:
        """Use one channel until its end, and then pause."""
        pause = _LOST_PAUSE
        try:
            live(*arguments)
        except ChannelLost as exc:
            if exc.reply_code:
                pause = _REFUSED_PAUSE
                if self._refused != str(exc):  # said once: it is tried for ever
                    self._refused = str(exc)
                    logger.warning("the broker refused %s: %s; a returning session is not ended there", what, exc)
        gevent.sleep(random.uniform(pause / 2, pause))

    def _receive(self, connection: Connection) -> None:
        """Declare the queue and consume it until its channel ends. Raises `ChannelLost`."""
        over = Event()
        channel = Channel(
            connection,
            on_message=lambda tag, properties, body: self._on_message(channel, tag, properties, body),
            on_cancel=over.set,
            on_lost=lambda lost: over.set(),
        )
        queue = _QUEUE + self._incarnation
        arguments = {"x-max-length": _MAX_LENGTH, "x-overflow": "drop-head", "x-message-ttl": _TTL}
        try:
            channel.call(
                spec.Exchange.Declare(exchange=_EXCHANGE, type="fanout", durable=True),
                spec.Queue.Declare(queue=queue, exclusive=True, auto_delete=True, arguments=arguments),
                spec.Basic.Qos(prefetch_count=_PREFETCH),
                spec.Basic.Consume(queue=queue, exclusive=True),
                spec.Queue.Bind(queue=queue, exchange=_EXCHANGE, routing_key=""),
            )
            self._receiver = channel
            self._refused = ""
            if channel.lost is None:
                over.wait()
        finally:
            self._receiver = None
            channel.close()

    def _keep_sender(self) -> None:
        """Keep a channel to send on until it ends. Raises `ChannelLost`."""
        over = Event()
        channel = Channel(self._publishing, on_lost=lambda lost: over.set())
        try:
            channel.confirm(lambda tag, multiple, accepted: None, self._on_return)
            self._sender = channel
            self._can_send.set()
            if channel.lost is None:
                over.wait()
        finally:
            self._sender = None
            self._can_send.clear()
            channel.close()
            for session in list(self._waiting):  # what was asked may not have left
                self._tell(session, has_answered=False)

    def _on_return(self, session: str | None) -> None:
        """There is no such queue, so that relay is gone, or about to come back; in the event loop."""
        self._tell(session or "", has_answered=False)

    def _tell(self, session: str, *, has_answered: bool) -> None:
        for answer in self._waiting.get(session, ()):
            answer.set(has_answered)

    def _on_message(self, channel: Channel, tag: int, properties: spec.BasicProperties, body: bytes) -> None:
        """Take a message, in the event loop; at most `_PREFETCH` are not yet acknowledged."""
        gevent.spawn(self._run_message, channel, tag, properties, body).name = "relay-queue:message"

    def _run_message(self, channel: Channel, tag: int, properties: spec.BasicProperties, body: bytes) -> None:
        try:
            self._act(properties, body)
        except Exception:
            logger.exception("a message to this relay met a fault of the relay's")
        finally:
            channel.ack(tag, multiple=False, at_once=True)

    def _act(self, properties: spec.BasicProperties, body: bytes) -> None:
        """Do what another relay asks for; what is not understood, or malformed, is left alone."""
        try:
            fields = json.loads(body) if len(body) <= _MAX_BODY else None
        except (ValueError, RecursionError):
            fields = None
        match properties.type, fields:
            case "end", {"user": str(user), "session": str(session)}:
                self._end_here(user, session, _END_TIMEOUT)
                if _NAME.fullmatch(properties.reply_to or ""):
                    self._send(properties.reply_to, "ended", session)
            case "ended", {"session": str(session)}:
                self._tell(session, has_answered=True)
            case kind, _:
                logger.debug("a message of type %s to this relay was not understood", ascii(kind))
