"""The inboxes of many unknown ids are opened a few at a time, and each gets its message."""

from __future__ import annotations

from tests.conftest import RelayFactory
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import VirtualHost
from tests.support.proxy import Proxy
from tests.support.tap import Method, MethodTap

#: Inboxes that a relay opens at the same time.
BOUND = 16
#: Fewer than one browser may have unanswered.
STRANGERS = 200


class _Channels(MethodTap):
    """Counts the messages that were published, and the channels that are open at the same time."""

    OPEN, CLOSE, PUBLISH = (20, 10), (20, 40), (60, 40)

    def __init__(self) -> None:
        super().__init__()
        self.published = 0
        self.open: set[tuple[int, int]] = set()
        self.most = 0

    def on_method(self, connection: int, channel: int, method: Method, to_broker: bool) -> None:
        """Count what the relay asks for."""
        if not to_broker:
            return
        if method == self.OPEN:
            self.open.add((connection, channel))
            self.most = max(self.most, len(self.open))
        elif method == self.CLOSE:
            self.open.remove((connection, channel))
        elif method == self.PUBLISH:
            self.published += 1


def test_first_messages_to_many_unknown_ids_open_few_channels(relay: RelayFactory, broker: VirtualHost) -> None:
    """First messages to 200 unknown ids at once: each is acknowledged, over at most 16 channels at a time."""
    seen = _Channels()
    with Proxy(broker.url, tap=seen) as proxy:
        host = relay(broker_url=proxy.url, broker_publish_timeout=60)
        wait_until_ready(host)
        with Browser(host, "ann") as ann:
            assert ann.rest() == []
            before = set(seen.open)
            for number in range(STRANGERS):
                ann.say(f"stranger {number}", number, id=number)
            assert {ann.ack()["id"] for _ in range(STRANGERS)} == set(range(STRANGERS))
            assert seen.published == 1 + STRANGERS, "nobody's message came back"
            assert seen.most - len(before) <= BOUND
            assert seen.open == before
        queues = broker.queues()
    assert [queues[f"inbox.stranger {number}"]["messages"] for number in range(STRANGERS)] == [1] * STRANGERS
