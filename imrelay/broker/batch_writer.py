"""Batches: the publications at the head of the publisher's queue, written to its channel in one go."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from imrelay.broker.channel import Channel
from imrelay.broker.codec import PublishTemplate
from imrelay.broker.known_inboxes import KnownInbox, KnownInboxes
from imrelay.broker.ledger import Ledger
from imrelay.broker.publication import Publication
from imrelay.broker.refusals import Refusals
from imrelay.broker.routes import Routes
from imrelay.broker.unconfirmed import Unconfirmed
from imrelay.errors import BadMessage

__all__ = ["BatchWriter"]

logger = logging.getLogger(__name__)

#: Messages, and bytes of their bodies (or one larger message), that are published before others get their turn.
_BATCH, _BATCH_BYTES = 128, 65_536


class BatchWriter:
    """Publishes from `queue`, which it shares with the publisher, as much as may be under way unconfirmed.

    A message to a user whose inbox is not known to be there goes to a route in place of that.
    """

    def __init__(
        self,
        queue: deque[Publication],
        ledger: Ledger,
        unconfirmed: Unconfirmed,
        routes: Routes,
        known: KnownInboxes,
        refusals: Refusals,
        *,
        max_unconfirmed: int,
        clock: Callable[[], float],
    ) -> None:
        self._queue = queue
        self._ledger = ledger
        self._unconfirmed = unconfirmed
        self._routes = routes
        self._known = known
        self._refusals = refusals
        self._max_unconfirmed = max_unconfirmed
        self._clock = clock
        self._template: PublishTemplate | None = None
        #: The delivery tag of the last message whose sender waits for its answer.
        self._awaited_tag = 0

    @property
    def has_room(self) -> bool:
        """Whether one more message may be published before others are confirmed."""
        return len(self._unconfirmed) < (1 if self._refusals.suspects else self._max_unconfirmed)

    def begin(self, template: PublishTemplate) -> None:
        """Begin with another channel, whose frames are made by this."""
        self._template = template
        self._awaited_tag = 0

    def publish(self, channel: Channel) -> None:
        """Publish up to `_BATCH` of what is queued in one go. Raises `ChannelLost`."""
        queue, unconfirmed = self._queue, self._unconfirmed
        by_user, known = self._routes.by_user, self._known.recent
        encode = self._prepared.encode_content
        now = self._clock()
        room = 1 if self._refusals.suspects else min(_BATCH, self._max_unconfirmed - len(unconfirmed))
        frames: list[bytes] = []
        size = 0
        for _ in range(min(len(queue), room)):
            publication = queue.popleft()
            if publication.done:
                self._routes.skip(publication)
                continue
            size += len(publication.body)
            if size > _BATCH_BYTES and frames:
                queue.appendleft(publication)
                break
            user = publication.user
            inbox = known.get(user)
            if by_user and user in by_user:
                route = by_user[user]
                if route.alone is not publication:
                    route.waiting.append(publication)
                    continue
                inbox = route.inbox
            elif inbox is None or inbox.until <= now:
                inbox = self._find_inbox(publication, now)
            if inbox is None:
                continue
            try:
                method = inbox.method or self._encode_method(inbox, user)
                content = encode(publication.mid, publication.binary, publication.body)
            except ValueError:  # a field is too long for AMQP: that message must not end the publisher
                logger.exception("message %s cannot be published", publication.mid)
                self._ledger.answer(publication, BadMessage("this message cannot be published"))
                self._routes.skip(publication)
                continue
            frames += (method, content)
            tag = unconfirmed.add(publication)
            if publication.message_id is not None:
                self._awaited_tag = tag
        if frames:
            is_awaited = self._awaited_tag in unconfirmed.by_tag or self._ledger.is_filling
            hurry = is_awaited or bool(by_user) or bool(self._refusals.suspects)
            channel.publish(b"".join(frames), at_once=hurry)

    def _find_inbox(self, publication: Publication, now: float) -> KnownInbox | None:
        """Return the inbox of a user who is not in the recent half of `_known`; None: the message waits."""
        user = publication.user
        inbox = self._known.find(user)
        if inbox is not None and inbox.until > now:
            return inbox
        # nothing is under way to somebody of whom nothing was ever known on this channel
        is_new = inbox is None and not self._known.has_forgotten
        self._routes.begin(publication, 0 if is_new else self._unconfirmed.count(user))
        return None

    def _encode_method(self, inbox: KnownInbox, user: str) -> bytes:
        inbox.method = self._prepared.encode_method(user)
        return inbox.method

    @property
    def _prepared(self) -> PublishTemplate:
        assert self._template is not None  # it comes with the channel
        return self._template
