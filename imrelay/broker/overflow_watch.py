"""Ends the wait for deliveries that were sent back and do not come again: they have expired or were purged."""

from __future__ import annotations

from collections.abc import Callable

import gevent
from pika import spec

from imrelay.broker.channel import Channel
from imrelay.broker.overflow import Overflow

__all__ = ["watch_overflow"]

#: Seconds without a delivery after which the broker is asked whether what was sent back is gone.
_RETURNING = 5.0
#: Seconds for RabbitMQ to go on delivering after it was told that there is room.
_GOING_ON = 0.1


def watch_overflow(
    channel: Channel,
    overflow: Overflow,
    *,
    progress: Callable[[], object],
    queue: Callable[[], str],
    on_given_up: Callable[[], None],
) -> None:
    """Stop waiting for what does not come back; blocks as long as there is any overflow.

    `progress` returns what differs after each delivery, or None once the channel is used no more, which ends the
    watch; `queue` the name of the queue to which it was sent back. Raises `ChannelLost`.
    """
    while overflow and (before := progress()) is not None:
        gevent.sleep(_RETURNING)
        if overflow.awaited and _is_silent(channel, before, progress, queue):
            overflow.give_up()
            on_given_up()


def _is_silent(channel: Channel, before: object, progress: Callable[[], object], queue: Callable[[], str]) -> bool:
    """Tell whether nothing came since `before` although the broker has answered, so that it is not merely slow.

    A queue answers after its deliveries. It is asked twice, because RabbitMQ goes on delivering a moment after it
    was told that there is room.
    """
    for pause in (_GOING_ON, 0):
        if progress() != before or channel.is_asking:
            return False
        channel.call(spec.Queue.Declare(queue=queue(), passive=True))
        gevent.sleep(pause)
    return progress() == before
