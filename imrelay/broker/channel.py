"""A blocking face on a channel of pika's GeventConnection.

pika calls back in the hub, where nothing may block; a greenlet that uses this face simply waits. Requests are
pipelined: all methods of one `call` go out together and take one round trip, `channel.open` among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gevent.event import AsyncResult, Event
from pika import spec
from pika.amqp_object import Method
from pika.channel import Channel as PikaChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, ChannelClosedByClient
from pika.frame import Method as Frame

from imrelay.broker.connection import Connection, describe
from imrelay.broker.frames import Delivery, PublishTemplate, encode_ack
from imrelay.broker.wire import WireChannel
from imrelay.errors import ChannelLost

__all__ = ["Channel"]

#: What the broker answers to each method that we send and wait for (AMQP 0-9-1, section 1.7).
_REPLIES: dict[type[Method], type[Method]] = {
    spec.Basic.Cancel: spec.Basic.CancelOk,
    spec.Basic.Consume: spec.Basic.ConsumeOk,
    spec.Basic.Qos: spec.Basic.QosOk,
    spec.Confirm.Select: spec.Confirm.SelectOk,
    spec.Exchange.Bind: spec.Exchange.BindOk,
    spec.Exchange.Declare: spec.Exchange.DeclareOk,
    spec.Queue.Bind: spec.Queue.BindOk,
    spec.Queue.Declare: spec.Queue.DeclareOk,
    spec.Queue.Delete: spec.Queue.DeleteOk,
    spec.Queue.Purge: spec.Queue.PurgeOk,
}

#: Seconds for the broker to answer all methods of one `call`. A declare may hang for ever, at a queue whose leader
#: is lost, while the connection lives.
ANSWER_TIMEOUT = 30.0
#: Stands where no answer is awaited: there is a channel for each socket.
_NO_REPLIES: list[Method] = []


class Channel:
    """One AMQP channel; what is called from the hub says so.

    `on_delivery` (or `on_message`, which gets the delivery tag, all properties and the body), `on_cancel` (the
    broker has ended a consumer: `basic.cancel`) and `on_lost` are called in the hub and may only hand over.
    `on_lost` is called once, whoever ended the channel, unless `close` did.
    """

    __slots__ = ("_awaited", "_connection", "_ended", "_idle", "_on_lost", "_pika", "_replies", "lost")

    def __init__(
        self,
        connection: Connection,
        *,
        on_delivery: Callable[[Delivery], None] | None = None,
        on_message: Callable[[int, spec.BasicProperties, bytes], None] | None = None,
        on_cancel: Callable[[], None] | None = None,
        on_lost: Callable[[ChannelLost], None] | None = None,
    ) -> None:
        """Begin to open the channel; the first `call` finds out whether that worked. Raises `ChannelLost`."""
        #: Why the channel ended; None while it has not.
        self.lost: ChannelLost | None = None
        self._connection = connection
        self._on_lost = on_lost
        self._replies = _NO_REPLIES
        self._awaited: AsyncResult | None = None
        #: Set when the call that is under way has ended, where another greenlet waits for that.
        self._idle: Event | None = None
        self._ended: Event | None = None
        self._pika = connection.open_channel()
        connection.channels += 1
        self._pika.on_delivery = on_delivery
        self._pika.on_message = on_message
        self._pika.on_cancel = on_cancel
        self._pika.on_crossed = self._on_crossed
        self._pika.add_on_close_callback(self._on_close)

    @property
    def is_asking(self) -> bool:
        """Whether an answer is awaited, so that another `call` would wait for it."""
        return self._awaited is not None

    def call(self, *methods: Method) -> list[Method]:
        """Send the methods and block until the broker has answered each that is not `nowait`.

        Calls of several greenlets go one after the other. Returns the answers in the order of the methods. Raises
        `ChannelLost`, with the broker's reply code where it refused one; also where it does not answer within
        `ANSWER_TIMEOUT`: that closes the channel.
        """
        while self._awaited is not None:
            if self._idle is None:
                self._idle = Event()
            self._idle.wait()
        if self.lost is not None:
            raise self.lost
        if self._pika.is_closing:  # what followed channel.close would cost the whole connection (504)
            raise ChannelLost("the channel is being closed")
        wire, number = self._pika.connection, self._pika.channel_number
        if not wire.is_open:
            raise ChannelLost("the connection is being closed")
        expected = [_REPLIES[type(method)] for method in methods if not getattr(method, "nowait", False)]
        self._replies = []
        self._awaited = AsyncResult()
        self._pika.awaited = expected
        self._pika.on_reply = self._on_reply
        deadline = time.monotonic() + ANSWER_TIMEOUT
        try:
            wire.emit(b"".join([Frame(number, method).marshal() for method in methods]))
            while len(self._replies) < len(expected):
                if self.lost is not None:  # in the same read as the last answer
                    raise self.lost
                self._awaited.wait(max(0.0, deadline - time.monotonic()))
                if not self._awaited.ready():
                    missing = _first_missing(expected, self._replies).NAME
                    self.close()
                    raise ChannelLost(f"the broker did not answer within {ANSWER_TIMEOUT:g} s: no {missing}")
                self._awaited.get()
                self._awaited = AsyncResult()
            return _in_order(expected, self._replies)
        finally:
            self._awaited = None
            self._replies = _NO_REPLIES
            self._pika.awaited = ()
            self._pika.on_reply = None
            if self._idle is not None:
                self._idle.set()
                self._idle = None

    def send(self, method: Method) -> None:
        """Send a method that has no answer; does nothing on a lost channel. May be called from the hub."""
        if self.lost is None and self._pika.is_open:
            self._pika._send_method(method)

    def send_back(self, tags: Sequence[int]) -> None:
        """Give these deliveries back to their queue, where they keep their place (`basic.nack`, one by one)."""
        if self.lost is None and self._pika.is_open:
            number = self._pika.channel_number
            nacks = [spec.Basic.Nack(tag, multiple=False, requeue=True) for tag in tags]
            self._pika.connection.emit(b"".join([Frame(number, nack).marshal() for nack in nacks]))

    def discard(self, tag: int) -> None:
        """Have the broker drop a delivery or publish it to the queue's dead-letter exchange (`basic.reject`)."""
        self.send(spec.Basic.Reject(tag, requeue=False))

    def ack(self, tag: int, *, multiple: bool, at_once: bool) -> None:
        """Acknowledge the delivery, or all up to it (`basic.ack`); on a lost channel they are void.

        Unless `at_once`, it waits a few milliseconds for others.
        """
        if self.lost is None and self._pika.is_open:
            wire = self._pika.connection
            frame = encode_ack(self._pika.channel_number, tag, multiple)
            (wire.emit if at_once else wire.emit_later)(frame)

    def confirm(
        self,
        on_confirm: Callable[[int, bool, bool], None],
        on_return: Callable[[str | None], None],
    ) -> None:
        """Turn on publisher confirms (`confirm.select`) and block until that is done.

        In the hub, `on_confirm` gets (delivery tag, multiple, whether it was a `basic.ack`), and `on_return` the
        message id of what `mandatory` sent back.
        """
        self._pika.on_confirm = on_confirm
        for method, accepted in ((spec.Basic.Ack, True), (spec.Basic.Nack, False)):
            self._pika.add_callback(partial(_tell_confirm, self._pika, accepted), [method], False)
        self._pika.add_on_return_callback(partial(_tell_return, on_return))
        self.call(spec.Confirm.Select())

    def prepare(self, exchange: str, *, persistent: bool) -> PublishTemplate:
        """Return what makes the frames for `publish`: all messages of this channel have this in common."""
        body_max = self._pika.connection.body_max
        return PublishTemplate(self._pika.channel_number, exchange, persistent=persistent, body_max=body_max)

    def publish(self, frames: bytes, *, at_once: bool) -> None:
        """Send the frames of one or more messages; returns at once. Not to be called in the hub.

        `at_once`: somebody waits for their confirms, which else come with a few milliseconds of delay. Raises
        `ChannelLost`.
        """
        if self.lost is not None or not self._pika.is_open:
            raise self.lost or ChannelLost("the channel is being closed")
        wire = self._pika.connection
        wire.expect(at_once=at_once)
        wire.emit_now(frames)

    @property
    def has_unsent(self) -> bool:
        """Whether the kernel has not yet taken all that this connection was to send."""
        return bool(self._pika.connection.has_unsent)

    def watch_drained(self, on_drained: Callable[[], None]) -> None:
        """Have `on_drained` called, in the hub, whenever `has_unsent` ends; of one channel of a connection."""
        self._pika.connection.on_drained = on_drained

    def publish_to_queue(self, queue: str, body: bytes, properties: spec.BasicProperties) -> None:
        """Publish one message to a queue by its name, with `mandatory`; returns at once. Raises `ChannelLost`."""
        if self.lost is not None or not self._pika.is_open:
            raise self.lost or ChannelLost("the channel is being closed")
        self._pika.basic_publish("", queue, body, properties, mandatory=True)

    def wait_ended(self, timeout: float) -> bool:
        """Block until the channel has ended, or for `timeout` seconds; tell whether it has.

        After `close`, that is when the broker has confirmed it (`channel.close-ok`), and taken back what was not
        acknowledged.
        """
        if self.lost is None:
            if self._ended is None:
                self._ended = Event()
            self._ended.wait(timeout)
        return self.lost is not None

    def close(self) -> None:
        """Close the channel: what was not acknowledged goes back to its queue. Returns at once; idempotent.

        A confirm that comes late is left out: its tag means another message on the publisher's next channel.
        """
        if self.lost is not None:
            return
        self._on_lost = None
        self._pika.on_delivery = None
        self._pika.on_message = None
        self._pika.on_confirm = None
        self._pika.on_cancel = None
        try:
            self._pika.close()
        except AMQPError:  # it is on its way to be closed by the other side
            self._end(ChannelLost("closed"))

    def _on_reply(self, reply: Method) -> None:
        self._replies.append(reply)
        if self._awaited is not None:
            self._awaited.set()

    def _on_close(self, channel: PikaChannel, reason: Exception) -> None:
        code = reason.reply_code if isinstance(reason, ChannelClosedByBroker) else 0
        self._end(ChannelLost("closed" if isinstance(reason, ChannelClosedByClient) else describe(reason), code))

    def _on_crossed(self, code: int, text: str) -> None:
        """Both sides have closed the channel at once: what it had is back, and an answer may never come."""
        self._end(ChannelLost(f"{code} {text}", code))

    def _end(self, lost: ChannelLost) -> None:
        if self.lost is not None:
            return
        self.lost = lost
        self._pika.on_crossed = None
        self._connection.channels -= 1
        self._pika.on_delivery = None
        if self._ended is not None:
            self._ended.set()
        if self._awaited is not None:
            self._awaited.set_exception(lost)
        if self._on_lost is not None:
            self._on_lost(lost)


def _in_order(expected: Sequence[type[Method]], replies: list[Method]) -> list[Method]:
    """Sort answers by what was asked: RabbitMQ's queues send `basic.consume-ok` when they get round to it."""
    left = list(replies)
    return [left.pop(next(i for i, reply in enumerate(left) if type(reply) is kind)) for kind in expected]


def _first_missing(expected: Sequence[type[Method]], replies: Sequence[Method]) -> type[Method]:
    left = [type(reply) for reply in replies]
    for kind in expected:
        if kind not in left:
            return kind
        left.remove(kind)
    raise ValueError("none is missing")


def _tell_return(
    on_return: Callable[[str | None], None],
    channel: WireChannel,
    method: spec.Basic.Return,
    properties: spec.BasicProperties,
    body: bytes,
) -> None:
    if channel.on_confirm is not None:  # not after `close`
        on_return(properties.message_id)


def _tell_confirm(channel: WireChannel, accepted: bool, frame: Any) -> None:
    if channel.on_confirm is not None:
        channel.on_confirm(frame.method.delivery_tag, frame.method.multiple, accepted)
