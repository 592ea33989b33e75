"""On a cluster with quorum inboxes, the loss of the node that a relay is on loses no message."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import RelayFactory
from tests.support.brokers import Cluster
from tests.support.harness import Node
from tests.support.traffic import Traffic


@pytest.fixture(scope="module")
def cluster(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; `node` only says whether there is RabbitMQ at all."""
    folder = tmp_path_factory.mktemp("cluster")
    first = Node(folder / "data")
    try:
        members = Cluster(first, folder)
        try:
            yield members
        finally:
            members.stop()
    finally:
        first.stop()


@pytest.mark.slow
def test_the_node_of_a_relay_killed_under_load_loses_nothing(cluster: Cluster, relay: RelayFactory) -> None:
    """A relay whose node is killed with -9 goes on over the next URL; what was acked arrives, in order, once."""
    first, second, third = cluster.urls
    host = relay(
        broker_url=f"{second} {third} {first}",
        broker_heartbeat=5,
        broker_publish_timeout=90,
        inbox_queue_type="quorum",
    )
    other = relay(
        broker_url=f"{first} {third}",
        broker_heartbeat=5,
        broker_publish_timeout=90,
        inbox_queue_type="quorum",
    )
    talk = {"ann": ["bob", "cid", "away"], "bob": ["cid"], "cid": ["ann"]}
    with Traffic([host], talk) as traffic:
        traffic.add("dan", ["cid"], hosts=[other])
        traffic.flow(30)
        cluster.kill(1)
        host.wait_for_log(r"broker connection publish: open -> waiting")
        traffic.flow(30)
        traffic.add("away", hosts=[other])
        traffic.flow()
    traffic.verdict()
    states = cluster.first.control.evaluate(
        "[{rabbit_misc:rs(amqqueue:get_name(Q)), length(maps:get(nodes, amqqueue:get_type_state(Q)))} "
        "|| Q <- rabbit_amqqueue:list(), amqqueue:get_type(Q) =:= rabbit_quorum_queue]"
    )
    assert len(states) == 5, "an inbox is a quorum queue"
    assert {len_ for _, len_ in states} == {3}, "and stands on all three nodes"
