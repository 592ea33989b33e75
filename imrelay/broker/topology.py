"""The exchanges and queues on the broker: their names, and the AMQP methods that declare them.

    direct_message (direct) --id--> user.<id> (topic, auto-delete) --#--> inbox.<id>
                                                                   --#--> live queues of further sockets

A user is an exchange and an inbox is a queue. When an inbox expires, its exchange and bindings go with it: for
that, nothing but the user's own queues is ever bound to the user's exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pika import spec
from pika.amqp_object import Method

from imrelay.settings.values import InboxConfig

__all__ = [
    "AS_IT_STANDS",
    "INBOX_TAG",
    "LIVE_TAG",
    "UNORDERED_BUDGET",
    "UNORDERED_PREFETCH",
    "Keep",
    "Topology",
]

#: Consumer tags, one of each on a channel.
INBOX_TAG = "inbox"
LIVE_TAG = "live"
#: The key that binds a user's queues to the user's exchange: every message. That exchange is no fanout because
#: RabbitMQ 3.13 to 4.1 with Khepri walks its whole routing table for each message that passes a fanout.
_EVERY_MESSAGE = "#"
#: The dead-letter exchange: for what leaves an inbox without being taken. It is dropped while there is none.
_DEAD_LETTERS = "imrelay.dead"


@dataclass(frozen=True, slots=True)
class Keep:
    """Which of a user's objects are accepted with whatever arguments they have (a `passive` declare)."""

    inbox: bool = False
    exchange: bool = False


#: How often a message may come back to a quorum queue: practically always. Some limit has to be given: without
#: the argument RabbitMQ 4 drops a message that came back 20 times; and where there is no limit (-1 on RabbitMQ 4,
#: nothing before), what a consumer sends back goes behind all others instead of keeping its place (3.10.8, 4.0.5).
_RETURNS = 1_000_000_000
#: Messages under way to a socket from an inbox that does not take back in order (see `takes_back_in_order`): the
#: same for every socket of every relay, whatever its settings. One that asked for fewer than the one before it
#: would get the oldest of what that one has left, and leave them behind the others.
UNORDERED_PREFETCH = 16
#: Room for those in bytes, each a browser's message at the default `max_message_size` with what is added to it:
#: nothing has to be sent back for lack of room, unless messages are unusually large.
UNORDERED_BUDGET = UNORDERED_PREFETCH * (65_536 + 1_024)

#: What is tried in turn: the broker refuses a declaration with 406 if settings have changed since the first one.
AS_IT_STANDS = (Keep(), Keep(inbox=True), Keep(exchange=True), Keep(inbox=True, exchange=True))


class Topology:
    """The names and declarations for one exchange and one set of inbox settings."""

    __slots__ = ("_inbox_arguments", "exchange", "is_replicated")

    def __init__(self, exchange: str, inbox: InboxConfig) -> None:
        self.exchange = exchange
        #: Whether an inbox stands on several nodes of a cluster, of which one leads.
        self.is_replicated = inbox.queue_type == "quorum"
        self._inbox_arguments: dict[str, Any] = {
            "x-queue-type": inbox.queue_type,
            "x-single-active-consumer": True,
            "x-overflow": "reject-publish",
            "x-dead-letter-exchange": _DEAD_LETTERS,
        }
        for argument, value in (
            ("x-delivery-limit", _RETURNS if self.is_replicated else 0),
            ("x-expires", int(inbox.expires * 1000)),
            ("x-message-ttl", int(inbox.ttl * 1000)),
            ("x-max-length", inbox.max_length),
            ("x-max-length-bytes", inbox.max_bytes),
        ):
            if value:
                self._inbox_arguments[argument] = value

    @staticmethod
    def inbox(user: str) -> str:
        """The name of the user's durable queue."""
        return f"inbox.{user}"

    @staticmethod
    def user_exchange(user: str) -> str:
        """The name of the user's exchange."""
        return f"user.{user}"

    def declare_exchange(self) -> Method:
        """`exchange.declare` for the exchange that all messages to users are published to."""
        return spec.Exchange.Declare(exchange=self.exchange, type="direct", durable=True)

    def counts_who_stands_by(self, keep: Keep) -> bool:
        """Whether a declare of the inbox counts all its consumers: at a classic queue, but not at a quorum queue.

        The kind of an inbox that is accepted as it stands is not known.
        """
        return not (self.is_replicated or keep.inbox)

    @staticmethod
    def takes_back(keep: Keep) -> bool:
        """Whether what is sent back comes again: not certain of an inbox that is taken as it stands."""
        return not keep.inbox

    def takes_back_in_order(self, keep: Keep) -> bool:
        """Whether what a consumer had keeps its place whenever it is given back: in a classic queue.

        A quorum queue puts what it takes back behind all else that it has taken back and not delivered again, and
        takes back what a consumer that ends had in the order of its deliveries (3.10.8, 4.0.5).
        """
        return self.takes_back(keep) and not self.is_replicated

    def declare_user(self, user: str, keep: Keep) -> list[Method]:
        """The methods that declare and bind a user's inbox; none of them is answered.

        The inbox is bound before its exchange is: otherwise a message in between would be returned.
        """
        exchange, inbox = self.user_exchange(user), self.inbox(user)
        return [
            spec.Exchange.Declare(exchange=self.exchange, type="direct", durable=True, nowait=True),
            spec.Exchange.Declare(
                exchange=exchange,
                type="topic",
                durable=True,
                auto_delete=True,
                passive=keep.exchange,
                nowait=True,
            ),
            spec.Queue.Declare(
                queue=inbox,
                durable=True,
                passive=keep.inbox,
                nowait=True,
                arguments={} if keep.inbox else self._inbox_arguments,
            ),
            spec.Queue.Bind(queue=inbox, exchange=exchange, routing_key=_EVERY_MESSAGE, nowait=True),
            spec.Exchange.Bind(destination=exchange, source=self.exchange, routing_key=user, nowait=True),
        ]

    def ask_inbox(self, user: str) -> Method:
        """A passive `queue.declare`: its answer counts the inbox's consumers and waiting messages.

        It renews the inbox, too: RabbitMQ restarts `x-expires`.
        """
        return spec.Queue.Declare(queue=self.inbox(user), passive=True)

    def consume_inbox(self, user: str) -> Method:
        """`basic.consume` with manual acknowledgement on the inbox."""
        return spec.Basic.Consume(queue=self.inbox(user), consumer_tag=INBOX_TAG)

    @staticmethod
    def declare_live() -> Method:
        """`queue.declare` for a live queue; the broker chooses its name.

        Exclusive queues live as long as their connection, which many sockets share: hence auto-delete too.
        """
        return spec.Queue.Declare(queue="", exclusive=True, auto_delete=True)

    def bind_live(self, user: str, live: str) -> Method:
        """`queue.bind` of a live queue to the user's exchange, without an answer."""
        exchange = self.user_exchange(user)
        return spec.Queue.Bind(queue=live, exchange=exchange, routing_key=_EVERY_MESSAGE, nowait=True)

    def unbind_live(self, user: str, live: str) -> Method:
        """`queue.unbind` of a live queue, before it is deleted.

        A message that is routed to a queue which is just gone is refused by RabbitMQ (`basic.nack`), though the
        inbox has taken it.
        """
        return spec.Queue.Unbind(queue=live, exchange=self.user_exchange(user), routing_key=_EVERY_MESSAGE)

    @staticmethod
    def consume_live(live: str) -> Method:
        """`basic.consume` with manual acknowledgement on a live queue."""
        return spec.Basic.Consume(queue=live, consumer_tag=LIVE_TAG)
