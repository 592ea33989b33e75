"""What is made on a node to see what it takes: each kind of object, and whole users in the layouts to compare."""

from __future__ import annotations

from collections.abc import Callable

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import Basic

__all__ = ["LAYOUTS", "PARTS", "Maker"]

#: Channels that a connection gets: below RabbitMQ's default limit of 2,047.
_CHANNELS = 1000
_DIRECT, _TOPIC = "bench.direct", "bench.topic"
#: imrelay's prefetch, and the arguments of an inbox by its default settings.
_PREFETCH = 100
_INBOX = {
    "x-queue-type": "classic",
    "x-single-active-consumer": True,
    "x-overflow": "reject-publish",
    "x-dead-letter-exchange": "imrelay.dead",
    "x-expires": 2_592_000_000,
    "x-max-length": 100_000,
}


class Maker:
    """Makes objects on the node; a number goes into the name of each."""

    def __init__(self, url: str) -> None:
        self._parameters = pika.URLParameters(f"{url}?heartbeat=0")
        self.connections: list[pika.BlockingConnection] = []
        #: Channels that are left for consumers, each to have one.
        self.free: list[BlockingChannel] = []
        self._shared: dict[int, BlockingChannel] = {}
        self._opened = 0
        #: Messages that came to a consumer.
        self._taken = 0
        self.control = self.connect().channel()
        self.control.exchange_declare(_DIRECT, "direct", durable=True)
        self.control.exchange_declare(_TOPIC, "topic", durable=True)

    def connect(self) -> pika.BlockingConnection:
        """Open a connection."""
        self.connections.append(pika.BlockingConnection(self._parameters))
        return self.connections[-1]

    def channel(self) -> BlockingChannel:
        """Open a channel with imrelay's prefetch on a connection for many."""
        if self._opened % _CHANNELS == 0:
            self._room = self.connect()
        self._opened += 1
        channel = self._room.channel()
        channel.basic_qos(prefetch_count=_PREFETCH)
        return channel

    def shared_channel(self, number: int, users: int) -> BlockingChannel:
        """Return the channel of a user among as many on each."""
        if number // users not in self._shared:
            self._shared[number // users] = self.channel()
        return self._shared[number // users]

    def exchange(self, name: str) -> None:
        """Declare an exchange as imrelay's of a user is."""
        self.control.exchange_declare(name, "topic", durable=True, auto_delete=True)

    def inbox(self, name: str) -> None:
        """Declare a queue as imrelay's inbox is."""
        self.control.queue_declare(name, durable=True, arguments=_INBOX)

    def consume(self, channel: BlockingChannel, queue: str) -> None:
        """Consume and acknowledge."""

        def take(on: BlockingChannel, method: Basic.Deliver, *_: object) -> None:
            on.basic_ack(method.delivery_tag)
            self._taken += 1

        channel.basic_consume(queue, take)

    def consume_live(self, channel: BlockingChannel, queue: str) -> None:
        """Consume without acknowledgements."""

        def take(*_: object) -> None:
            self._taken += 1

        channel.basic_consume(queue, take, auto_ack=True)

    def pass_one(self, exchange: str, key: str, channel: BlockingChannel) -> None:
        """Send a persistent message through, and acknowledge it."""
        self.control.basic_publish(exchange, key, b"." * 100, pika.BasicProperties(delivery_mode=2))
        due = self._taken + 1
        while self._taken < due:
            channel.connection.process_data_events(None)

    def close(self) -> None:
        """Close all connections."""
        for connection in self.connections:
            connection.close()


def _own_queue(maker: Maker, number: int) -> None:
    maker.control.queue_declare(f"plain.{number}", durable=True)


def _exclusive_queue(maker: Maker, number: int) -> None:
    maker.control.queue_declare("", exclusive=True, auto_delete=True)


def _own_consumer(maker: Maker, number: int) -> None:
    maker.consume(maker.free[number], f"inbox.{number}")


def _message(maker: Maker, number: int) -> None:
    maker.pass_one(_DIRECT, f"user.{number}", maker.free[number])


#: Each kind, in an order in which the later ones find what they need.
PARTS: dict[str, Callable[[Maker, int], object]] = {
    "connection": lambda maker, number: maker.connect(),
    "channel, with its prefetch set": lambda maker, number: maker.free.append(maker.channel()),
    "exchange (topic, durable, auto-delete)": lambda maker, number: maker.exchange(f"user.{number}"),
    "queue, classic, durable, no arguments": _own_queue,
    "queue, classic, as imrelay's inbox": lambda maker, number: maker.inbox(f"inbox.{number}"),
    "queue, classic, exclusive, auto-delete": _exclusive_queue,
    "binding of a queue, own exchange (#)": lambda maker, number: maker.control.queue_bind(
        f"inbox.{number}", f"user.{number}", "#"
    ),
    "binding of an exchange, direct exchange": lambda maker, number: maker.control.exchange_bind(
        f"user.{number}", _DIRECT, f"user.{number}"
    ),
    "binding of a queue, direct exchange": lambda maker, number: maker.control.queue_bind(
        f"plain.{number}", _DIRECT, f"plain.{number}"
    ),
    "binding of a queue, one topic exchange": lambda maker, number: maker.control.queue_bind(
        f"plain.{number}", _TOPIC, f"plain.{number}"
    ),
    "consumer, on a channel of its own": _own_consumer,
    "consumer, all on one channel": lambda maker, number: maker.consume(maker.control, f"plain.{number}"),
    "first message through all that": _message,
}


def _user(maker: Maker, number: int) -> None:
    """Open a user as imrelay does, and send them a message."""
    name = f"a.{number}"
    channel = maker.channel()
    maker.exchange(f"user.{name}")
    maker.inbox(name)
    maker.control.queue_bind(name, f"user.{name}", "#")
    maker.control.exchange_bind(f"user.{name}", _DIRECT, name)
    maker.consume(channel, name)
    maker.pass_one(_DIRECT, name, channel)


def _without_exchange(maker: Maker, number: int, channel: BlockingChannel | None = None, name: str = "b") -> None:
    """Open a user whose inbox is bound to the exchange of all users."""
    channel = channel or maker.channel()
    inbox = f"{name}.{number}"
    maker.inbox(inbox)
    maker.control.queue_bind(inbox, _DIRECT, inbox)
    maker.consume(channel, inbox)
    maker.pass_one(_DIRECT, inbox, channel)


def _default_exchange(maker: Maker, number: int, name: str = "e") -> None:
    """Open a user whose inbox is bound to nothing: messages come by its name over the default exchange."""
    channel, inbox = maker.channel(), f"{name}.{number}"
    maker.inbox(inbox)
    maker.consume(channel, inbox)
    maker.pass_one("", inbox, channel)


def _exclusive(maker: Maker, number: int) -> None:
    """Open a user as the article's server does: nothing is kept for who is away."""
    channel, name = maker.channel(), f"d.{number}"
    queue = channel.queue_declare("", exclusive=True, auto_delete=True).method.queue
    channel.queue_bind(queue, _DIRECT, name)
    maker.consume_live(channel, queue)
    maker.pass_one(_DIRECT, name, channel)


#: Whole users, connected, each of whom has got a message.
LAYOUTS: dict[str, Callable[[Maker, int], object]] = {
    "user, as imrelay declares them": _user,
    "user, no exchange of their own": _without_exchange,
    "user, no exchange and no binding": _default_exchange,
    "… no exchange, a channel for ten users": lambda maker, number: _without_exchange(
        maker, number, maker.shared_channel(number, 10), "c"
    ),
    "user, exclusive queue (the article's)": _exclusive,
}
