"""Nothing is lost when an operator closes connections, or deletes what stands on the broker."""

from __future__ import annotations

import json
from typing import Any

import pika
import pytest

from tests.conftest import RelayFactory
from tests.support.brokers import amqp, wait_ready
from tests.support.browser import Browser
from tests.support.harness import VirtualHost, eventually
from tests.support.traffic import Traffic

TALK = {"ann": ["bob", "cid"], "bob": ["cid"], "cid": []}


@pytest.fixture(autouse=True)
def clean(broker: VirtualHost) -> None:
    """Each test begins with an empty virtual host."""
    broker.delete()
    broker.create()


def reach(broker: VirtualHost, user: str, text: str) -> bool:
    """Publish as another AMQP program would, and tell whether the message found an inbox."""
    with amqp(broker.url) as channel:
        try:
            channel.basic_publish("direct_message", user, text.encode(), mandatory=True)
        except (pika.exceptions.UnroutableError, pika.exceptions.ChannelClosedByBroker):
            return False
    return True


def until_all_arrived(traffic: Traffic) -> None:
    """Stop sending, and wait until nothing is under way."""
    for client in traffic.clients.values():
        client.pause()
    traffic.wait(
        lambda: all(sent.acked and sent.id in traffic.clients[sent.to].arrived for sent in traffic.sent.values()),
        "everything that was sent",
    )


def resume(traffic: Traffic) -> None:
    for client in traffic.clients.values():
        client.resume()


@pytest.mark.parametrize("v1", [False, True], ids=["plain", "v1"])
def test_connections_closed_by_an_operator_come_back(relay: RelayFactory, broker: VirtualHost, v1: bool) -> None:
    """`close_all_connections` under load loses nothing, repeats nothing, and ends no socket."""
    host = relay(broker_publish_timeout=60)
    with Traffic([host], TALK, v1=v1) as traffic:
        for _ in range(3):
            traffic.flow()
            broker.close_connections("closed by an operator")
        traffic.flow()
    traffic.verdict()
    assert "closed by an operator" in host.log


@pytest.mark.parametrize("unknown_recipient", ["create", "refuse"])
def test_a_deleted_inbox_is_opened_again(relay: RelayFactory, broker: VirtualHost, unknown_recipient: str) -> None:
    """An inbox deleted under its consumer is there again at once, and what is sent from then on arrives."""
    host = relay(inbox_unknown_recipient=unknown_recipient, broker_publish_timeout=60)
    with Traffic([host], TALK) as traffic:
        traffic.flow()
        until_all_arrived(traffic)
        with amqp(broker.url) as channel:
            channel.queue_delete("inbox.cid")
        eventually(lambda: broker.queues().get("inbox.cid", {}).get("consumers") == 1)
        resume(traffic)
        traffic.flow()
    traffic.verdict()


def test_an_inbox_deleted_under_load_costs_at_most_what_was_in_it(
    relay: RelayFactory, broker: VirtualHost
) -> None:
    """Traffic to others goes on, every message is answered, and the user is reached again without a reconnect.

    RabbitMQ confirms what was on its way to a queue that is deleted.
    """
    host = relay(broker_publish_timeout=60)
    with Traffic([host], TALK) as traffic:
        traffic.flow()
        with amqp(broker.url) as channel:
            lost = channel.queue_delete("inbox.cid").method.message_count
        traffic.excuse("cid")
        traffic.flow()
    summary = traffic.verdict()
    assert lost == 0, "the consumer had not kept up"
    assert summary.acked == summary.sent


@pytest.mark.parametrize("unknown_recipient", ["create", "refuse"])
def test_a_deleted_exchange_is_made_again_with_its_bindings(
    relay: RelayFactory, broker: VirtualHost, unknown_recipient: str
) -> None:
    """When direct_message is deleted under the publisher, relays and other programs reach all connected again."""
    host = relay(inbox_unknown_recipient=unknown_recipient, broker_publish_timeout=60)
    with Browser(host, "silent") as silent, Traffic([host], TALK) as traffic:
        for _ in range(2):
            traffic.flow()
            with amqp(broker.url) as channel:
                channel.exchange_delete("direct_message")
            traffic.flow()
            eventually(lambda: reach(broker, "silent", json.dumps({"content": "from elsewhere"})))
            assert silent.read() == {"content": "from elsewhere"}
    traffic.verdict()


