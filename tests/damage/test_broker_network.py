"""Nothing is lost when the network between relay and broker hangs, breaks, or leads to another node."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.conftest import RelayFactory
from tests.support.brokers import amqp, wait_not_ready, wait_ready
from tests.support.browser import Browser
from tests.support.harness import VirtualHost, eventually
from tests.support.proxy import Proxy
from tests.support.tap import Method, MethodTap
from tests.support.traffic import Traffic


@pytest.fixture(autouse=True)
def clean(broker: VirtualHost) -> None:
    """Each test begins with an empty virtual host."""
    broker.delete()
    broker.create()


TALK = {"ann": ["bob", "cid"], "bob": ["cid"], "cid": []}


@pytest.mark.slow
def test_a_network_cut_without_a_reset_loses_nothing(relay: RelayFactory, broker_url: str) -> None:
    """A broker out of reach is noticed by its heartbeat; once healed, all that was sent is acked and there."""
    with Proxy(broker_url) as proxy:
        host = relay(broker_url=proxy.url, broker_heartbeat=1, broker_publish_timeout=90)
        with Traffic([host], TALK) as traffic:
            traffic.flow()
            proxy.cut()
            host.wait_for_log(r"broker connection publish: open -> waiting", 60)
            host.wait_for_log(r"broker connection consume-1: open -> waiting", 60)
            wait_not_ready(host)
            proxy.heal()
            traffic.flow()
        traffic.verdict()


def test_a_network_cut_is_told_to_senders_in_time(relay: RelayFactory, broker_url: str) -> None:
    """Senders get broker_unavailable after publish_timeout, long before the heartbeat."""
    with Proxy(broker_url) as proxy:
        host = relay(broker_url=proxy.url, broker_heartbeat=600, broker_publish_timeout=0.5)
        with Traffic([host], TALK) as traffic:
            traffic.flow()
            proxy.cut()
            traffic.wait_for_errors(5)
            proxy.heal()
            traffic.flow()
        traffic.verdict(errors=["broker_unavailable"])
        assert proxy.taken == 2, "it waited the cut out on the connections that it had"


@pytest.mark.parametrize("v1", [False, True], ids=["plain", "v1"])
def test_messages_whose_confirms_were_lost_arrive_once(relay: RelayFactory, broker_url: str, v1: bool) -> None:
    """What the broker took and could not confirm is published again with its mid, and dropped as a repeat."""
    with Proxy(broker_url) as proxy:
        host = relay(broker_url=proxy.url, broker_publish_timeout=60)
        with Traffic([host], TALK, v1=v1) as traffic:
            for _ in range(3):
                traffic.flow()
                proxy.stall()
                sent = len(traffic.sent)
                traffic.wait(lambda sent=sent: len(traffic.sent) > sent + 20, "messages without a confirm")
                proxy.reset()
                proxy.heal()
            traffic.flow()
        traffic.verdict()
        again = [int(count) for count in host_counts(host.log)]
        assert max(again) > 10


def host_counts(log: str) -> list[str]:
    """Return how many messages were published again, each time that it says so."""
    return [line.split("publishing ")[1].split()[0] for line in log.splitlines() if "publishing " in line]


def test_the_next_url_is_tried_when_one_is_down(relay: RelayFactory, broker_url: str) -> None:
    """Of several URLs the first that answers is used, and another one when that goes away."""
    with Proxy(broker_url) as down, Proxy(broker_url) as first, Proxy(broker_url) as second:
        down.close()
        host = relay(broker_url=f"{down.url} {first.url} {second.url}", broker_publish_timeout=60)
        with Traffic([host], TALK) as traffic:
            traffic.flow()
            assert (first.taken, second.taken) == (2, 0)
            first.close()
            traffic.flow()
            assert second.taken == 2
        traffic.verdict()


class _SubscriptionCount(MethodTap):
    """Counts the subscriptions that have been asked for and are not there yet."""

    #: basic.consume; the queue.declare-ok that answers the last question of a subscription.
    CONSUME, DECLARED = (60, 20), (50, 11)

    def __init__(self) -> None:
        super().__init__()
        self.attached = self.most = 0
        #: (connection, channel)
        self._asked: set[tuple[int, int]] = set()

    def on_end(self, connection: int) -> None:
        """Count none of this connection any more."""
        self._asked = {channel for channel in self._asked if channel[0] != connection}

    def on_method(self, connection: int, channel: int, method: Method, to_broker: bool) -> None:
        """Count a question or its answer."""
        if method == self.CONSUME:
            self._asked.add((connection, channel))
            self.most = max(self.most, len(self._asked))
        elif method == self.DECLARED and (connection, channel) in self._asked:
            self._asked.remove((connection, channel))
            self.attached += 1


def test_many_sockets_come_back_a_few_at_a_time(relay: RelayFactory, broker: VirtualHost) -> None:
    """When the broker is back, only so many sockets subscribe at the same time, and all of them in the end."""
    count, bound = 300, 16 + 1  # sockets, and the relay queue
    seen = _SubscriptionCount()
    with Proxy(broker.url, tap=seen) as proxy, ExitStack() as sockets:
        host = relay(broker_url=proxy.url, broker_channels_per_connection=200)
        browsers = [sockets.enter_context(Browser(host, f"u{number}")) for number in range(count)]
        before = seen.attached
        proxy.reset()
        eventually(lambda: seen.attached >= before + count, 60)
        assert 2 <= seen.most <= bound
        wait_ready(host)
        with amqp(broker.url) as channel:
            for browser in browsers:
                channel.basic_publish("direct_message", browser.user, b'{"content":"there"}', mandatory=True)
        assert {browser.read()["content"] for browser in browsers} == {"there"}
