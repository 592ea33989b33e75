"""Sockets that come and go leave nothing behind, on the broker or in the process, but inboxes."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Browser, in_background, wait_until_ready
from tests.support.counted import CountedRelay
from tests.support.harness import VirtualHost, eventually
from tests.support.websocket_peer import Peer, handshake

ROUNDS = 125
#: Channels of a relay without sockets: two of the publisher (for inboxes and messages), and two to talk to others.
OWN_CHANNELS = 4
USERS = [f"comes and goes {number}" for number in range(4)]


@pytest.fixture
def host(broker_url: str, tmp_path: Path) -> Iterator[CountedRelay]:
    """A relay that can be asked what is alive in it, and has to end well."""
    settings = {"broker-url": broker_url, "server-port": 0, "server-drain-timeout": 5}
    relay = CountedRelay(tmp_path, ["serve", *(f"--{key}={value}" for key, value in settings.items())])
    try:
        relay.wait_until_listening()
        wait_until_ready(relay)
        yield relay
        assert relay.stop(signal.SIGTERM) == 0
        assert "Traceback" not in relay.log, relay.log
    finally:
        relay.kill()


def come_and_go(host: Any, user: str, rounds: int) -> None:
    """Connect twice as one user, talk, and leave: with a close frame, with a reset, before the handshake's end."""
    for number in range(rounds):
        first, second = Browser(host, user), Browser(host, user)
        first.say(user, number, id="c1")
        second.contents_until(number)  # after what a socket before it was sent and had no time to take
        (first.close, first.cut)[number % 2]()
        (second.cut, second.close, second.close)[number % 3]()
        with Peer(host) as hasty:
            hasty.send(handshake("/" + user.replace(" ", "%20"))[: 60 if number % 2 else None])


def test_1000_sockets_leave_nothing_behind(host: CountedRelay, broker: VirtualHost) -> None:
    """After 1,000 connects of the same ids all is as before: on the broker, greenlets, objects, descriptors."""
    for user in USERS:
        come_and_go(host, user, 1)
    eventually(lambda: len(broker.channels()) == OWN_CHANNELS and len(broker.user_queues()) == len(USERS))
    on_broker, inside = broker.census(), host.census()
    workers = [in_background(come_and_go, host, user, ROUNDS) for user in USERS]
    for worker in workers:
        worker.result(120)

    def is_as_before() -> bool:
        assert broker.census() == on_broker
        now = host.census()
        for kind in ("greenlets", "descriptors"):
            more = {name: count for name, count in now[kind].items() if count > inside[kind].get(name, 0)}
            assert not more, f"{kind} were {inside[kind]}"
        # the variable of a loop that waits for its next turn may still name the last one
        assert now["objects"].get("Session", 0) <= 4
        return True

    eventually(is_as_before, 30)
    assert not re.findall(".* (?:WARNING|ERROR) .*", host.log)
    assert sorted(broker.user_queues()) == sorted(f"inbox.{user}" for user in USERS)
    exchanges = ["direct_message", "imrelay.relays", *sorted(f"user.{user}" for user in USERS)]
    assert sorted(broker.exchanges()) == exchanges
    assert len(broker.bindings()) == 2 * len(USERS) + 1
    # the relay queue's, the one on which inboxes are made sure of, and two that publish
    assert sorted(channel["confirm"] for channel in broker.channels()) == [False, False, True, True]


def test_a_socket_costs_one_greenlet_and_a_channel(host: CountedRelay, broker: VirtualHost) -> None:
    """While they are here, sockets cost what they should: the measure of the other test sees each of them."""
    with Browser(host, "measured"):
        eventually(lambda: broker.queues()["inbox.measured"]["consumers"] == 1)
        before, channels = host.census(), len(broker.channels())
        sockets = [Browser(host, f"measured {number}") for number in range(10)]

        def costs() -> bool:
            after = host.census()
            assert sum(after["greenlets"].values()) == sum(before["greenlets"].values()) + 10
            assert after["descriptors"]["socket"] == before["descriptors"]["socket"] + 10
            assert 11 <= after["objects"]["Session"] <= 15
            assert len(broker.channels()) == channels + 10
            return True

        eventually(costs)
        for socket in sockets:
            socket.close()
