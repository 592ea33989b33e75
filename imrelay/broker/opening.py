"""Reaching an inbox from the sender's side: opening one for who never came, and offering a message once more."""

from __future__ import annotations

from gevent.event import AsyncResult

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.broker.publication import Publication
from imrelay.broker.topology import AS_IT_STANDS, Topology
from imrelay.errors import ChannelLost

__all__ = ["inbox_exists", "offer", "open_inbox"]

#: `channel.close` codes of AMQP 0-9-1.
_NOT_FOUND, _PRECONDITION_FAILED = 404, 406


def inbox_exists(connection: Connection, topology: Topology, user: str) -> bool:
    """Tell whether the user has an inbox; blocks for one round trip. Raises `ChannelLost`."""
    channel = Channel(connection)
    try:
        channel.call(topology.ask_inbox(user))
    except ChannelLost as exc:
        if exc.reply_code == _NOT_FOUND:
            return False
        raise
    finally:
        channel.close()
    return True


def open_inbox(connection: Connection, topology: Topology, user: str) -> None:
    """Declare and bind the user's inbox, or find it standing with whatever arguments. Raises `ChannelLost`."""
    for keep in AS_IT_STANDS:
        channel = Channel(connection)
        try:
            channel.call(*topology.declare_user(user, keep), topology.ask_inbox(user))
            return
        except ChannelLost as exc:
            if exc.reply_code != _PRECONDITION_FAILED or keep is AS_IT_STANDS[-1]:
                raise
        finally:
            channel.close()


def offer(
    connection: Connection, topology: Topology, publication: Publication, *, persistent: bool, timeout: float
) -> bool:
    """Publish a message on a channel of its own and tell whether the broker confirmed it within `timeout` seconds.

    Raises `ChannelLost`.
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
        return answer.ready() and bool(answer.get())
    finally:
        channel.close()
