"""A place among `max_connections` is taken by Flask's view, and given back whatever becomes of the handshake."""

from __future__ import annotations

import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import gevent
import pytest

from imrelay import app
from imrelay.app import AdmittedSocket
from imrelay.broker.connection import Connection
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.topology import Topology
from imrelay.messages.message_ids import MessageIds
from imrelay.sessions.registry import Registry
from imrelay.sessions.services import Services
from imrelay.settings.values import InboxConfig, WebSocketConfig
from tests.support.browser import Browser, in_background, wait_until_ready
from tests.support.counted import CountedRelay
from tests.support.gate import Gate
from tests.support.harness import VirtualHost, eventually
from tests.support.proxy import Proxy
from tests.support.tap import Method, MethodTap
from tests.support.websocket_peer import PATIENCE, TEXT, Peer, close_frame, frame, handshake

#: Sockets that the relay of these tests takes.
BOUND = 3
CONSUME_OK = (60, 21)
#: Ids whose handshakes the hooks break, and the status that each is answered with.
BROKEN = {
    "before-raises": 500,
    "after-raises": 500,
    "after-kills": 500,
    "after-replaces": 202,
    "after-refuses": 403,
    "close-raises": 500,
    "bad-header": 500,
    "teardown-raises": 500,
}
V1 = "imrelay.v1"


class HookedRelay(CountedRelay):
    """A relay with hooks; see the program."""

    program = "hooked_relay.py"

    def places(self) -> dict[str, int]:
        """Count sessions and HTTP connections."""
        return dict(self.ask("places"))

    def wait_for_sessions(self, count: int) -> None:
        """Wait until so many sessions are counted."""
        eventually(lambda: self.places()["sessions"] == count)

    def assert_all_places_free(self) -> None:
        """Wait until no session and no HTTP connection is counted; then see that `BOUND` sockets can be here."""

        def nobody_is_here() -> bool:
            places = self.places()
            assert (places["sessions"], places["http"]) == (0, 0)
            return True

        eventually(nobody_is_here)
        with ExitStack() as stack:
            peers = [stack.enter_context(Peer(cast(Any, self))).open(f"/sound-{n}") for n in range(BOUND)]
            assert self.places()["sessions"] == BOUND
            for peer in peers:
                peer.send(close_frame(1000))
                assert peer.read_close()[0] == 1000
        eventually(nobody_is_here)


@pytest.fixture(scope="module")
def gate(broker: VirtualHost) -> Iterator[Gate]:
    """A way to the broker on which its answers can be held up."""
    with Gate(broker.url) as made:
        yield made


@contextmanager
def running(gate: Gate, directory: Path) -> Iterator[HookedRelay]:
    """Run a relay with hooks that takes few sockets; it has to end well."""
    settings = {
        "broker-url": gate.url,
        "server-port": 0,
        "server-max-connections": BOUND,
        "server-drain-timeout": 5,
    }
    relay = HookedRelay(directory, ["serve", *(f"--{key}={value}" for key, value in settings.items())])
    try:
        relay.wait_until_listening()
        wait_until_ready(relay)
        yield relay
        assert relay.stop(signal.SIGTERM) == 0
    finally:
        relay.kill()


@pytest.fixture(scope="module")
def host(gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HookedRelay]:
    """The relay of this module; each test leaves it without sockets."""
    with running(gate, tmp_path_factory.mktemp("relay")) as made:
        yield made


def reset(peer: Peer) -> None:
    """End a connection with a reset."""
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.sock.close()


def ask(host: Any, request: bytes) -> int:
    """Send a request on a connection of its own, and return the status of the answer; the connection ends then."""
    with Peer(host) as peer:
        peer.send(request)
        status = peer.read_answer().status
        if status != 101:
            peer.read_end()
        return status


@pytest.mark.parametrize(("user", "status"), BROKEN.items(), ids=BROKEN)
def test_a_broken_request_keeps_no_place(host: HookedRelay, broker: VirtualHost, user: str, status: int) -> None:
    """Whatever Flask makes of an answer that admits, the client gets an HTTP answer and no session is left."""
    for _ in range(2 * BOUND):  # each of which would leave none for the next, if it kept its place
        assert ask(host, handshake(f"/{user}")) == status
    host.assert_all_places_free()
    assert f"session of '{user}': open" not in host.log
    assert f"inbox.{user}" not in broker.queues()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (handshake("/ann", line="HEAD /ann HTTP/1.1"), 400),
        (handshake("/ann", line="POST /ann HTTP/1.1"), 400),
        (handshake("/ann", Sec_WebSocket_Version="8"), 426),
        (handshake("/ann", Origin="http://evil.example"), 403),
        (handshake("/a%00b"), 400),
    ],
    ids=["HEAD", "POST", "version", "origin", "id"],
)
def test_a_refused_handshake_keeps_no_place(host: HookedRelay, request_: bytes, status: int) -> None:
    """An error before or in the view takes no place."""
    for _ in range(2 * BOUND):
        with Peer(cast(Any, host)) as peer:
            peer.send(request_)
            assert peer.read_to_end().startswith(b"HTTP/1.1 %d " % status)
    host.assert_all_places_free()


