"""Every socket of a user gets every message, whichever came first, also if the broker does not tell which."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import gevent
import pytest

from imrelay.broker.codec import Delivery
from imrelay.broker.connection import Connection
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.topology import Topology
from imrelay.settings.values import InboxConfig
from tests.conftest import RelayFactory
from tests.support.brokers import amqp, publish_first
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import VirtualHost, eventually

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0
#: How often two sockets come at the same moment.
ROUNDS = 12
_numbers = itertools.count(1)


@pytest.fixture
def user() -> str:
    """An id that no other test has used."""
    return f"tabs {next(_numbers)}"


def pools(url: str, config: InboxConfig) -> Iterator[list[ConsumerPool]]:
    """Two pools with connections of their own, as two relays have."""
    made = [
        ConsumerPool(
            lambda name, on_state: Connection(lambda: [url], name=name, heartbeat=60, on_state=on_state),
            Topology("direct_message", config),
            prefetch=10,
            channels_per_connection=100,
        )
        for _ in range(2)
    ]
    for pool in made:
        pool.start()
    with gevent.Timeout(PATIENCE * 6):
        eventually(lambda: all(pool.is_open for pool in made), PATIENCE, sleep=gevent.sleep)
        yield made
    for pool in made:
        pool.stop()


@pytest.fixture
def relays(broker: VirtualHost, request: pytest.FixtureRequest) -> Iterator[list[ConsumerPool]]:
    """Two pools; the parameter is the type of inbox that they are set to make."""
    yield from pools(broker.url, InboxConfig(queue_type=request.param))


class AckingMailbox:
    """A mailbox whose deliveries are acknowledged as they come, and their bodies noted."""

    def __init__(self, pool: ConsumerPool, user: str) -> None:
        self.mailbox = Mailbox()
        self.consumer = pool.consume(user, self.mailbox)
        self.bodies: list[bytes] = []
        self._reader = gevent.spawn(self._run)

    def _run(self) -> None:
        while items := self.mailbox.take():
            taken = [item for item in items if isinstance(item, Delivery)]
            # a message of another program may come from the live queue and from the inbox
            self.bodies = list(dict.fromkeys([*self.bodies, *(item.body for item in taken)]))
            self.consumer.ack(taken)

    def close(self) -> None:
        """End it."""
        self.consumer.close()
        self.mailbox.close()
        self._reader.join()


@pytest.mark.parametrize(
    ("relays", "made_as"),
    [("classic", None), ("quorum", None), ("classic", "quorum"), ("quorum", "classic")],
    indirect=["relays"],
)
def test_two_tabs_that_come_at_the_same_moment_both_hear(
    relays: list[ConsumerPool], broker: VirtualHost, made_as: str | None
) -> None:
    """On two relays, again and again, also at inboxes of another type than the settings say."""
    with amqp(broker.url) as channel:
        for number in range(ROUNDS):
            user = f"{made_as} {number} {next(_numbers)}"
            if made_as:
                arguments = {"x-queue-type": made_as, "x-single-active-consumer": True}
                channel.queue_declare(f"inbox.{user}", durable=True, arguments=arguments)
            tabs = [AckingMailbox(pool, user) for pool in relays]
            for tab in tabs:
                assert tab.consumer.wait_attached(PATIENCE)
            for body in (b"one", b"two"):
                if body == b"one":
                    publish_first(broker.url, user, body, sleep=gevent.sleep)
                else:
                    channel.basic_publish("direct_message", user, body, mandatory=True)
                eventually(lambda: all(body in tab.bodies for tab in tabs), PATIENCE, sleep=gevent.sleep)  # noqa: B023
            assert [tab.bodies for tab in tabs] == [[b"one", b"two"]] * 2
            # the one that became active goes; the other one is promoted, and hears what comes then
            tabs[number % 2].close()
            channel.basic_publish("direct_message", user, b"three", mandatory=True)
            left = tabs[1 - number % 2]
            eventually(lambda: b"three" in left.bodies, PATIENCE, sleep=gevent.sleep)  # noqa: B023
            assert left.bodies == [b"one", b"two", b"three"]
            left.close()


@pytest.mark.parametrize("relays", ["classic", "quorum"], indirect=True)
def test_a_tab_that_closes_during_its_promotion_takes_nothing_along(
    relays: list[ConsumerPool], broker: VirtualHost, user: str
) -> None:
    """The active one goes, the next one is promoted and goes at once: the third gets what they had not taken."""
    with amqp(broker.url) as channel:
        tabs = []
        for pool in (relays[0], relays[1], relays[0]):
            tabs.append(AckingMailbox(pool, user))
            assert tabs[-1].consumer.wait_attached(PATIENCE)
        channel.basic_publish("direct_message", user, b"one", mandatory=True)
        eventually(lambda: all(tab.bodies == [b"one"] for tab in tabs), PATIENCE, sleep=gevent.sleep)
        tabs[0].consumer.close()
        channel.basic_publish("direct_message", user, b"two", mandatory=True)
        tabs[1].consumer.close()
        channel.basic_publish("direct_message", user, b"three", mandatory=True)
        expected = [b"one", b"two", b"three"]
        eventually(lambda: tabs[2].bodies == expected, PATIENCE, sleep=gevent.sleep)
        eventually(lambda: broker.queues()[f"inbox.{user}"]["messages"] == 0, PATIENCE, sleep=gevent.sleep)
        assert tabs[2].bodies == expected
        for tab in tabs:
            tab.close()


@pytest.mark.parametrize("relays", ["classic", "quorum"], indirect=True)
def test_who_comes_back_gets_what_waits_before_what_is_new(
    relays: list[ConsumerPool], broker: VirtualHost, user: str
) -> None:
    """A user who comes while messages are sent gets them all, in order and once, the waiting ones first."""
    tab = AckingMailbox(relays[0], user)
    assert tab.consumer.wait_attached(PATIENCE)
    tab.close()
    publish_first(broker.url, user, b"0", sleep=gevent.sleep)
    with amqp(broker.url) as channel:
        for number in range(1, 30):
            channel.basic_publish("direct_message", user, b"%d" % number, mandatory=True)
        tab = AckingMailbox(relays[1], user)
        for number in range(30, 60):
            channel.basic_publish("direct_message", user, b"%d" % number, mandatory=True)
            gevent.sleep(0)
        eventually(lambda: b"59" in tab.bodies, PATIENCE, sleep=gevent.sleep)
        assert tab.bodies == [b"%d" % number for number in range(60)]
        assert not [name for name in broker.queues() if name.startswith("amq.")], "it knew that it was alone"
        tab.close()


def test_the_first_messages_of_other_programs_are_all_shown(
    relay: RelayFactory, broker: VirtualHost, user: str
) -> None:
    """A lone quorum socket changes over from its live queue with the first messages: none is lost or swapped.

    Where the two queues are much out of step, one may be shown twice: there is no telling repeats by ids.
    """
    host = relay(inbox_queue_type="quorum")
    wait_until_ready(host)
    bodies = [f"body {number}" for number in range(20)]
    with Browser(host, user) as browser, amqp(broker.url) as channel:
        for body in bodies:
            channel.basic_publish("direct_message", user, body.encode(), mandatory=True)
        shown = [browser.receive()]
        while bodies[-1] not in shown:
            shown.append(browser.receive())
        assert list(dict.fromkeys(shown)) == bodies
        eventually(lambda: not [name for name in broker.queues() if name.startswith("amq.")])
        assert set(browser.rest()) <= set(bodies)


def test_equal_messages_of_other_programs_are_all_shown(
    relay: RelayFactory, broker: VirtualHost, user: str
) -> None:
    """A repeat that cannot be told from another message with the same content is shown too: none is left out."""
    host = relay(inbox_queue_type="quorum")
    wait_until_ready(host)
    with Browser(host, user) as browser, amqp(broker.url) as channel:
        for _ in range(5):
            channel.basic_publish("direct_message", user, b"refresh", mandatory=True)
        assert [browser.receive() for _ in range(5)] == ["refresh"] * 5
        assert set(browser.rest()) <= {"refresh"}


def test_what_a_browser_was_shown_from_its_live_queue_is_not_taken_by_that(
    relay: RelayFactory, broker: VirtualHost, user: str
) -> None:
    """Another program's message that no tab has acknowledged comes to the next one, after a promotion too."""
    host = relay()
    wait_until_ready(host)
    with Browser(host, user, subprotocols=["imrelay.v1"]) as first, amqp(broker.url) as channel:
        assert "welcome" in first.read()
        with Browser(host, user, subprotocols=["imrelay.v1"]) as second:
            assert "welcome" in second.read()
            channel.basic_publish("direct_message", user, b'"foreign"', mandatory=True)
            assert first.read()["message"] == second.read()["message"] == "foreign"
            first.close()
            eventually(lambda: not [name for name in broker.queues() if name.startswith("amq.")])  # the live queue
            second.send('{"ack":1}')  # what it got from the live queue; from the inbox it got it once more
            second.send('{"ping":2}')
            answers = [second.read(), second.read()]
            assert {"pong": 2} in answers
            assert any(answer.get("message") == "foreign" for answer in answers)
        with Browser(host, user, subprotocols=["imrelay.v1"]) as third:
            assert "welcome" in third.read()
            assert third.read()["message"] == "foreign"
