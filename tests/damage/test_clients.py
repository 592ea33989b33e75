"""Browsers that vanish, stall, never read, never acknowledge or come all at once: nothing lost, nothing left."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import RelayFactory
from tests.support.browser import Browser, in_background
from tests.support.harness import RelayProcess, VirtualHost, eventually
from tests.support.proxy import Proxy
from tests.support.traffic import Traffic
from tests.support.websocket_peer import TEXT, Peer, frame, handshake

V1 = ["imrelay.v1"]
PROTOCOLS = pytest.mark.parametrize("v1", [False, True], ids=["plain", "v1"])
#: Longer than any test lasts: what waits for it would never end.
FOR_EVER = 600
#: Messages of 60,000 bytes to a browser that does not read: far more than the kernel takes for it.
MANY = 150

_CLIENT = """\
import sys
from tests.support.browser import Browser
class Host:
    def socket_url(self, user):
        return sys.argv[1]
browser = Browser(Host(), "", subprotocols=["imrelay.v1"])
browser.read()
print("here", flush=True)
while True:
    print(browser.read()["message"]["content"], flush=True)
"""


class Through:
    """A relay as browsers reach it behind a proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._port = urlsplit(proxy.url).port

    def socket_url(self, user: str) -> str:
        return f"ws://127.0.0.1:{self._port}/{user}"


def raw(relay: RelayProcess, *, receive_buffer: int | None = None) -> Peer:
    """Open a TCP connection to a relay."""
    return Peer(SimpleNamespace(port=relay.port, certificate=""), receive_buffer=receive_buffer)


@contextmanager
def slow(relay: RelayProcess, user: str, *, v1: bool, trickle: bool = False) -> Iterator[Peer]:
    """A socket that reads nothing, or one byte a second, in a small window."""
    over = threading.Event()
    with raw(relay, receive_buffer=4096) as peer:
        peer.open(f"/{user}", Sec_WebSocket_Protocol=V1[0] if v1 else None)

        def read() -> None:
            with suppress(OSError):
                while not over.wait(1.0):
                    peer.sock.recv(1)

        thread = threading.Thread(target=read, daemon=True)
        if trickle:
            thread.start()
        try:
            yield peer
        finally:
            over.set()
            if trickle:
                thread.join()


def fill(relay: RelayProcess, user: str) -> None:
    """Send `MANY` large messages to a user; they are in the inbox then."""
    with Browser(relay, f"writer to {user}") as writer:
        for number in range(MANY):
            writer.say(user, number, id=number, filling="x" * 60_000)
            assert writer.ack()["id"] == number


def take(browser: Browser, count: int) -> list[Any]:
    """Return the contents of the next messages of a v1 session, and acknowledge them one by one."""
    contents = []
    while len(contents) < count:
        message = browser.read()
        if "seq" in message:
            contents.append(message["message"]["content"])
            browser.send(json.dumps({"ack": message["seq"]}))
    return contents


def waiting_for(relay: RelayProcess, user: str) -> list[Any]:
    """Return the contents of all that waits for a user, and take it."""
    with Browser(relay, user) as browser:
        return [json.loads(text)["content"] for text in browser.rest()]


def is_empty(broker: VirtualHost, user: str) -> bool:
    """Tell whether nothing is in a user's inbox, neither waiting nor under way."""
    return bool(broker.queues()[f"inbox.{user}"]["messages"] == 0)


