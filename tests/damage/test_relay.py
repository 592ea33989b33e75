"""Relays that are killed, stopped, paused and restarted under traffic: what was acknowledged arrives."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

from tests.conftest import RelayFactory
from tests.support.browser import Browser
from tests.support.harness import RelayProcess, VirtualHost, eventually
from tests.support.traffic import Client, Traffic
from tests.support.websocket_peer import TEXT, Peer, frame

pytestmark = pytest.mark.slow

PROTOCOLS = pytest.mark.parametrize("v1", [False, True], ids=["plain", "v1"])


@contextmanager
def paused(relay: RelayProcess) -> Iterator[None]:
    """Stop a relay's process without its knowing, and let it go on."""
    relay.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        relay.process.send_signal(signal.SIGCONT)


class FastSender:
    """A browser that sends as fast as it can, and throws away what it gets."""

    def __init__(self, relay: RelayProcess, user: str, to: str) -> None:
        self._peer = Peer(SimpleNamespace(port=relay.port, certificate="")).open(f"/{user}")
        text = json.dumps({"to": {"id": to}, "content": "x" * 500})
        self._data = frame(TEXT, text.encode()) * 20
        #: Messages that the kernel has taken.
        self.sent = 0
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._run_sender, self._run_reader)]

    def __enter__(self) -> FastSender:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._peer.sock.close()

    def _run_sender(self) -> None:
        with suppress(OSError):
            while True:
                self._peer.sock.sendall(self._data)
                self.sent += 20

    def _run_reader(self) -> None:
        with suppress(OSError):
            while self._peer.sock.recv(65_536):
                pass


def assert_no_repeats(client: Client) -> None:
    """No message came to this socket twice."""
    assert len(client.arrivals) == len(client.arrived), f"{client.user} got messages twice"


def acked(traffic: Traffic, sender: str) -> int:
    """Return how many messages of this sender have been acknowledged to it."""
    return sum(sent.acked is not None for sent in traffic.sent.values() if sent.sender == sender)


def came_back(traffic: Traffic) -> int:
    """Count the connections that browsers have opened anew."""
    return sum(max(0, client.generation - 1) for client in traffic.clients.values())


@PROTOCOLS
def test_a_relay_that_is_killed_loses_nothing(relay: RelayFactory, v1: bool) -> None:
    """kill -9 of one of two relays: every acknowledged message arrives, in order, for browsers that come back.

    A user with sockets on both gets at the other one, at once and only once, what the killed one still had.
    """
    killed, other = relay(clean=False), relay()
    there = [killed]  # where those go whose relay is killed; they come back to the other one
    traffic = Traffic([other], {"bob": ["ann", "dora"], "eve": ["bob"]}, every=0.005, reconnect=True, v1=v1)
    with traffic:
        for user, to in (("ann", ("bob", "dora")), ("finn", ("finn", "eve"))):
            traffic.add(user, to, hosts=there)
        traffic.add("dora", hosts=there)
        beside = traffic.add("dora", name="dora's other socket", hosts=[other])
        traffic.flow()
        there.append(other)
        killed.kill()
        traffic.wait(lambda: came_back(traffic) == 3, "all three to come back")
        traffic.flow()
    summary = traffic.verdict(repeats=True)
    assert summary.reconnects == 3
    assert_no_repeats(beside)
    # from when it came, it has missed nothing: the live queue first, the inbox when the other socket went
    for sender in ("ann", "bob"):
        numbers = [
            sent.number
            for sent in traffic.sent.values()
            if sent.to == "dora" and sent.sender == sender and sent.acked and sent.id not in beside.arrived
        ]
        first = min(arrival.number for arrival in beside.arrivals if arrival.sender == sender)
        assert all(number < first for number in numbers), f"missed by the other socket: {numbers}"


def test_what_a_killed_relay_had_not_got_rid_of_goes_to_the_next_socket(
    relay: RelayFactory, broker: VirtualHost
) -> None:
    """What v1 browsers of a killed relay had not acknowledged comes again: at once where a socket stands by.

    Else to the next socket; in order, flagged, and nothing that had been acknowledged.
    """
    killed, other = relay(clean=False), relay()
    v1 = {"subprotocols": ["imrelay.v1"]}
    with (
        Browser(other, "writer") as writer,
        Browser(killed, "two", **v1) as first,
        Browser(killed, "one", **v1) as alone,
    ):
        for browser in (first, alone):
            browser.read()
            for content in "abcd":
                writer.say(browser.user, content, id=content)
                writer.ack()
            for _ in "abcd":
                last = browser.read()
            assert last["message"]["content"] == "d"
            browser.send('{"ack":1}')
            inbox = f"inbox.{browser.user}"
            eventually(lambda: broker.queues()[inbox]["messages_unacknowledged"] == 3)  # noqa: B023 (called at once)
        with Browser(other, "two", **v1) as second:
            second.read()
            killed.kill()
            contents = [
                (f["seq"], f["message"]["content"], f["redelivered"]) for f in (second.read() for _ in "bcd")
            ]
            assert contents == [(1, "b", True), (2, "c", True), (3, "d", True)]
            second.send('{"ping":1}')
            assert second.read() == {"pong": 1}
        with Browser(other, "one", **v1) as again:
            again.read()
            contents = [
                (f["seq"], f["message"]["content"], f["redelivered"]) for f in (again.read() for _ in "bcd")
            ]
            assert contents == [(1, "b", True), (2, "c", True), (3, "d", True)]


