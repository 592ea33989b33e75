"""The ways to users: to whose inbox messages may be published, as what, and until when that is known."""

from __future__ import annotations

from imrelay.broker.topology import Keep

__all__ = ["Way", "Ways"]

#: Users that are remembered; at most twice as many.
_REMEMBERED = 10_000


class Way:
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


class Ways:
    """The ways that were found over one channel, in two generations: no bookkeeping per message but a look."""

    __slots__ = ("_older", "recent")

    def __init__(self) -> None:
        self.recent: dict[str, Way] = {}
        self._older: dict[str, Way] = {}

    def find(self, user: str) -> Way | None:
        """Return what is known, be it out of date."""
        way = self.recent.get(user)
        if way is None:
            way = self._older.get(user)
            if way is not None:
                self.remember(user, way)
        return way

    def remember(self, user: str, way: Way) -> None:
        """Note a way; what was not used for longest is forgotten."""
        if len(self.recent) >= _REMEMBERED:
            self._older, self.recent = self.recent, {}
        self.recent[user] = way

    def forget(self, user: str) -> None:
        """Know nothing of a user's inbox any more: a message came back."""
        self.recent.pop(user, None)
        self._older.pop(user, None)

    def clear(self) -> None:
        """Know nothing: on another channel a message has another frame, on another node an inbox another way."""
        self.recent = {}
        self._older = {}