def test_a_browser_that_is_killed_loses_nothing(relay: RelayFactory) -> None:
    """A browser process that dies by kill -9: what it had not acknowledged goes to the user's next session."""
    process = relay()
    root = Path(__file__).parents[2]
    client = subprocess.Popen(
        [sys.executable, "-c", _CLIENT, process.socket_url("killed")], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "here\n"
        with Browser(process, "writer") as writer:
            for content in "abc":
                writer.say("killed", content)
            assert [client.stdout.readline() for _ in "abc"] == ["a\n", "b\n", "c\n"]
            client.kill()
            client.wait()
            writer.say("killed", "d", id="d")
            writer.ack()
        with Browser(process, "killed", subprotocols=V1) as browser:
            assert take(browser, 4) == ["a", "b", "c", "d"]
    finally:
        client.kill()
        client.wait()
        client.stdout.close()


@pytest.mark.slow
def test_browsers_that_lose_their_network_again_and_again(relay: RelayFactory) -> None:
    """v1 browsers whose network swallows what is under way and then drops them, time after time, miss nothing."""
    process = relay()
    users = [f"u{number}" for number in range(5)]
    talk = {"ann": [*users, "bob"], "bob": ["ann", *users]}
    with (
        Proxy(f"http://127.0.0.1:{process.port}") as proxy,
        Traffic([process], talk, every=0.005, reconnect=True, v1=True) as traffic,
    ):
        cut = [traffic.add(user, hosts=[Through(proxy)]) for user in users]
        for generation in range(2, 12):
            proxy.cut()
            before = traffic.summary().acked
            traffic.wait(lambda before=before: traffic.summary().acked > before + 30, "messages into the void")
            proxy.reset()
            proxy.heal()
            traffic.wait(
                lambda generation=generation: all(client.generation >= generation for client in cut),
                "browsers that come back",
            )
        traffic.flow()
    assert traffic.verdict(repeats=True).reconnects >= 50


def test_a_half_open_browser_is_left_and_its_messages_come_again(relay: RelayFactory, broker: VirtualHost) -> None:
    """A peer behind a network that swallows everything is gone after ping_interval and ping_timeout.

    What it did not acknowledge goes to the next session. Another socket of its user does not wait for that, and
    sees nothing twice; a socket that answers its pings stays.
    """
    watchful, other = relay(websocket_ping_interval=1, websocket_ping_timeout=1), relay()
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(f"http://127.0.0.1:{watchful.port}"))
        healthy = stack.enter_context(Browser(watchful, "healthy"))
        kept = in_background(healthy.read)
        writer = stack.enter_context(Browser(other, "writer"))
        lone, half = (
            stack.enter_context(Browser(Through(proxy), user, subprotocols=V1)) for user in ("lone", "pair")
        )
        beside = stack.enter_context(Browser(other, "pair", subprotocols=V1))
        stack.callback(proxy.reset)  # before they are closed, which would wait for an answer
        for user, browsers in (("lone", [lone]), ("pair", [half, beside])):
            writer.say(user, "first", id=1)
            writer.ack()
            for browser in browsers:
                assert take(browser, 1) == ["first"]
        eventually(lambda: is_empty(broker, "lone") and is_empty(broker, "pair"))
        proxy.cut()
        for content in "abc":
            for user in ("lone", "pair"):
                writer.say(user, content, id=content)
                writer.ack()
        assert take(beside, 3) == ["a", "b", "c"]
        for user in ("lone", "pair"):
            watchful.wait_for_log(f"session of '{user}': closed with 1006 'no pong within 1 s'")
        again = stack.enter_context(Browser(other, "lone", subprotocols=V1))
        assert take(again, 3) == ["a", "b", "c"]
        eventually(lambda: is_empty(broker, "lone") and is_empty(broker, "pair"))
        writer.say("pair", "d")
        assert take(beside, 1) == ["d"]
        writer.say("healthy", "still there")
        assert kept.result(60)["content"] == "still there"


@pytest.mark.slow
@PROTOCOLS
@pytest.mark.parametrize("trickle", [False, True], ids=["never", "one-byte-a-second"])
def test_a_slow_reader_is_ended_and_the_next_socket_has_the_rest(
    relay: RelayFactory, v1: bool, trickle: bool
) -> None:
    """A browser that does not take its bytes within `send_timeout` is ended with 4408; its messages wait for it.

    A v1 session acknowledged nothing and loses nothing; a plain one had taken what was written to its connection.
    """
    process = relay(websocket_send_timeout=1)
    user = f"slow-{v1}-{trickle}"
    with slow(process, user, v1=v1, trickle=trickle):
        fill(process, user)
        process.wait_for_log(f"session of '{user}': closed with 4408 'too slow")
        # from a relay with the usual patience: on a busy machine this test itself may not read for a second
        rest = waiting_for(relay(), user)
    assert rest == list(range(0 if v1 else rest[0], MANY))


@PROTOCOLS
def test_another_socket_of_the_user_does_not_wait_for_a_slow_one(
    relay: RelayFactory, broker: VirtualHost, v1: bool
) -> None:
    """Beside a socket that never reads, and is never ended, another one of the same user gets everything at once.

    When the slow one goes in the end, nothing of that comes again.
    """
    process = relay(websocket_send_timeout=FOR_EVER)
    user = f"beside-{v1}"
    with slow(process, user, v1=v1) as peer, Browser(process, user, subprotocols=V1) as other:
        taking = in_background(take, other, MANY)
        fill(process, user)
        assert taking.result(60) == list(range(MANY))
        assert not is_empty(broker, user)
        peer.sock.close()
        eventually(lambda: is_empty(broker, user))
        other.say(user, "last")
        assert take(other, 1) == ["last"]


def test_who_never_acknowledges_hinders_nobody(relay: RelayFactory, broker: VirtualHost) -> None:
    """v1 browsers that never acknowledge hold `prefetch` messages each, are ended with 4408, and lose nothing.

    The traffic of the others goes on all the while.
    """
    process = relay(websocket_ack_timeout=1, broker_prefetch=5)
    users = [f"silent{number}" for number in range(10)]
    with (
        Traffic([process], {"ann": ["bob"], "bob": ["ann"]}, every=0.01) as traffic,
        ExitStack() as stack,
        Browser(process, "writer") as writer,
    ):
        silent = [stack.enter_context(Browser(process, user, subprotocols=V1)) for user in users]
        for user, content in itertools.product(users, range(8)):
            writer.say(user, content, id=content)
            writer.ack()
        for browser in silent:
            browser.read()
            assert [browser.read()["seq"] for _ in range(5)] == [1, 2, 3, 4, 5]
            assert browser.close_code() == 4408
        for user in users:
            again = stack.enter_context(Browser(process, user, subprotocols=V1))
            assert take(again, 8) == list(range(8))
        traffic.flow()
        eventually(lambda: all(is_empty(broker, user) for user in users))
    traffic.verdict()