@PROTOCOLS
def test_a_relay_that_is_paused_beyond_the_heartbeat_loses_nothing(
    relay: RelayFactory, broker: VirtualHost, v1: bool
) -> None:
    """SIGSTOP for longer than the broker waits: browsers keep their sockets, and everything acknowledged arrives.

    What the relay publishes or gets a second time, it knows by the `mid`: nobody sees a repeat.
    """
    slow, other = relay(broker_heartbeat=1, broker_publish_timeout=60), relay()
    traffic = Traffic([other], {"bob": ["ann", "dora"], "eve": ["bob"]}, v1=v1)
    with traffic:
        traffic.add("ann", ("bob", "dora"), hosts=[slow])
        traffic.add("dora", hosts=[slow])
        traffic.add("dora", name="dora's other socket", hosts=[other])
        traffic.flow()
        connections = len(broker.connections())
        with paused(slow):
            eventually(lambda: len(broker.connections()) == connections // 2, 30)
            before = acked(traffic, "bob")
            traffic.wait(lambda: acked(traffic, "bob") > before + 10, "acks of the relay that is not paused")
        traffic.flow()
    traffic.verdict()
    assert "waiting" in slow.log  # its connections were lost indeed


@PROTOCOLS
def test_a_relay_that_stops_under_load_loses_nothing(relay: RelayFactory, v1: bool) -> None:
    """SIGTERM in the middle of it: everything acknowledged arrives, and every browser gets 1012; exit status 0.

    Plain browsers see no repeat: what was written to them is acknowledged before the relay goes.
    """
    stopped, other = relay(), relay()
    there = [stopped]
    traffic = Traffic([other], {"bob": ["ann"], "eve": ["bob"]}, every=0.002, reconnect=True, v1=v1)
    with traffic:
        moving = [
            traffic.add("ann", ("bob", "carl"), hosts=there),
            traffic.add("carl", ("eve", "ann"), hosts=there),
            traffic.add("dora", ("carl",), hosts=there),
        ]
        traffic.flow(50)
        there.append(other)
        assert stopped.stop(signal.SIGTERM) == 0
        traffic.wait(lambda: came_back(traffic) == 3, "all three to come back")
        traffic.flow(50)
    summary = traffic.verdict(errors=["broker_unavailable"], repeats=v1)
    assert [client.ends for client in moving] == [[1012]] * 3
    assert summary.reconnects == 3


@PROTOCOLS
def test_a_rolling_restart_loses_nothing(relay: RelayFactory, v1: bool) -> None:
    """Both relays are restarted one after the other while 200 browsers talk: nothing acknowledged is lost.

    Each browser is told 1012 by the relay that stops, and finds the other one.
    """
    hosts = [relay(), relay()]
    users = [f"{number}" for number in range(200)]
    talk = {user: (users[index - 1], users[index - 7]) for index, user in enumerate(users)}
    with Traffic(hosts, talk, every=1.0, reconnect=True, v1=v1) as traffic:
        traffic.flow(1)
        for index in range(len(hosts)):
            before = len(traffic.sent)
            successor = relay()
            leaving, hosts[index] = hosts[index], successor
            assert leaving.stop(signal.SIGTERM) == 0
            traffic.wait(
                lambda before=before: len(traffic.sent) > before + len(users), "traffic during the restart"
            )
        ended = sum(len(client.ends) for client in traffic.clients.values())
        traffic.wait(lambda: came_back(traffic) == ended, "all to come back")
        traffic.flow(1)
    summary = traffic.verdict(errors=["broker_unavailable"], repeats=v1)
    ends = [code for client in traffic.clients.values() for code in client.ends]
    assert set(ends) == {1012}
    assert summary.reconnects == len(ends) >= len(users)


def test_the_flood_of_one_relay_is_not_the_others_trouble(relay: RelayFactory) -> None:
    """Browsers of one relay send as fast as they can; those of another get all of theirs, without an error."""
    flooded, other = relay(broker_publish_queue=100, inbox_max_length=1000), relay()
    with FastSender(flooded, "loud", "hole"), FastSender(flooded, "louder", "hole") as flood:
        with Traffic([other], {"ann": ["bob"], "bob": ["ann"]}) as traffic:
            traffic.flow(50)
            begun = flood.sent
            traffic.flow(50)
            assert flood.sent > begun  # it was going on all the while
        traffic.verdict()
