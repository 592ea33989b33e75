"""HTTP connections are bounded, sockets are not counted; the server survives a shortage of descriptors."""

from __future__ import annotations

import logging
import resource
from contextlib import ExitStack

import pytest

from imrelay.websocket import RefusalLog
from tests.support.flood import hold
from tests.support.harness import eventually
from tests.support.websocket_peer import PATIENCE, Peer, handshake, running_server

BOUND = 3
PAGE = b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def server():
    with running_server(
        application_decides=True, max_http_connections=BOUND, handshake_timeout=PATIENCE * 10
    ) as server:
        yield server


def ask(server, request):
    with Peer(server) as peer:
        peer.send(request)
        return peer.read_answer()


def assert_refused(answer):
    assert (answer.status, answer.error) == (503, "too_many_connections")
    assert answer.headers["connection"] == "close"


def test_one_more_is_refused(server):
    """503 with a JSON body, with a request or without one; a connection that ends makes room."""
    with ExitStack() as stack:
        held = hold(stack, server, BOUND)
        for request in (PAGE, b""):
            assert_refused(ask(server, request))
        held[0].sock.close()
        eventually(lambda: ask(server, PAGE).status == 200)
        hold(stack, server, 1)
        assert_refused(ask(server, PAGE))


def test_when_full_health_checks_and_sockets_are_served(server):
    """While idle connections hold all places, health checks and WebSockets are served."""
    with ExitStack() as stack:
        hold(stack, server, BOUND)
        assert ask(server, HEALTH).status == 200
        with Peer(server) as peer:
            peer.open().assert_alive()
            assert_refused(ask(server, PAGE))
            peer.assert_alive()
        answer = ask(server, handshake(Sec_WebSocket_Version="8"))
        assert answer.status == 426


def test_a_socket_is_no_http_connection(server):
    """An upgrade gives its place back, and its end does not give back another one."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(Peer(server)).open() for _ in range(2 * BOUND)]
        assert ask(server, PAGE).status == 200
        for peer in sockets:
            peer.assert_alive()
            peer.sock.close()
        hold(stack, server, BOUND)
        assert_refused(ask(server, PAGE))


@pytest.mark.parametrize(
    "request_",
    [
        handshake("/refused"),
        handshake("/raises"),
        handshake("/broken-attach"),
        handshake(Host=None),
        b"junk\r\n\r\n",
        PAGE,
        b"",
    ],
)
def test_every_end_gives_the_place_back(server, request_):
    """However a connection ends, its place is free again, once."""
    for _ in range(BOUND + 1):
        with Peer(server) as peer:
            peer.send(request_)
    with ExitStack() as stack:
        eventually(lambda: ask(server, PAGE).status == 200)
        hold(stack, server, BOUND)
        assert_refused(ask(server, PAGE))


def test_hundreds_of_silent_connections(server):
    """A health check gets through between them; each is told, the oldest as soon as another needs its place."""
    with ExitStack() as stack:
        peers = hold(stack, server, 300)
        assert server.get("/health") == {"method": "GET", "path": "/health"}
        for peer in peers[BOUND:]:
            assert_refused(peer.read_answer())


def test_a_refusal_is_logged_now_and_then(caplog):
    """The first one at once, further ones by their number every ten seconds."""
    now = 0.0
    refusals = RefusalLog(logging.getLogger("imrelay.test"), clock=lambda: now)
    with caplog.at_level("WARNING"):
        for _ in range(1000):
            refusals.note("full")
        now = 10.0
        refusals.note("full")
    assert [record.getMessage() for record in caplog.records] == [
        "full; refused so far: 1",
        "full; refused so far: 1001",
    ]


def test_without_a_descriptor_it_waits(server):
    """At the limit of open files established sockets go on, nothing spins, and afterwards new ones get in."""
    pid = server.process.pid
    with Peer(server) as old, ExitStack() as stack:
        old.open()
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = server.get("/census")["descriptors"]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, before[1]))
        waiting = hold(stack, server, BOUND + 2, handshake())
        for _ in range(20):
            old.assert_alive()
        waiting[-1].sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            waiting[-1].fill()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        waiting[-1].sock.settimeout(PATIENCE)
        for peer in waiting:
            assert peer.read_answer().status == 101
            peer.assert_alive()