@pytest.mark.parametrize("leave", [reset, lambda peer: peer.sock.close()], ids=["reset", "end"])
def test_who_leaves_between_view_and_101_keeps_no_place(
    host: HookedRelay, gate: Gate, leave: Callable[[Peer], None]
) -> None:
    """A client that is gone while a hook runs, or while its session attaches, is counted until then."""
    log = len(host.log)
    for _ in range(2):
        peers = [Peer(cast(Any, host)) for _ in range(BOUND)]
        for peer in peers:
            peer.send(handshake("/held"))
        host.wait_for_sessions(BOUND)
        assert ask(host, handshake("/one-more")) == 503
        for peer in peers:
            leave(peer)
        host.ask("go")
        host.assert_all_places_free()
        gate.hold(CONSUME_OK)
        with Peer(cast(Any, host)) as peer:
            peer.send(handshake("/attaching"))
            assert gate.holds.wait(PATIENCE)
            leave(peer)
        gate.let_pass()
        host.assert_all_places_free()
    assert "Traceback" not in host.log[log:]


def test_pipelined_requests(host: HookedRelay) -> None:
    """What comes before a handshake is answered; what comes behind is the socket's, or ignored."""
    page = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with Peer(cast(Any, host)) as peer:
        hello = b'{"from":{"id":"ann"},"to":{"id":"ann"},"content":"hello"}'
        peer.send(page + handshake("/ann") + frame(TEXT, hello))
        assert [peer.read_answer().status, peer.read_answer().status] == [200, 101]
        assert peer.read_message() == hello.decode()
    for behind in (page, handshake("/ann"), handshake("/held")):
        with Peer(cast(Any, host)) as peer:
            peer.send(handshake("/after-raises") + behind)
            assert peer.read_answer().status == 500
            peer.read_end()
    host.assert_all_places_free()


def test_a_stop_while_handshakes_are_under_way(gate: Gate, tmp_path: Path) -> None:
    """One whose session attaches gets 101 and is told 1012; one in a hook is told, or ended; then all is over."""
    with running(gate, tmp_path) as host, Peer(cast(Any, host)) as held, Peer(cast(Any, host)) as attaching:
        held.send(handshake("/held"))
        host.wait_for_sessions(1)
        gate.hold(CONSUME_OK)
        attaching.send(handshake("/attaching"))
        assert gate.holds.wait(PATIENCE)
        host.process.send_signal(signal.SIGTERM)
        assert attaching.read_answer().status == 101
        assert attaching.read_close()[0] == 1012
        attaching.send(close_frame(1012))
        gate.let_pass()
        host.ask("go")
        told = held.read_to_end()
        assert not told or (told.startswith(b"HTTP/1.1 101") and b"\x03\xf4" in told)
        assert host.stop() == 0
        assert "Traceback" not in host.log


@pytest.mark.slow
def test_no_place_is_lost_under_load(host: HookedRelay, broker: VirtualHost) -> None:
    """Valid handshakes and all kinds of broken ones, many at once: no more sessions than the bound, then none."""
    users = [*BROKEN, "sound", "sound", "sound"]

    def come_and_go(seed: int) -> set[int]:
        chance = random.Random(seed)
        seen: set[int] = set()
        for _ in range(40):
            with Peer(cast(Any, host)) as peer:
                v1 = {"Sec_WebSocket_Protocol": V1} if chance.random() < 0.5 else {}
                peer.send(handshake(f"/{chance.choice(users)}", **v1)[: chance.choice((None, None, None, 50))])
                if chance.random() < 0.7:
                    peer.sock.settimeout(0.05)
                    with suppress(TimeoutError, AssertionError, ConnectionError):
                        seen.add(peer.read_answer().status)
                if chance.random() < 0.5:
                    reset(peer)
        return seen

    workers = [in_background(come_and_go, seed) for seed in range(8)]
    seen = set().union(*(worker.result(120) for worker in workers))
    assert seen >= {101, 500, 503}
    assert 0 < host.places()["most"] <= BOUND
    host.assert_all_places_free()
    assert host.places()["most"] == BOUND
    eventually(lambda: not any(queue["consumers"] for queue in broker.user_queues().values()))


# -- how long a handshake waits for the broker -----------------------------------------------------------------


