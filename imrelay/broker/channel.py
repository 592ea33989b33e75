"""One AMQP channel of an `Adapter`: blocking calls for its owner, and callbacks for what arrives.

What arrives is handled in the greenlet that reads the connection, where nothing may block; a caller blocks in its
own. Requests are pipelined: all methods of one `call` go out together and take one round trip, `channel.open`
among them.

    OPENING --channel.open-ok--> OPEN --close--> CLOSING --channel.close-ok--> CLOSED
    any of them --channel.close of the broker's, end of the connection--> CLOSED
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Sequence

from gevent.event import AsyncResult, Event
from pika import spec
from pika.amqp_object import Method
from pika.exceptions import ConnectionClosedByClient

from imrelay.broker.codec import Delivery, PublishTemplate, encode_ack, encode_message, encode_method
from imrelay.broker.connection import Connection, describe
from imrelay.errors import ChannelLost

__all__ = ["Channel"]

logger = logging.getLogger(__name__)

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
    spec.Queue.Unbind: spec.Queue.UnbindOk,
}

#: Seconds for the broker to answer all methods of one `call`; at a queue without its leader a declare may hang.
ANSWER_TIMEOUT = 30.0
#: Shared by all channels that await no answer, to save memory: there is a channel for each socket.
_NO_REPLIES: list[Method] = []


class _ChannelState(enum.Enum):
    """Where the life of a channel stands."""

    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


_OPEN, _CLOSING = _ChannelState.OPEN, _ChannelState.CLOSING


class Channel:
    """One AMQP channel; what may be called in the event loop says so.

    `on_delivery` (or `on_message`, which gets the delivery tag, all properties and the body), `on_cancel` (the
    broker has ended a consumer: `basic.cancel`) and `on_lost` are called where the connection is read, or in the
    event loop; they may not block and may only hand over. `on_lost` is called once, whoever ended the channel,
    unless `close` did.
    """

    __slots__ = (
        "_adapter",
        "_awaited",
        "_ended",
        "_expected",
        "_idle",
        "_number",
        "_on_cancel",
        "_on_lost",
        "_on_message",
        "_on_return",
        "_outbound",
        "_replies",
        "_state",
        "lost",
        "on_confirm",
        "on_delivery",
    )

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
        self.on_delivery = on_delivery
        #: See `confirm`.
        self.on_confirm: Callable[[int, bool, bool], None] | None = None
        self._on_return: Callable[[str | None], None] | None = None
        self._on_message = on_message
        self._on_cancel = on_cancel
        self._on_lost = on_lost
        #: The kinds of answers that `call` waits for, and those that have come.
        self._expected: Sequence[type[Method]] = ()
        self._replies = _NO_REPLIES
        self._awaited: AsyncResult | None = None
        #: Set when the call that is under way has ended, where another greenlet waits for that.
        self._idle: Event | None = None
        self._ended: Event | None = None
        self._state = _ChannelState.OPENING
        self._adapter, self._number = connection.add_channel(self)
        self._outbound = self._adapter.outbound
        self._outbound.emit(encode_method(self._number, spec.Channel.Open()))

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
        if self._state is _CLOSING:  # what followed channel.close would cost the whole connection (504)
            raise ChannelLost("the channel is being closed")
        if not self._adapter.is_open:
            raise ChannelLost("the connection is being closed")
        expected = [_REPLIES[type(method)] for method in methods if not getattr(method, "nowait", False)]
        self._replies = []
        self._awaited = AsyncResult()
        self._expected = expected
        deadline = time.monotonic() + ANSWER_TIMEOUT
        try:
            self._outbound.emit(encode_method(self._number, *methods))
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
            self._expected = ()
            if self._idle is not None:
                self._idle.set()
                self._idle = None

    @property
    def _can_send(self) -> bool:
        return self._state is _OPEN and self._adapter.is_open

    def send(self, method: Method) -> None:
        """Send a method that has no answer; does nothing on a lost channel. May be called in the event loop."""
        if self._can_send:
            self._outbound.emit(encode_method(self._number, method))

    def send_back(self, tags: Sequence[int]) -> None:
        """Give these deliveries back to their queue, where they keep their place (`basic.nack`, one by one).

        On a lost channel they are void. May be called in the event loop.
        """
        if self._can_send:
            nacks = [spec.Basic.Nack(tag, multiple=False, requeue=True) for tag in tags]
            self._outbound.emit(encode_method(self._number, *nacks))

    def discard(self, tag: int) -> None:
        """Have the broker drop a delivery or publish it to the queue's dead-letter exchange (`basic.reject`).

        May be called in the event loop.
        """
        self.send(spec.Basic.Reject(tag, requeue=False))

    def ack(self, tag: int, *, multiple: bool, at_once: bool) -> None:
        """Acknowledge the delivery, or all up to it (`basic.ack`); on a lost channel they are void.

        Unless `at_once`, it waits a few milliseconds for others. May be called in the event loop.
        """
        if self._can_send:
            frame = encode_ack(self._number, tag, multiple)
            (self._outbound.emit if at_once else self._outbound.emit_later)(frame)

    def confirm(
        self,
        on_confirm: Callable[[int, bool, bool], None],
        on_return: Callable[[str | None], None],
    ) -> None:
        """Turn on publisher confirms (`confirm.select`) and block until that is done.

        Where the connection is read, `on_confirm` gets (delivery tag, multiple, whether it was a `basic.ack`), and
        `on_return` the message id of what `mandatory` sent back; they may not block.
        """
        self.on_confirm = on_confirm
        self._on_return = on_return
        self.call(spec.Confirm.Select())

    def prepare(self, exchange: str, *, persistent: bool) -> PublishTemplate:
        """Return what makes the frames for `publish`: all messages of this channel have this in common."""
        return PublishTemplate(self._number, exchange, persistent=persistent, body_max=self._adapter.body_max)

    def publish(self, frames: bytes, *, at_once: bool) -> None:
        """Send the frames of one or more messages; returns at once. Not to be called in the event loop.

        `at_once`: a sender waits for their confirms, which otherwise are read a few milliseconds later. Raises
        `ChannelLost`.
        """
        if not self._can_send:
            raise self.lost or ChannelLost("the channel is being closed")
        self._adapter.expect(at_once=at_once)
        self._outbound.emit_now(frames)

    @property
    def has_unsent(self) -> bool:
        """Whether the kernel has not yet taken all that this connection was to send."""
        return self._outbound.has_unsent

    def watch_drained(self, on_drained: Callable[[], None]) -> None:
        """Have `on_drained` called, in the event loop, when `has_unsent` ends; of one channel of a connection."""
        self._outbound.on_drained = on_drained

    def publish_to_queue(self, queue: str, body: bytes, properties: spec.BasicProperties) -> None:
        """Publish one message to a queue by its name, with `mandatory`; returns at once. Raises `ChannelLost`."""
        if not self._can_send:
            raise self.lost or ChannelLost("the channel is being closed")
        method = spec.Basic.Publish(exchange="", routing_key=queue, mandatory=True)
        self._outbound.emit(encode_message(self._number, method, properties, body, self._adapter.body_max))

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
        if self._state in (_CLOSING, _ChannelState.CLOSED):
            return
        self._on_lost = None
        self.on_delivery = self._on_message = None
        self.on_confirm = self._on_return = None
        self._on_cancel = None
        if self._adapter.is_open:
            self.shut_down()
        else:
            self._end(ChannelLost("closed"))

    def shut_down(self) -> None:
        """Begin to close, so that nothing more is sent; unless it was `close`, the owner is told of the end."""
        if self._state not in (_CLOSING, _ChannelState.CLOSED):
            self._state = _CLOSING
            self._outbound.emit(encode_method(self._number, spec.Channel.Close(0, "Normal shutdown", 0, 0)))

    # -- what arrives: called where the connection is read ----------------------------------------------------

    def receive_method(self, method: Method) -> None:
        """Take a method of the broker's that has no content."""
        if type(method) in self._expected:
            self._replies.append(method)
            if self._awaited is not None:
                self._awaited.set()
        elif isinstance(method, spec.Channel.OpenOk):
            if self._state is _ChannelState.OPENING:
                self._state = _OPEN
        elif isinstance(method, spec.Channel.Close):
            # also where it crosses our own, which RabbitMQ then does not always answer
            self._outbound.emit(encode_method(self._number, spec.Channel.CloseOk()))
            self._end(ChannelLost(f"{method.reply_code} {method.reply_text}", method.reply_code))
        elif isinstance(method, spec.Channel.CloseOk):
            if self._state is _CLOSING:  # otherwise a late one, for the channel that had this number before
                self._end(ChannelLost("closed"))
        elif isinstance(method, (spec.Basic.Ack, spec.Basic.Nack)):
            if self.on_confirm is not None:
                self.on_confirm(method.delivery_tag, method.multiple, isinstance(method, spec.Basic.Ack))
        elif isinstance(method, spec.Basic.Cancel):
            if self._on_cancel is not None:
                self._on_cancel()
        elif self._state is not _CLOSING:
            logger.debug("channel %d: unexpected %s", self._number, method.NAME)

    def receive_content(self, method: Method, properties: spec.BasicProperties, body: bytes) -> None:
        """Take a message that was returned, or delivered where there is no `on_delivery`."""
        if isinstance(method, spec.Basic.Return):
            if self._on_return is not None:
                self._on_return(properties.message_id)
        elif self._on_message is not None:
            self._on_message(method.delivery_tag, properties, body)

    def receive_end(self, reason: BaseException) -> None:
        """Take note that the connection has ended."""
        self._end(ChannelLost("closed" if isinstance(reason, ConnectionClosedByClient) else describe(reason)))

    def _end(self, lost: ChannelLost) -> None:
        if self.lost is not None:
            return
        self.lost = lost
        self._state = _ChannelState.CLOSED
        self._adapter.forget_channel(self._number)
        self.on_delivery = None
        if self._ended is not None:
            self._ended.set()
        if self._awaited is not None:
            self._awaited.set_exception(lost)
        if self._on_lost is not None:
            self._on_lost(lost)


def _in_order(expected: Sequence[type[Method]], replies: list[Method]) -> list[Method]:
    """Sort answers by what was asked: RabbitMQ's queues send `basic.consume-ok` later than other answers."""
    left = list(replies)
    return [left.pop(next(i for i, reply in enumerate(left) if type(reply) is kind)) for kind in expected]


def _first_missing(expected: Sequence[type[Method]], replies: Sequence[Method]) -> type[Method]:
    left = [type(reply) for reply in replies]
    for kind in expected:
        if kind not in left:
            return kind
        left.remove(kind)
    raise ValueError("none is missing")
