"""Deliveries, and the mailbox in which they wait for the writer of one browser socket."""

from __future__ import annotations

import gevent
from pika import spec

from imrelay.broker.channel import Channel

__all__ = ["Delivery", "Mailbox"]


class Delivery:
    """A message from the broker that waits to be taken (`basic.deliver`)."""

    __slots__ = ("body", "channel", "is_own", "may_repeat", "mid", "redelivered", "tag", "time_ms", "type")

    def __init__(
        self,
        channel: Channel,
        method: spec.Basic.Deliver,
        properties: spec.BasicProperties,
        body: bytes,
        *,
        was_live: bool,
    ) -> None:
        self.channel = channel
        self.tag: int = method.delivery_tag
        self.body = body
        #: The AMQP property `type`: text, binary, or whatever another program wrote there.
        self.type: str | None = properties.type
        #: The AMQP property `message_id`; without it there is no repeat detection.
        self.mid: str | None = properties.message_id
        #: The AMQP property `timestamp`, in milliseconds since 1970; other programs may set it.
        self.time_ms = None if properties.timestamp is None else int(properties.timestamp) * 1000
        #: Whether the broker has delivered it before, to anybody.
        self.redelivered: bool = method.redelivered
        #: Whether a relay published it, so that its body is a message.
        self.is_own: bool = properties.app_id == "imrelay"
        #: Whether it may have been delivered before. A message of another program that comes for the first time
        #: never is one: such programs may give many messages the same `message_id`.
        self.may_repeat = self.redelivered or self.is_own or was_live


class Mailbox:
    """What waits for one socket's writer: deliveries, and frames from this process; in order.

    It has no bound of its own: deliveries are bounded by the prefetch, frames by who puts them.
    """

    __slots__ = ("_closed", "_items", "_reader")

    def __init__(self) -> None:
        self._items: list[Delivery | bytes] = []
        self._reader: gevent.Greenlet | None = None
        self._closed = False

    def put(self, item: Delivery | bytes) -> None:
        """Add an item and wake the reader. May be called from the hub.

        Once it is closed, deliveries are left out: unacknowledged, the broker gives them to somebody else.
        """
        if self._closed and isinstance(item, Delivery):
            return
        self._items.append(item)
        self._wake()

    def close(self) -> None:
        """End it: the reader gets what is there and then an empty list. May be called from the hub."""
        self._closed = True
        self._wake()

    def take(self) -> list[Delivery | bytes]:
        """Block until there is something, and return all of it; an empty list once it is closed and empty."""
        while not self._items and not self._closed:
            self._reader = gevent.getcurrent()
            try:
                gevent.get_hub().switch()
            finally:
                self._reader = None
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            gevent.get_hub().loop.run_callback(reader.switch)
