"""What inboxes are declared with depends on the settings and on the version of the broker."""

from __future__ import annotations

import pytest
from pika import spec

from imrelay.broker.connection import Connection, parse_version
from imrelay.broker.topology import AS_IT_STANDS, Topology
from imrelay.config import InboxConfig


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("3.10.8", (3, 10, 8)),
        (b"4.0.5", (4, 0, 5)),
        ("4.1.0-rc.1", (4, 1, 0)),
        ("4.2.0+12.gabc", (4, 2, 0)),
        ("10", (10,)),
        ("", ()),
        ("beta", ()),
        ("v4.0", ()),
        ("9" * 5000, (999_999_999,)),
        ("\u0664.0", ()),
        (b"\xff", ()),
        (None, ()),
        (4, ()),
        ({}, ()),
    ],
)
def test_versions_of_any_look_are_read(version: object, numbers: tuple[int, ...]) -> None:
    """Only the numbers at the beginning count; what has none is an unknown version."""
    assert parse_version(version) == numbers


@pytest.mark.parametrize(
    ("queue_type", "version", "limit"),
    [
        ("quorum", (4, 0, 5), -1),
        ("quorum", (5,), -1),
        ("quorum", (3, 13, 7), None),
        ("quorum", (3, 10, 8), None),
        ("quorum", (), None),
        ("classic", (4, 0, 5), None),
    ],
)
def test_quorum_inboxes_have_no_limit_of_returns(
    queue_type: str, version: tuple[int, ...], limit: int | None
) -> None:
    """From RabbitMQ 4.0 on that has to be said; before, saying it drops a message at its first return."""
    topology = Topology("direct_message", InboxConfig(queue_type=queue_type))
    for keep in AS_IT_STANDS:
        [declare] = [
            one for one in topology.declare_user("ann", keep, version) if isinstance(one, spec.Queue.Declare)
        ]
        assert declare.arguments.get("x-delivery-limit") == (None if keep.inbox else limit)
        assert bool(declare.arguments) is not keep.inbox


def test_the_version_of_a_broker_is_known(connection: Connection) -> None:
    """A connection that is open knows it; one that is not does not."""
    assert connection.broker_version >= (3, 8)
    connection.close()
    assert connection.broker_version == ()
