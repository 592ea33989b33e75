"""The inboxes that do not answer, and the channels that hang at them.

The broker ends such a channel only when the queue goes on: until then it takes one of those that a connection may
have, and each further question takes one more. They have to leave enough for all others.
"""

from __future__ import annotations

import time

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.errors import ChannelLost

__all__ = ["HangingInboxes"]

#: Seconds after which an inbox is asked for anew though the last channel still hangs, which it may do for ever.
_AGAIN = 60.0


class HangingInboxes:
    """The users whose inbox did not answer when it was asked for last, on channels of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        #: The channel that hangs, and since when, by the monotonic clock.
        self._channels: dict[str, tuple[Channel, float]] = {}

    def __contains__(self, user: str) -> bool:
        """Tell whether the channel of a user still hangs."""
        channel, _ = self._channels.get(user, (None, 0.0))
        return channel is not None and channel.lost is None

    def add(self, user: str, channel: Channel) -> None:
        """Note that an inbox did not answer on this channel."""
        self._channels = {name: entry for name, entry in self._channels.items() if name in self}
        self._channels[user] = channel, time.monotonic()

    def check(self, user: str) -> None:
        """Raise `ChannelLost` where a user's inbox is not to be asked for now."""
        if user not in self:
            return
        is_early = time.monotonic() - self._channels[user][1] < _AGAIN
        if is_early or self._connection.channels > self._connection.channel_max // 2:
            raise ChannelLost("the channel on which it was asked for last still hangs")