@pytest.mark.parametrize("unknown_recipient", ["create", "refuse"])
def test_a_deleted_exchange_cuts_nobody_off_on_another_relay(
    relay: RelayFactory, broker: VirtualHost, unknown_recipient: str
) -> None:
    """A user connected to a relay that did not notice the deletion is reached by the other relays."""
    settings: dict[str, Any] = {"inbox_unknown_recipient": unknown_recipient, "broker_publish_timeout": 60}
    first, second = relay(**settings), relay(**settings)
    with Browser(second, "far") as far, Traffic([first], TALK) as traffic, Browser(first, "eve") as eve:
        traffic.flow()
        with amqp(broker.url) as channel:
            channel.exchange_delete("direct_message")
        traffic.flow()
        text = eve.say("far", id=1)
        assert far.receive() == text
        assert eve.ack()["id"] == 1
    traffic.verdict()


@pytest.mark.parametrize("unknown_recipient", ["create", "refuse"])
def test_a_deleted_user_exchange_is_made_again(
    relay: RelayFactory, broker: VirtualHost, unknown_recipient: str
) -> None:
    """When a user's own exchange is deleted, the next message to that user brings it back and arrives."""
    host = relay(inbox_unknown_recipient=unknown_recipient, broker_publish_timeout=60)
    with Traffic([host], TALK) as traffic:
        for _ in range(2):
            traffic.flow()
            with amqp(broker.url) as channel:
                channel.exchange_delete("user.cid")
            traffic.flow()
    traffic.verdict()


@pytest.mark.slow
def test_a_second_socket_survives_the_loss_of_its_users_exchange(relay: RelayFactory, broker: VirtualHost) -> None:
    """Every socket of a user gets every message again after the user's exchange was deleted."""
    host = relay()
    with Browser(host, "ann") as ann, Browser(host, "bob") as first, Browser(host, "bob") as second:
        text = ann.say("bob", "before")
        assert (first.receive(), second.receive()) == (text, text)
        with amqp(broker.url) as channel:
            channel.exchange_delete("user.bob")
        ann.say("bob", "in between", id=1)
        assert ann.ack()["id"] == 1
        assert first.read()["content"] == "in between"
        eventually(lambda: len([row for row in broker.bindings() if row["source_name"] == "user.bob"]) == 2, 30)
        text = ann.say("bob", "after")
        assert first.receive() == text
        assert second.contents_until("after")[-1] == "after"


def test_a_second_socket_survives_the_loss_of_the_inbox(relay: RelayFactory, broker: VirtualHost) -> None:
    """Every socket of a user gets every message again after the inbox was deleted."""
    host = relay()
    with Browser(host, "ann") as ann, Browser(host, "bob") as first, Browser(host, "bob") as second:
        text = ann.say("bob", "before")
        assert (first.receive(), second.receive()) == (text, text)
        with amqp(broker.url) as channel:
            channel.queue_delete("inbox.bob")
        eventually(lambda: broker.queues().get("inbox.bob", {}).get("consumers") == 2)
        eventually(lambda: len([row for row in broker.bindings() if row["source_name"] == "user.bob"]) == 2)
        text = ann.say("bob", "after")
        assert (first.receive(), second.receive()) == (text, text)


def test_a_live_queue_deleted_under_its_socket_is_made_again(relay: RelayFactory, broker: VirtualHost) -> None:
    """A further socket whose live queue is deleted gets another one."""
    host = relay()
    with Browser(host, "ann") as ann, Browser(host, "bob") as first, Browser(host, "bob") as second:
        (live,) = [name for name in broker.queues() if name.startswith("amq.gen")]
        broker.evaluate(
            "{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r("
            f"<<{json.dumps(broker.name)}>>, queue, <<{json.dumps(live)}>>)), "
            'rabbit_amqqueue:delete(Q, false, false, <<"tests">>), ok'
        )
        eventually(
            lambda: [
                row["destination_name"]
                for row in broker.bindings()
                if row["source_name"] == "user.bob" and row["destination_name"] not in ("inbox.bob", live)
            ]
        )
        text = ann.say("bob", "after")
        assert (first.receive(), second.receive()) == (text, text)
    wait_ready(host)
