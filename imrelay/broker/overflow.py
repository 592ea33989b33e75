"""Deliveries that a socket had no room for: sent back to their queue, and awaited from there in the same order.

A queue delivers what is sent back before anything newer, but what was already under way comes in between. So each
delivery is compared with those that are awaited, by identity; one that is not awaited is newer and is sent back
too.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from imrelay.broker.codec import Delivery

__all__ = ["Overflow", "identify"]

Identity = str | bytes


def identify(delivery: Delivery) -> Identity:
    """Return what tells a message from others: the `mid` of one of a relay, a digest of another program's.

    Two messages of another program that have the same type, `message_id` and body cannot be told apart.
    """
    if delivery.is_own and delivery.mid is not None:
        return delivery.mid
    kind = b"binary" if delivery.binary else b"text"
    mid = (delivery.mid or "").encode(errors="surrogatepass")
    digest = hashlib.blake2b(b"%b %d %b" % (kind, len(mid), mid), digest_size=16)
    digest.update(delivery.body)
    return digest.digest()


class _Refused(NamedTuple):
    """A delivery whose body was dropped. The broker holds it as unacknowledged until it is sent back."""

    tag: int
    size: int
    identity: Identity
    redelivered: bool


#: Shared by all that have refused nothing, to save memory. Nothing is ever put into it.
_NOTHING: deque[_Refused] = deque(maxlen=0)


class Overflow:
    """The deliveries of one queue on one channel that there was no room for, oldest first."""

    __slots__ = ("_awaited", "_awaited_size", "_refused", "is_watched")

    def __init__(self) -> None:
        #: Sent back and not seen again.
        self._awaited = _NOTHING
        self._awaited_size = 0
        #: Not sent back yet, and newer than all those.
        self._refused = _NOTHING
        #: Whether a greenlet runs `watch_overflow` for it.
        self.is_watched = False

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._awaited or self._refused)

    @property
    def awaited(self) -> int:
        """How many were sent back and have not come again."""
        return len(self._awaited)

    def pop(self, identities: Collection[Identity]) -> list[int]:
        """Forget the messages of these identities that were not sent back yet; return their delivery tags."""
        tags = [refused.tag for refused in self._refused if refused.identity in identities]
        if tags:
            self._refused = deque(refused for refused in self._refused if refused.identity not in identities)
        return tags

    def refuse(self, delivery: Delivery) -> None:
        """Drop the body of a delivery, which comes after all that are here."""
        identity = identify(delivery)
        if self._refused is _NOTHING:
            self._refused, self._awaited = deque(), deque()
        self._refused.append(_Refused(delivery.tag, len(delivery.body) + 1, identity, delivery.redelivered))

    def admit(self, delivery: Delivery) -> bool:
        """Tell whether a delivery is an awaited one. Those before it are gone: expired or purged.

        Its `redelivered` is that of the first time that it came.
        """
        identity = identify(delivery)
        place = next((at for at, refused in enumerate(self._awaited) if refused.identity == identity), None)
        if place is None:
            return False
        for _ in range(place + 1):
            refused = self._awaited.popleft()
            self._awaited_size -= refused.size
        delivery.redelivered = refused.redelivered
        return True

    def send_back(self, room: int) -> list[int]:
        """Return the delivery tags of the oldest that fit into `room` bytes with all that are awaited.

        The caller sends them back. A single one may be larger than the room.
        """
        tags: list[int] = []
        while self._refused and (not self._awaited or self._awaited_size + self._refused[0].size <= room):
            refused = self._refused.popleft()
            self._awaited.append(refused)
            self._awaited_size += refused.size
            tags.append(refused.tag)
        return tags

    def give_up(self) -> None:
        """Stop waiting: what was sent back does not come."""
        self._awaited.clear()
        self._awaited_size = 0
