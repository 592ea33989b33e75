"""Looks into the inboxes of users, and empties or deletes them: what `imrelay inbox` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gevent.event import Event
from pika import spec

from imrelay.broker.channel import Channel
from imrelay.broker.codec import Delivery
from imrelay.broker.connection import Connection
from imrelay.broker.topology import INBOX_TAG, Topology
from imrelay.errors import ChannelLost, SetupError

__all__ = ["InboxInspector", "InboxState"]

_NOT_FOUND = 404
#: Messages under way while the first ones are thrown away.
_PREFETCH = 100
#: Seconds without a message after which no more are waited for.
_IDLE = 5.0


@dataclass(frozen=True, slots=True)
class InboxState:
    """What a passive `queue.declare` tells of an inbox."""

    #: Messages that wait; those under way to a socket are not counted.
    messages: int
    #: Sockets of the user, on whichever relay.
    consumers: int


class InboxInspector:
    """Looks into inboxes over a connection that it opens and closes; use it as a context."""

    def __init__(self, connection: Connection, topology: Topology, *, timeout: float) -> None:
        """Take a connection that has not been started; `timeout` is for its opening, in seconds."""
        self._connection = connection
        self._topology = topology
        self._timeout = timeout

    def __enter__(self) -> InboxInspector:
        """Connect; raises `SetupError` where the broker does not answer."""
        self._connection.start()
        if not self._connection.wait_open(self._timeout):
            problem = self._connection.problem
            self._connection.close()
            raise SetupError(f"no connection to the broker: {problem}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def look(self, user: str) -> InboxState | None:
        """Return the state of the user's inbox; None where there is none.

        The look renews it: RabbitMQ counts a passive declare as use, and restarts `x-expires`. AMQP has no way
        to ask without that.
        """
        answer = self._ask(lambda channel: channel.call(self._topology.ask_inbox(user))[0])
        return None if answer is None else InboxState(answer.message_count, answer.consumer_count)

    def purge(self, user: str) -> int:
        """Throw away all messages that wait (`queue.purge`); return how many."""
        queue = self._topology.inbox(user)
        answer = self._ask(lambda channel: channel.call(spec.Queue.Purge(queue=queue))[0])
        return 0 if answer is None else int(answer.message_count)

    def drop(self, user: str, count: int) -> int:
        """Throw away the first `count` messages that wait, of an inbox without sockets; return their number.

        It consumes them as a socket does: with one there, that would get them. Raises `ChannelLost`.
        """
        dropped = 0
        while dropped < count:
            want = min(count - dropped, _PREFETCH)
            taken = self._drop_once(user, want)
            dropped += taken
            if taken < want:
                break
        return dropped

    def _drop_once(self, user: str, want: int) -> int:
        """Drop so many messages, or as many as come. It takes no more: a quorum queue would reorder them."""
        tags: list[int] = []
        is_done = Event()

        def on_delivery(delivery: Delivery) -> None:
            tags.append(delivery.tag)
            if len(tags) == want:
                is_done.set()

        channel = Channel(self._connection, on_delivery=on_delivery, on_lost=lambda lost: is_done.set())
        try:
            channel.call(spec.Basic.Qos(prefetch_count=want), self._topology.consume_inbox(user))
            before = -1
            while not is_done.wait(_IDLE) and len(tags) != before:
                before = len(tags)
            channel.call(spec.Basic.Cancel(INBOX_TAG))
            if tags:
                channel.ack(tags[-1], multiple=True, at_once=True)
            channel.call(self._topology.ask_inbox(user))  # answered after the acknowledgements
        finally:
            channel.close()
        channel.wait_ended(_IDLE)
        return len(tags)

    def delete(self, user: str) -> int:
        """Delete the inbox with its messages (`queue.delete`), and with it the user's exchange; return how many.

        A connected socket declares it again at once.
        """
        queue = self._topology.inbox(user)
        answer = self._ask(lambda channel: channel.call(spec.Queue.Delete(queue=queue))[0])
        return 0 if answer is None else int(answer.message_count)

    def _ask(self, question: Callable[[Channel], Any]) -> Any:
        channel = Channel(self._connection)
        try:
            return question(channel)
        except ChannelLost as exc:
            if exc.reply_code == _NOT_FOUND:
                return None
            raise
        finally:
            channel.close()