def test_who_never_reads_its_acks_is_ended(relay: RelayFactory, broker: VirtualHost) -> None:
    """A browser that sends and sends and never reads an answer is ended with 4408; what it sent has arrived."""
    process = relay(websocket_send_timeout=1)
    body = {"to": {"id": "sink"}, "content": "hello"}
    with raw(process, receive_buffer=4096) as peer:
        peer.open("/deaf")
        # an id that is much longer in its ack: the kernel has enough of them soon
        peer.send_until_refused(frame(TEXT, json.dumps(body | {"id": "\x01" * 64}).encode()) * 50)
    found = process.wait_for_log(r"session of 'deaf': closed with 4408 'too slow.* (\d+) received, (\d+) sent")
    accepted = len(waiting_for(process, "sink"))
    assert 0 < int(found[2]) <= accepted <= int(found[1])


def test_who_never_reads_is_not_read_any_more(relay: RelayFactory) -> None:
    """The answers that wait for a browser are few: then the relay reads nothing more of it, and grows no further.

    Others are served as before.
    """
    process = relay(websocket_send_timeout=FOR_EVER)
    with Browser(process, "ann") as ann, raw(process, receive_buffer=4096) as peer:
        ann.say("ann", "hello")
        ann.read()
        before = resident(process)
        peer.open("/deaf")
        sending = in_background(peer.send_until_refused, frame(TEXT, b"no JSON") * 5000)
        mine = peer.sock.getsockname()[1]
        looks: list[int] = []

        def has_stopped() -> bool:
            looks.append(unread(process, mine))
            return len(looks) > 50 and looks[-1] > 0 and len(set(looks[-50:])) == 1

        eventually(has_stopped, 60)
        assert resident(process) - before < 16_000_000
        text = ann.say("ann", "still here")
        assert ann.receive() == text
        peer.sock.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            sending.result(60)


def resident(process: RelayProcess) -> int:
    """Return the resident memory of a process, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def unread(process: RelayProcess, peer_port: int) -> int:
    """Return the bytes that the kernel holds for a process which has not read them, of one TCP connection."""
    for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ports = [int(address.partition(":")[2], 16) for address in fields[1:3]]
        if ports == [process.port, peer_port]:
            return int(fields[4].partition(":")[2], 16)
    raise AssertionError("there is no such connection")


class ManySockets:
    """Many v1 sockets, opened and ended all at once, read one after the other."""

    def __init__(self, relay: RelayProcess, users: list[str]) -> None:
        self._peers = [(user, raw(relay)) for user in users]
        for user, peer in self._peers:
            peer.send(handshake(f"/{user}", Sec_WebSocket_Protocol=V1[0]))
        for _, peer in self._peers:
            assert peer.read_answer().status == 101
        for user, peer in self._peers:
            assert json.loads(peer.read_message())["welcome"]["id"] == user

    def read(self, content: str) -> None:
        """Expect one message at each socket: its user's own, and acknowledge it."""
        for user, peer in self._peers:
            message = json.loads(peer.read_message())
            assert (message["seq"], message["message"]["content"]) == (1, f"{content} for {user}")
            peer.send(frame(TEXT, b'{"ack":1}'))

    def leave(self) -> None:
        """End all, every second one with a reset, none with a close frame."""
        for index, (_, peer) in enumerate(self._peers):
            if index % 2:
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.sock.close()
        self._peers = []


@pytest.mark.slow
def test_a_thousand_that_leave_and_return_at_once(relay: RelayFactory, broker: VirtualHost) -> None:
    """1,000 sockets, some users with two, end together and are back at once: nothing is lost, nothing left over.

    When they have gone, the broker has their inboxes and bindings, but no channel, consumer or live queue of
    theirs, and the relay has no descriptor more than before.
    """
    process = relay(broker_channels_per_connection=2040)  # those that leave and those that come fit on one
    users = [f"u{number}" for number in range(900)]
    with Browser(process, "writer") as writer:

        def write(content: str) -> None:
            for user in users:
                writer.say(user, f"{content} for {user}", id=user)
            assert {writer.ack()["id"] for _ in users} == set(users)

        write("before")
        census = broker.census()
        descriptors = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        crowd = ManySockets(process, users)
        crowd.read("before")
        crowd.leave()
        for content in ("first", "second"):
            crowd = ManySockets(process, users + users[:100])
            write(content)
            crowd.read(content)
            crowd.leave()

        def is_as_before() -> bool:
            assert broker.census() == census
            queues = broker.user_queues()
            assert all(name.startswith("inbox.") for name in queues)
            assert [name for name, queue in queues.items() if queue["consumers"]] == ["inbox.writer"]
            assert not [user for user in users if queues[f"inbox.{user}"]["messages"]]
            assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) == descriptors
            return True

        eventually(is_as_before, 60)
