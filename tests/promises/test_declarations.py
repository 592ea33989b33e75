"""What inboxes are declared with, and what comes of it on the broker."""

from __future__ import annotations

import pytest
from pika import spec

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.broker.topology import AS_IT_STANDS, Topology
from imrelay.settings.values import InboxConfig
from tests.support.brokers import amqp
from tests.support.harness import VirtualHost, eventually


@pytest.mark.parametrize(("queue_type", "limit"), [("quorum", 1_000_000_000), ("classic", None)])
def test_quorum_inboxes_have_a_limit_of_returns_that_nobody_reaches(queue_type: str, limit: int | None) -> None:
    """The same on every version of the broker; nothing is said of an inbox that is taken as it stands."""
    topology = Topology("direct_message", InboxConfig(queue_type=queue_type))
    for keep in AS_IT_STANDS:
        [declare] = [one for one in topology.declare_user("ann", keep) if isinstance(one, spec.Queue.Declare)]
        assert declare.arguments.get("x-delivery-limit") == (None if keep.inbox else limit)
        assert bool(declare.arguments) is not keep.inbox


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_what_is_sent_back_keeps_its_place_however_often(
    connection: Connection, broker: VirtualHost, queue_type: str
) -> None:
    """Ten messages of thirty are sent back 25 times: they come again before the others, and in their order."""
    topology = Topology("direct_message", InboxConfig(queue_type=queue_type))
    inbox = Channel(connection)
    inbox.call(*topology.declare_user(queue_type, AS_IT_STANDS[0]), topology.ask_inbox(queue_type))
    with amqp(broker.url) as channel:
        for number in range(30):
            channel.basic_publish("", topology.inbox(queue_type), b"%d" % number, mandatory=True)
        channel.basic_qos(prefetch_count=10)
        got: list[tuple[int, int]] = []
        channel.basic_consume(
            topology.inbox(queue_type), lambda _, method, __, body: got.append((method.delivery_tag, int(body)))
        )

        def wave() -> list[tuple[int, int]]:
            channel.connection.process_data_events(0.01)
            return got if len(got) == 10 else []

        for _ in range(25):
            back = eventually(wave)
            assert [number for _, number in back] == list(range(10))
            taken, got[:] = [tag for tag, _ in back], []
            for tag in taken:
                channel.basic_nack(tag, requeue=True)
        assert [number for _, number in eventually(wave)] == list(range(10))
    inbox.close()