class Slow(MethodTap):
    """Has the broker take its time for each consumer."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def on_method(self, connection: int, channel: int, method: Method, to_broker: bool) -> None:
        """Pass on a method: a `basic.consume-ok` after a while."""
        if method == CONSUME_OK:
            time.sleep(self._seconds)


def services_on(url: str) -> Services:
    """Return what a session needs to attach, over a pool that is open."""
    pool = ConsumerPool(
        lambda name, on_state: Connection(lambda: [url], name=name, heartbeat=60, on_state=on_state),
        Topology("direct_message", InboxConfig()),
        prefetch=10,
        channels_per_connection=100,
    )
    pool.start()
    eventually(lambda: pool.is_open, PATIENCE, sleep=gevent.sleep)
    return Services(
        Registry(100),
        pool,
        publisher=cast(Any, None),
        mids=MessageIds(time.time),
        relays=cast(Any, None),
        limits=WebSocketConfig(),
        node_envelope=False,
        remembered=100,
    )


@pytest.fixture
def many_sockets(broker: VirtualHost) -> Iterator[list[AdmittedSocket]]:
    """A hundred users who come at the same moment to a broker that needs three seconds for all of them."""
    with Proxy(broker.url, tap=Slow(0.03)) as proxy, gevent.Timeout(PATIENCE * 3):
        services = services_on(proxy.url)
        sockets = [AdmittedSocket(f"crowd {number}", None, services) for number in range(100)]
        yield sockets
        for socket in sockets:
            socket.close()
        assert not len(services.registry)
        services.consumers.stop()


def is_attached(socket: AdmittedSocket) -> bool:
    """Tell whether the broker delivers to it."""
    return socket._session.wait_attached(0)


def attach_all(sockets: list[AdmittedSocket]) -> list[bool]:
    """Attach all at the same time; tell of each whether the broker delivered to it when its handshake went on."""

    def attach(socket: AdmittedSocket) -> bool:
        socket.attach()
        return is_attached(socket)

    greenlets = [gevent.spawn(attach, socket) for socket in sockets]
    gevent.joinall(greenlets, raise_error=True)
    return [greenlet.value for greenlet in greenlets]


def test_many_handshakes_are_answered_after_they_are_attached(
    many_sockets: list[AdmittedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as consumers get attached, each handshake waits for its own: what is sent after it reaches it."""
    monkeypatch.setattr(app, "_STALLED_TIMEOUT", 1.5)
    assert all(attach_all(many_sockets))


def test_the_wait_of_a_handshake_is_bounded(
    many_sockets: list[AdmittedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handshake that reaches the bound is answered at once, and its socket attached when its turn comes."""
    monkeypatch.setattr(app, "_ATTACH_TIMEOUT", 1.0)
    assert set(attach_all(many_sockets)) == {True, False}
    eventually(lambda: all(map(is_attached, many_sockets)), PATIENCE, sleep=gevent.sleep)


def test_a_broker_that_attaches_nobody_is_not_waited_for(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing gets attached the handshake is answered soon, though the connection is open."""
    monkeypatch.setattr(app, "_STALLED_TIMEOUT", 0.2)
    monkeypatch.setattr(app, "_ATTACH_TIMEOUT", 600)
    with gevent.Timeout(PATIENCE):
        services = services_on(gate.url)
        gate.hold(CONSUME_OK)
        socket = AdmittedSocket("stalled", None, services)
        socket.attach()
        assert not is_attached(socket)
        gate.let_pass()
        eventually(lambda: is_attached(socket), PATIENCE, sleep=gevent.sleep)
        socket.close()
        services.consumers.stop()


def test_who_is_closed_while_it_attaches_waits_no_longer(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that stops ends its handshakes at once."""
    monkeypatch.setattr(app, "_STALLED_TIMEOUT", 600)
    with gevent.Timeout(PATIENCE):
        services = services_on(gate.url)
        gate.hold(CONSUME_OK)
        socket = AdmittedSocket("closed", None, services)
        attaching = gevent.spawn(socket.attach)
        assert gate.wait_held(PATIENCE)
        socket.close()
        attaching.get()
        assert not len(services.registry)
        gate.let_pass()
        services.consumers.stop()


def test_what_is_sent_after_onopen_reaches_that_socket(host: HookedRelay) -> None:
    """Though the request is over before the session attaches, a message that follows the 101 comes at once."""
    with Browser(host, "sender") as sender:
        for number in range(20):
            user = f"ann{number}"  # to one who comes back while others leave, a message may come again
            with Browser(host, user) as first, Browser(host, user) as second:
                text = sender.say(user, number)
                assert [first.receive(), second.receive()] == [text, text]
