"""Refusals: the broker closes the publisher's channel for a message; which one it was, and how long to pause.

A refusal closes the channel, or the connection, and all messages under way remain unconfirmed. Where it names a
limit of size, the messages over it are the culprits, and from then on such a message is refused without the
broker. Else what was under way is suspected, and published one at a time until one is alone under way at the next
refusal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from imrelay.broker.publication import Publication
from imrelay.errors import AnswerableError, BadMessage, ChannelLost, TooLarge

__all__ = ["Refusals"]

#: What RabbitMQ says of a message over its limit (`rabbit_channel`, 3.8 to 4.x), with its own or a configured one.
_TOO_LARGE = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")
#: The code at the start of the reason for which the broker has closed a connection.
_CODE = re.compile(r"(\d{3}) ")
#: `channel.close` codes that say nothing of a message: closed by an operator; not allowed; no exchange; a fault.
_OF_NO_MESSAGE = {320, 403, 404, 541}
#: `connection.close` codes that a message may have caused (AMQP 0-9-1, 1.2: all else has another reason).
_OF_A_CONNECTION = {501, 502, 503, 504, 505, 540}
#: A connection may have been closed for another reason at that moment; a channel was not.
_REFUSALS_OF_A_CONNECTION = 2
#: Bounds of the pause after a refusal, in seconds; it doubles as long as refusals follow each other.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
#: Seconds without a refusal after which the next pause is the first again.
_FORGET_AFTER = 30.0


class Refusals:
    """Finds the message that the broker refuses; `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        #: Seconds to wait before the next channel, after the last refusal.
        self.pause = 0.0
        #: Messages of which one may be the culprit: while there are any, one message at a time is published.
        self.suspects: set[Publication] = set()
        #: The largest body that this connection takes, in bytes, where the broker has said it.
        self._limit: int | None = None
        self._refused_at = 0.0

    def check_size(self, body: bytes) -> None:
        """Raise `TooLarge` for a body over the limit that the broker has named on this connection."""
        if self._limit is not None and len(body) > self._limit:
            raise self._too_large(body)

    def forget_limit(self) -> None:
        """Forget the limit: the next connection may be to a broker with another configuration."""
        self._limit = None

    def clear(self, publication: Publication) -> None:
        """Suspect this message no more: it was taken or answered."""
        self.suspects.discard(publication)

    def prune(self) -> None:
        """Suspect no message that has been answered."""
        if self.suspects:
            self.suspects = {publication for publication in self.suspects if not publication.done}

    def is_one(self, lost: ChannelLost) -> bool:
        """Tell whether the broker has refused something, rather than that the connection was lost."""
        return bool(lost.reply_code) or _connection_code(lost) in _OF_A_CONNECTION

    def judge(
        self, lost: ChannelLost, unconfirmed: Sequence[Publication], pending: Iterable[Publication]
    ) -> list[tuple[Publication, AnswerableError]]:
        """Return the messages that are answered for good, each with why.

        `unconfirmed` is what was published over that channel, `pending` all that is not answered.
        """
        self._prolong_pause()
        if lost.reply_code in _OF_NO_MESSAGE:
            return []
        found = _TOO_LARGE.search(lost.reason)
        if found is not None:
            limit = self._limit = int(found[1])
            large = [publication for publication in pending if len(publication.body) > limit]
            if large:
                return [(publication, self._too_large(publication.body)) for publication in large]
        if len(unconfirmed) == 1:
            (culprit,) = unconfirmed
            culprit.refusals += 1
            if lost.reply_code or culprit.refusals >= _REFUSALS_OF_A_CONNECTION:
                self.clear(culprit)
                return [(culprit, BadMessage(f"the broker refuses this message: {lost.reason}"))]
        self.suspects.update(publication for publication in unconfirmed if not publication.done)
        return []

    def _too_large(self, body: bytes) -> TooLarge:
        return TooLarge(f"the broker takes messages of up to {self._limit} bytes, this one has {len(body)}")

    def _prolong_pause(self) -> None:
        now = self._clock()
        follows = self.pause and now - self._refused_at < _FORGET_AFTER
        self.pause = min(self.pause * 2, _LONGEST_PAUSE) if follows else _FIRST_PAUSE
        self._refused_at = now


def _connection_code(lost: ChannelLost) -> int:
    found = _CODE.match(lost.reason)
    return int(found[1]) if found else 0
