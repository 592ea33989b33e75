"""Inboxes from the sender's side: to find or create one or many, and to publish a refused message once more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from gevent.event import AsyncResult
from pika.amqp_object import Method

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.broker.publication import Publication
from imrelay.broker.topology import AS_IT_STANDS, Keep, Topology
from imrelay.errors import ChannelLost

__all__ = ["inbox_exists", "methods_for", "offer", "open_inbox"]

#: `channel.close` codes of AMQP 0-9-1.
_NOT_FOUND, _PRECONDITION_FAILED = 404, 406
#: What RabbitMQ says where an inbox was made with another `x-expires`; it compares that argument first.
_OTHER_EXPIRY = re.compile(r"inequivalent arg 'x-expires'(?:.*current is .*?(\d+|none))?", re.DOTALL)
#: What is assumed where it cannot be read what that inbox has, in seconds.
_UNREADABLE_EXPIRY = 2.0


def methods_for(topology: Topology, users: Iterable[tuple[str, Keep]], *, create: bool) -> list[Method]:
    """Return the methods for a check of inboxes in one round trip; each has one `queue.declare-ok`, or two.

    They create an inbox that is not there, or without `create` make the broker refuse with 404; and bind it again.
    """
    methods: list[Method] = []
    for user, keep in users:
        if not create:
            methods.append(topology.ask_inbox(user))
        methods += [*topology.declare_user(user, keep), topology.ask_inbox(user)]
    return methods


def inbox_exists(new_channel: Callable[[], Channel], topology: Topology, user: str) -> bool:
    """Tell whether the user has an inbox; blocks for one round trip. Raises `ChannelLost`."""
    channel = new_channel()
    try:
        channel.call(topology.ask_inbox(user))
    except ChannelLost as exc:
        # for a queue whose node is down the reason is "home node … is down or inaccessible"
        if exc.reply_code == _NOT_FOUND and "no queue" in exc.reason:
            return False
        raise
    finally:
        channel.close()
    return True


def open_inbox(new_channel: Callable[[], Channel], topology: Topology, user: str) -> tuple[Keep, float | None]:
    """Declare and bind the user's inbox, or find it standing with whatever arguments.

    Returns what of it is accepted as it stands, and its `x-expires` in seconds where that differs from the
    topology's (0: never; None: the same). Raises `ChannelLost`.
    """
    expires: float | None = None
    for keep in AS_IT_STANDS:
        channel = new_channel()
        try:
            channel.call(*topology.declare_user(user, keep), topology.ask_inbox(user))
            return keep, expires
        except ChannelLost as exc:
            if exc.reply_code != _PRECONDITION_FAILED or keep is AS_IT_STANDS[-1]:
                raise
            found = _OTHER_EXPIRY.search(exc.reason)
            if found is not None:
                expires = _expiry(found[1])
        finally:
            channel.close()
    raise AssertionError("the last attempt returns or raises")


def _expiry(current: str | None) -> float:
    if current is None:
        return _UNREADABLE_EXPIRY
    return 0.0 if current == "none" else int(current) / 1000


def offer(
    connection: Connection, topology: Topology, publication: Publication, *, persistent: bool, timeout: float
) -> bool | None:
    """Publish a message on a channel of its own and tell whether the broker took it; None: no answer in time.

    `timeout` is in seconds. Raises `ChannelLost`.
    """
    answer: AsyncResult = AsyncResult()
    returned: list[str | None] = []
    channel = Channel(connection, on_lost=answer.set_exception)
    try:
        channel.confirm(lambda tag, multiple, accepted: answer.set(accepted and not returned), returned.append)
        template = channel.prepare(topology.exchange, persistent=persistent)
        content = template.encode_content(publication.mid, publication.binary, publication.body)
        channel.publish(template.encode_method(publication.user) + content, at_once=True)
        answer.wait(timeout)
        return bool(answer.get()) if answer.ready() else None
    finally:
        channel.close()
