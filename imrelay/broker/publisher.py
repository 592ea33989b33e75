"""The publisher: one greenlet that takes every message of this process to the broker and answers for it.

Messages wait in a bounded queue, go out in batches with `mandatory`, and are done when the broker has confirmed
them. What a lost connection leaves unconfirmed is published again, in order and with the same message id.

Order between one sender and one recipient needs care in one case, the recipient whose inbox may not exist: the
first message to an id that this process has not yet reached goes alone, and what follows waits in a `Detour`
until it is known where that one went. A returned one opens the inbox (or is refused, by configuration). In a
cluster, a refused one (`basic.nack`) may have met an inbox whose leader is just being elected: it is offered again
on a fresh channel before its inbox counts as full, which could not be done in order if others were under way.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import gevent
from gevent.lock import Semaphore

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection, State
from imrelay.broker.detour import Detour
from imrelay.broker.frames import PublishTemplate
from imrelay.broker.ledger import Ledger
from imrelay.broker.mailbox import Bell
from imrelay.broker.opening import inbox_exists, offer, open_inbox
from imrelay.broker.publication import Publication
from imrelay.broker.topology import Topology
from imrelay.errors import (
    BadMessage,
    ChannelLost,
    InboxFull,
    RecipientUnknown,
)
from imrelay.forever import run_for_ever

__all__ = ["Publisher"]

logger = logging.getLogger(__name__)

#: How often the deadlines of waiting messages are looked at, in seconds.
_SWEEP = 0.2
#: Messages that are published before other greenlets get their turn.
_BATCH = 128
#: Ids that are remembered as reached; at most twice as many.
_REACHED = 10_000
#: Pause after the channel went with its connection, in seconds.
_LOST_PAUSE = 0.02
#: Pause after the broker has refused the publisher's channel or an inbox, in seconds.
_REFUSED_PAUSE = 0.5
#: How often a refused message that went alone is offered again, with `_REFUSED_PAUSE` before each.
_OFFERS = 6
#: Inboxes that are being opened at the same time, each over a channel of its own.
_OPENINGS = 16
#: `channel.close` code of AMQP 0-9-1.
_NOT_FOUND = 404


class Publisher:
    """Publishes for all sessions of this process, on a connection of its own.

    `on_exchange_lost` is called when the exchange had been deleted and is declared anew: its bindings are gone.
    `queue_size` bounds the messages that are not yet answered; `timeout` (seconds) is the longest time that one
    waits for its answer, and the longest that `publish` blocks for room.
    """

    def __init__(
        self,
        new_connection: Callable[[str, Callable[[State], None]], Connection],
        topology: Topology,
        *,
        queue_size: int,
        timeout: float,
        persistent: bool,
        create_unknown: bool,
        on_exchange_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = new_connection("publish", self._on_state)
        self._topology = topology
        self._persistent = persistent
        self._create_unknown = create_unknown
        self._on_exchange_lost = on_exchange_lost
        self._exchange_is_lost = False
        self._ledger = Ledger(queue_size, timeout)
        self._queue: deque[Publication] = deque()
        #: By delivery tag; all below `_next_tag` are confirmed.
        self._unconfirmed: dict[int, Publication] = {}
        self._next_tag = 1
        #: The last one whose sender waits for its answer.
        self._awaited_tag = 0
        self._detours: dict[str, Detour] = {}
        self._openings = Semaphore(_OPENINGS)
        #: Method frames to those whose inbox is there.
        self._reached: dict[str, bytes] = {}
        self._reached_before: dict[str, bytes] = {}
        self._channel: Channel | None = None
        self._template: PublishTemplate | None = None
        self._tag = 0
        self._bell = Bell()
        self._stopped = False
        self._greenlets: list[gevent.Greenlet] = []

    def start(self) -> None:
        """Begin to connect and to publish; returns at once."""
        self._connection.start()
        for role in (self._run_publisher, self._run_deadlines):
            self._greenlets.append(run_for_ever(role, name=role.__name__.removeprefix("_run_")))

    def flush(self, timeout: float) -> int:
        """Block until every message has been answered, or for `timeout` seconds; return how many were not."""
        return self._ledger.wait_empty(timeout)

    def stop(self) -> None:
        """End it; what is still waiting is answered with `BrokerUnavailable`."""
        self._stopped = True
        self._bell.ring()
        self._ledger.close()
        self._connection.close()
        gevent.joinall(self._greenlets, timeout=2)

    @property
    def is_ready(self) -> bool:
        """Whether a message that came now would go out at once."""
        return self._channel is not None and self._connection.state is State.OPEN

    @property
    def problem(self) -> str:
        """Why it is not ready, in one sentence."""
        return self._connection.reason or "the channel is being opened"

    def publish(self, publication: Publication) -> None:
        """Queue a message; blocks while there is no room. Its `on_done` will be called once.

        Raises `BrokerUnavailable` when there was no room within the time limit, or the publisher was stopped.
        """
        self._ledger.add(publication)
        if not self._queue:  # else it has been rung, or waits for something else
            self._bell.ring()
        self._queue.append(publication)

    def _on_state(self, state: State) -> None:
        self._bell.ring()

    def _run_publisher(self) -> None:
        while not self._stopped:
            try:
                if self._channel is None:
                    self._open()
                self._drain()
            except ChannelLost as exc:
                self._channel = None
                if exc.reply_code and not self._stopped:
                    logger.warning("the broker refused the publisher's channel: %s", exc)
                gevent.sleep(_REFUSED_PAUSE if exc.reply_code else _LOST_PAUSE)
            except Exception:
                logger.exception("the publisher met a fault of its own and begins anew")
                self._leave()
                gevent.sleep(_REFUSED_PAUSE)

    def _open(self) -> None:
        """Open a channel on the next connection, and queue again all that was not confirmed on the last."""
        while not self._connection.wait_open(timeout=_SWEEP):
            if self._stopped:
                return
        channel = Channel(self._connection, on_lost=self._on_lost)
        channel.call(self._topology.declare_exchange())
        channel.confirm(self._on_confirm, self._on_return)
        self._template = channel.prepare(self._topology.exchange, persistent=self._persistent)
        if channel.lost is not None:  # in the same read as the last answer
            raise channel.lost
        if self._exchange_is_lost:
            self._exchange_is_lost = False
            self._on_exchange_lost()
        self._unconfirmed.clear()
        self._detours.clear()
        self._reached.clear()  # on another node the way to an inbox is another one
        self._reached_before.clear()
        self._queue = deque(self._ledger)
        for publication in self._queue:
            publication.returned = False
        if self._queue:
            logger.info("publishing %d messages again or at last", len(self._queue))
        self._tag = self._awaited_tag = 0
        self._next_tag = 1
        self._channel = channel
        self._bell.ring()

    def _drain(self) -> None:
        """Publish what is queued, until the channel is lost; blocks while there is nothing to do."""
        while self._channel is not None and not self._stopped:
            if not self._queue or self._connection.state is not State.OPEN:
                self._bell.wait()
            else:
                self._publish_some(self._channel)
                if self._queue:
                    gevent.sleep(0)

    def _publish_some(self, channel: Channel) -> None:
        """Publish up to `_BATCH` of what is queued in one go."""
        queue, detours, reached, unconfirmed = self._queue, self._detours, self._reached, self._unconfirmed
        encode = self._prepared.encode_content
        frames: list[bytes] = []
        for _ in range(min(len(queue), _BATCH)):
            publication = queue.popleft()
            if publication.done:
                continue
            user = publication.user
            if detours and user in detours:
                detours[user].waiting.append(publication)
                continue
            try:
                method = reached.get(user) or self._find_way(user)
                content = encode(publication.mid, publication.binary, publication.body)
            except ValueError:  # AMQP has no room for it: that one must not end the publisher of all
                logger.exception("message %s cannot be published", publication.mid)
                self._ledger.answer(publication, BadMessage("this message cannot be published"))
                self._settle(publication, accepted=True)  # nothing of it is under way any more
                continue
            frames += (method, content)
            self._tag += 1
            unconfirmed[self._tag] = publication
            if publication.message_id is not None:
                self._awaited_tag = self._tag
        if frames:
            is_awaited = self._awaited_tag in unconfirmed or self._ledger.is_filling
            channel.publish(b"".join(frames), at_once=is_awaited or bool(detours))

    def _find_way(self, user: str) -> bytes:
        """Return the method frame for a user who is not in `_reached`; raises `ValueError`."""
        method = self._reached_before.get(user)
        if method is not None:
            self._remember(user, method)
            return method
        method = self._prepared.encode_method(user)
        self._detours[user] = Detour(in_flight=1, is_alone=True)
        return method

    @property
    def _prepared(self) -> PublishTemplate:
        assert self._template is not None  # it comes with the channel
        return self._template

    def _on_lost(self, lost: ChannelLost) -> None:
        """The channel ended; in the hub."""
        if lost.reply_code:
            logger.warning("the broker closed the publisher's channel: %s", lost)
        self._exchange_is_lost = self._exchange_is_lost or lost.reply_code == _NOT_FOUND
        self._channel = None
        self._bell.ring()

    def _on_return(self, mid: str | None) -> None:
        """A message came back: its user has no inbox (`basic.return`); its `basic.ack` follows. In the hub."""
        publication = self._ledger.find(mid or "")
        if publication is None:
            return
        publication.returned = True
        user = publication.user
        self._reached.pop(user, None)
        self._reached_before.pop(user, None)
        if user not in self._detours:
            in_flight = sum(other.user == user for other in self._unconfirmed.values())
            self._detours[user] = Detour(in_flight)

    def _on_confirm(self, tag: int, multiple: bool, accepted: bool) -> None:
        """The broker has taken or refused one or more messages (`basic.ack`, `basic.nack`); in the hub."""
        if not multiple:
            publication = self._unconfirmed.pop(tag, None)
            if publication is not None:
                self._settle(publication, accepted)
            return
        while self._next_tag <= tag:
            publication = self._unconfirmed.pop(self._next_tag, None)
            self._next_tag += 1
            if publication is None:
                continue
            if accepted and not self._detours:
                self._ledger.answer(publication, None)
            else:
                self._settle(publication, accepted)

    def _settle(self, publication: Publication, accepted: bool) -> None:
        detour = self._detours.get(publication.user)
        if detour is not None:
            detour.in_flight -= 1
            if publication.returned:
                detour.returned.append(publication)
        if not accepted and detour is not None and detour.is_alone and self._topology.is_replicated:
            gevent.spawn(self._run_offers, publication, detour).name = f"offers:{publication.user}"
            return
        if not accepted:
            self._refuse(publication)
        elif not publication.returned:
            self._ledger.answer(publication, None)
        if detour is not None and not detour.in_flight:
            self._end_detour(publication.user, detour)

    def _refuse(self, publication: Publication) -> None:
        self._ledger.answer(publication, InboxFull("the recipient's inbox is full; try again later"))

    def _run_offers(self, publication: Publication, detour: Detour) -> None:
        """Find out whether an inbox that has refused a message is full, or had no leader at that moment.

        RabbitMQ goes on to refuse what comes over a channel whose first message found a quorum queue without a
        leader (3.10). So it is offered over fresh ones; when that is taken, the publisher needs a fresh one too.
        """
        accepted = False
        for _ in range(_OFFERS):
            gevent.sleep(_REFUSED_PAUSE)
            if self._detours.get(publication.user) is not detour or publication.done:
                break
            left = publication.deadline - time.monotonic()
            try:
                accepted = offer(
                    self._connection, self._topology, publication, persistent=self._persistent, timeout=left
                )
            except ChannelLost as exc:
                logger.debug("message %s could not be offered again: %s", publication.mid, exc)
            if accepted:
                break
        if accepted:
            self._ledger.answer(publication, None)
        if self._detours.get(publication.user) is not detour:  # the channel was lost, and all is queued again
            return
        if accepted:
            self._leave()
        else:
            self._refuse(publication)
            self._end_detour(publication.user, detour)

    def _leave(self) -> None:
        """Close the channel; the publisher opens another one, and publishes again what was not confirmed."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        self._bell.ring()

    def _end_detour(self, user: str, detour: Detour) -> None:
        """All that was under way to this user has been answered by the broker; in the hub."""
        if detour.returned:
            gevent.spawn(self._run_opening, user, detour).name = f"opening:{user}"
        else:
            self._remember(user, self._prepared.encode_method(user))
            self._resume(user, detour)

    def _run_opening(self, user: str, detour: Detour) -> None:
        """Open the inbox of a user whom nothing reaches, then publish again what came back.

        Where unknown recipients are refused, an inbox that is there has only lost its bindings and gets them back.
        """
        try:
            with self._openings:
                is_open = self._create_unknown or inbox_exists(self._connection, self._topology, user)
                if is_open:
                    open_inbox(self._connection, self._topology, user)
            if is_open:
                self._remember(user, self._prepared.encode_method(user))
            else:
                for publication in detour.returned:
                    self._ledger.answer(publication, RecipientUnknown("nobody with this id was ever here"))
        except ChannelLost as exc:
            logger.warning("the inbox of %s could not be opened: %s", ascii(user), exc)
            gevent.sleep(_REFUSED_PAUSE)
        if self._detours.get(user) is detour:
            for publication in detour.returned:
                publication.returned = False
            detour.waiting.extendleft(reversed(detour.returned))
        self._resume(user, detour)

    def _resume(self, user: str, detour: Detour) -> None:
        """Queue again what waited; after the loss of the channel all has been, and the detour is void."""
        if self._detours.get(user) is not detour:
            return
        del self._detours[user]
        self._queue.extendleft(reversed(detour.waiting))
        self._bell.ring()

    def _remember(self, user: str, method: bytes) -> None:
        if len(self._reached) >= _REACHED:
            self._reached_before = self._reached.copy()
            self._reached.clear()
        self._reached[user] = method

    def _run_deadlines(self) -> None:
        """Answer what the broker did not confirm in time; deadlines are in the order of acceptance."""
        while not self._stopped:
            gevent.sleep(_SWEEP)
            if self._ledger.expire():  # while the broker is away, what has been answered must not pile up
                self._queue = deque(publication for publication in self._queue if not publication.done)
                for detour in self._detours.values():
                    detour.waiting = deque(publication for publication in detour.waiting if not publication.done)
