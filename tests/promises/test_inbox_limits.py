"""An inbox keeps what it was told to keep: its limits, its times, and settings that have changed since."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import RelayFactory
from tests.support.brokers import amqp
from tests.support.browser import Browser
from tests.support.harness import VirtualHost, eventually
from tests.support.traffic import Traffic


@pytest.fixture(autouse=True)
def clean(broker: VirtualHost) -> None:
    """Each test begins with an empty virtual host."""
    broker.delete()
    broker.create()


def depth(broker: VirtualHost, user: str) -> int:
    return int(broker.queues()[f"inbox.{user}"]["messages"])


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize(
    ("limits", "filling"),
    [({"inbox_max_length": 40}, ""), ({"inbox_max_length": 0, "inbox_max_bytes": 20_000}, "x" * 500)],
    ids=["max_length", "max_bytes"],
)
def test_a_full_inbox_is_told_and_loses_nothing_that_was_acked(
    relay: RelayFactory, limits: dict[str, Any], filling: str, queue_type: str
) -> None:
    """Under load, what an inbox cannot hold is answered with inbox_full, what was acked arrives, others go on."""
    host = relay(inbox_queue_type=queue_type, broker_publish_timeout=60, **limits)
    talk = {"ann": ["away", "cid"], "bob": ["away"], "cid": []}
    with Traffic([host], talk, every=0.01, filling=filling) as traffic:
        traffic.wait_for_errors(30)
        before = len(traffic.clients["cid"].arrivals)
        traffic.wait(lambda: len(traffic.clients["cid"].arrivals) > before + 10, "messages to somebody else")
        kept = {key for key, sent in traffic.sent.items() if sent.to == "away" and sent.acked}
        assert 20 <= len(kept) <= 100, "the limit is what was configured, or a little over"
        away = traffic.add("away")
        traffic.wait(lambda: kept <= away.arrived, "what the inbox held")
        traffic.flow()
    traffic.verdict(errors=["inbox_full"])
    errors = [answer["error"] for sent in traffic.sent.values() for answer in sent.answers if "error" in answer]
    assert all(error["temporary"] is True for error in errors)
    assert "cid" not in {sent.to for sent in traffic.sent.values() if not sent.acked}


def test_a_full_inbox_takes_messages_again_when_it_was_read(relay: RelayFactory, broker: VirtualHost) -> None:
    """inbox_full is temporary: it ends when the user has come."""
    host = relay(inbox_max_length=2)
    with Browser(host, "ann") as ann:
        for number in range(2):
            ann.say("away", number, id=number)
            assert ann.ack()["id"] == number
        ann.say("away", 2, id=2)
        error = ann.error()
        assert (error["code"], error["id"], error["temporary"]) == ("inbox_full", 2, True)
        with Browser(host, "away") as away:
            assert away.contents_until(1) == [0, 1]
        eventually(lambda: depth(broker, "away") == 0)
        ann.say("away", 3, id=3)
        assert ann.ack()["id"] == 3


def test_messages_older_than_ttl_are_dropped(relay: RelayFactory, broker: VirtualHost) -> None:
    """A message waits as long as `ttl` and no longer; one that is younger is delivered."""
    host = relay(inbox_ttl=1)
    with Browser(host, "ann") as ann:
        ann.say("away", "old", id=1)
        assert ann.ack()["id"] == 1
        eventually(lambda: depth(broker, "away") == 0)
        ann.say("away", "young", id=2)
        assert ann.ack()["id"] == 2
        with Browser(host, "away") as away:
            assert away.read()["content"] == "young"


@pytest.mark.parametrize("unknown_recipient", ["create", "refuse"])
def test_an_inbox_that_nobody_opens_expires_with_all_of_it(
    relay: RelayFactory, broker: VirtualHost, unknown_recipient: str
) -> None:
    """After `expires` without a socket, inbox, exchange and bindings are gone; that of a connected user stays."""
    host = relay(inbox_expires=1, inbox_unknown_recipient=unknown_recipient)
    with Browser(host, "ann") as ann:
        with Browser(host, "bob"):
            ann.say("bob", 1, id=1)
            assert ann.ack()["id"] == 1
        eventually(lambda: "inbox.bob" not in broker.queues(), 20)
        assert "user.bob" not in broker.exchanges()
        assert not [row for row in broker.bindings() if "bob" in str(row)]
        assert "inbox.ann" in broker.queues()
        ann.say("bob", 2, id=2)
        if unknown_recipient == "create":
            assert ann.ack()["id"] == 2
        else:
            assert ann.error()["code"] == "recipient_unknown"


def test_an_unknown_recipient_is_refused_where_that_is_set(relay: RelayFactory, broker: VirtualHost) -> None:
    """`unknown_recipient = refuse`: nothing is made for an id that never connected; one that did stays known."""
    host = relay(inbox_unknown_recipient="refuse")
    with Browser(host, "ann") as ann:
        ann.say("bob", 1, id=1)
        error = ann.error()
        assert (error["code"], error["id"], error.get("temporary")) == ("recipient_unknown", 1, None)
        assert set(broker.user_queues()) == {"inbox.ann"}
        Browser(host, "bob").close()
        ann.say("bob", 2, id=2)
        assert ann.ack()["id"] == 2
        with Browser(host, "bob") as bob:
            assert bob.read()["content"] == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"inbox_max_length": 5_000},
        {"inbox_max_bytes": 1_000_000},
        {"inbox_ttl": 3_600},
        {"inbox_expires": 3_600},
        {"inbox_queue_type": "quorum"},
    ],
    ids=lambda changed: next(iter(changed)).removeprefix("inbox_"),
)
def test_relays_of_old_and_new_settings_share_users(
    relay: RelayFactory, broker: VirtualHost, changed: dict[str, Any]
) -> None:
    """Relays of old and new settings share users under load; old inboxes go on as they are, said once a relay."""
    old = relay(broker_publish_timeout=60)
    for user in ("ann", "bob", "away"):
        Browser(old, user).close()
    new = relay(broker_publish_timeout=60, **changed)
    with Traffic([new], {"ann": ["bob", "cid", "away"], "bob": ["cid"], "cid": []}) as traffic:
        traffic.add("dan", ["cid", "bob"], hosts=[old])
        traffic.add("eve", hosts=[old])
        traffic.flow()
        traffic.add("away", hosts=[old])
        traffic.flow()
    traffic.verdict()
    # RabbitMQ 3.10 does not compare the limit in bytes: there it is kept without a word
    told = new.log.count("was made with other [inbox] settings and is used as it is")
    assert told == 1 or ("inbox_max_bytes" in changed and not told)
    before, after = (broker.queues()[f"inbox.{user}"]["arguments"] for user in ("ann", "cid"))
    assert before != after, "an inbox made from now on has the new settings"


def test_a_user_exchange_of_another_kind_is_used(relay: RelayFactory, broker: VirtualHost) -> None:
    """A user whose exchange somebody made by hand, not auto-delete, gets messages all the same."""
    with amqp(broker.url) as channel:
        channel.exchange_declare("user.bob", "fanout", durable=True)
    host = relay()
    with Browser(host, "ann") as ann:
        ann.say("bob", 1, id=1)
        assert ann.ack()["id"] == 1
        with Browser(host, "bob") as bob:
            assert bob.read()["content"] == 1
