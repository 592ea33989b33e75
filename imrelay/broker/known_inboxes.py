"""The inboxes that are known to exist: with which declarations they are accepted, and until when that holds."""

from __future__ import annotations

from imrelay.broker.topology import Keep

__all__ = ["KnownInbox", "KnownInboxes"]

#: Users that are remembered; at most twice as many.
_REMEMBERED = 10_000


class KnownInbox:
    """What is known of one user's inbox."""

    __slots__ = ("expires", "keep", "method", "until")

    def __init__(self, until: float, keep: Keep, expires: float) -> None:
        #: Until when the broker cannot have expired it, by the publisher's clock.
        self.until = until
        #: How its declarations are accepted.
        self.keep = keep
        #: Its own `x-expires`, in seconds; 0: never.
        self.expires = expires
        #: The method frame of a message to it, on the present channel.
        self.method = b""


class KnownInboxes:
    """The inboxes that were found over one channel, in two generations: one look-up per message."""

    __slots__ = ("_older", "has_forgotten", "recent")

    def __init__(self) -> None:
        #: Whether some that were known on this channel were forgotten: messages to them may still be under way.
        self.has_forgotten = False
        self.recent: dict[str, KnownInbox] = {}
        self._older: dict[str, KnownInbox] = {}

    def find(self, user: str) -> KnownInbox | None:
        """Return what is known, even if it is out of date."""
        inbox = self.recent.get(user)
        if inbox is None:
            inbox = self._older.get(user)
            if inbox is not None:
                self.remember(user, inbox)
        return inbox

    def remember(self, user: str, inbox: KnownInbox) -> None:
        """Note an inbox; what was not used for longest is forgotten."""
        if len(self.recent) >= _REMEMBERED:
            self.has_forgotten = self.has_forgotten or bool(self._older)
            self._older, self.recent = self.recent, {}
        self.recent[user] = inbox

    def forget(self, user: str) -> None:
        """Forget a user's inbox: a message came back."""
        self.recent.pop(user, None)
        self._older.pop(user, None)

    def clear(self) -> None:
        """Forget all: on another channel the method frames differ, and on another node the inboxes may."""
        self.recent = {}
        self._older = {}
        self.has_forgotten = False
