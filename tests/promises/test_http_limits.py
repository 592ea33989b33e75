"""Clients of plain HTTP have limits of time, size and number, and cannot disturb sockets."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import RelayFactory
from tests.promises.test_hosting import Gunicorn
from tests.support.browser import Browser, wait_until_ready
from tests.support.flood import Flood, hold
from tests.support.harness import RelayProcess, eventually, plain_environment
from tests.support.websocket_peer import TEXT, Peer, frame, handshake

#: Messages of another user that get through while an attack goes on.
ROUNDS = 50
CHUNKED = b"POST /1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
FLOODS = {
    "chunks": (CHUNKED, b"1\r\nx\r\n" * 2000),
    "trailers": (CHUNKED + b"0\r\n", b"A: b\r\n" * 2000),
    "headers": (b"GET / HTTP/1.1\r\n", b"A: b\r\n" * 2000),
    "requests": (b"", GET * 200),
    "frames of another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00" * 10_000),
}
DESCRIPTORS = 128


@pytest.fixture(scope="module", params=["serve", "gunicorn"])
def host(
    request: pytest.FixtureRequest, broker_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A relay with default settings: of its own, and hosted by gunicorn."""
    directory = tmp_path_factory.mktemp("host")
    if request.param == "gunicorn":
        server: Any = Gunicorn(directory, {"IMRELAY_BROKER_URL": broker_url})
    else:
        server = RelayProcess(
            directory, ["serve", "--server-port=0", f"--broker-url={broker_url}"], plain_environment()
        )
        server.wait_until_listening()
    try:
        wait_until_ready(server)
        yield server
        assert "Traceback" not in server.log, server.log
    finally:
        server.kill()


def at(host: Any) -> Any:
    """Return where a raw client connects to."""
    return SimpleNamespace(port=host.port, certificate="")


def ask(host: Any, request: bytes) -> Any:
    """Send a request and return the answer."""
    with Peer(at(host)) as peer:
        peer.send(request)
        return peer.read_answer()


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_messages_go_on_during_a_flood(host: Any, flood: tuple[bytes, bytes]) -> None:
    """A user's messages to himself, and health checks, get through while somebody floods the relay."""
    with Browser(host, "other") as other, ExitStack() as stack:
        floods = [stack.enter_context(Flood(host.port, *flood)) for _ in range(4)]
        for running in floods:
            running.wait_for_more()
        for _ in range(ROUNDS):
            text = other.say("other")
            assert other.receive() == text
        assert ask(host, GET).status == 200


def test_a_body_that_is_too_large(host: Any) -> None:
    """413 before anything of it is read."""
    answer = ask(host, b"POST /1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048577\r\n\r\n")
    assert (answer.status, answer.error) == (413, "too_large")
    answer = ask(
        host, b"POST /1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n" + b"x" * 1_048_576
    )
    assert answer.status == 405


def test_http_connections_are_bounded(relay: RelayFactory) -> None:
    """One more is refused; sockets and health checks are served all the same, and sockets are not counted."""
    host = relay(server_max_http_connections=5)
    with ExitStack() as stack:
        sockets = [stack.enter_context(Browser(host, f"b{number}")) for number in range(8)]
        hold(stack, at(host), 5)
        answer = ask(host, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (answer.status, answer.error) == (503, "too_many_connections")
        assert ask(host, GET).status == 200
        with Browser(host, "late") as late:
            for browser in sockets:
                text = late.say(browser.user)
                assert browser.receive() == text


def test_an_unread_body_and_an_unread_answer_have_their_time(relay: RelayFactory) -> None:
    """`http_timeout` ends both."""
    host = relay(server_http_timeout=0.3, websocket_handshake_timeout=600)
    with Peer(at(host)) as peer:
        peer.send(CHUNKED + b"1")
        assert peer.read_answer().status == 405
        peer.read_end()


# -- descriptors ---------------------------------------------------------------------------------------------


class LimitedRelay(RelayProcess):
    """A relay that begins with a low limit of open files, and may raise it to another one."""

    def __init__(self, directory: Path, arguments: list[str], *, soft: int, hard: int) -> None:
        self.log_path = directory / "relay.log"
        self.directory, self.host, self.port = directory, "", 0
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-m", "imrelay", "serve", *arguments],
                cwd=directory,
                env=plain_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


LimitedFactory = Callable[..., LimitedRelay]


@pytest.fixture
def limited(broker_url: str, tmp_path: Path) -> Iterator[LimitedFactory]:
    """Start one relay whose open files are limited; it has to end well."""
    started: list[LimitedRelay] = []

    def start(soft: int, hard: int, *arguments: str) -> LimitedRelay:
        options = ["--server-port=0", f"--broker-url={broker_url}", *arguments]
        relay = LimitedRelay(tmp_path, options, soft=soft, hard=hard)
        started.append(relay)
        relay.wait_until_listening()
        wait_until_ready(relay)
        return relay

    try:
        yield start
        for relay in started:
            assert relay.stop() == 0
            assert "Traceback" not in relay.log, relay.log
    finally:
        for relay in started:
            relay.kill()


def allowed(relay: RelayProcess) -> tuple[int, int]:
    """Return how many sockets and HTTP connections the relay says that it allows."""
    found = relay.wait_for_log(r"(\d+) open files allow (\d+) browser sockets and (\d+) HTTP connections")
    return int(found[2]), int(found[3])


def test_the_soft_limit_is_raised(limited: LimitedFactory) -> None:
    """To what the settings need, as far as the hard one allows; then no warning is due."""
    relay = limited(64, 20_000)
    assert resource.prlimit(relay.pid, resource.RLIMIT_NOFILE) == (20_000, 20_000)
    assert allowed(relay) == (10_000, 1_000)
    assert "WARNING" not in relay.log


@pytest.mark.parametrize(
    ("option", "least"), [("--server-max-connections=1000000", 600), ("--broker-channels-per-connection=1", 300)]
)
def test_what_is_kept_for_the_broker_grows_with_the_sockets_that_fit(
    limited: LimitedFactory, option: str, least: int
) -> None:
    """The AMQP connections of sockets that the descriptors do not allow take none of them."""
    sockets, _ = allowed(limited(64, 1_024, option))
    assert sockets > least


def test_at_the_limit_of_open_files(limited: LimitedFactory) -> None:
    """Of 200 sockets those are let in that the descriptors allow, the others told so; all else goes on."""
    relay = limited(64, DESCRIPTORS)
    sockets, _ = allowed(relay)
    assert 10 < sockets < DESCRIPTORS
    assert re.search(r"WARNING .*max_connections = 10000 .*ulimit -n; LimitNOFILE=.*: raise it by \d+", relay.log)
    with ExitStack() as stack:
        peers: list[Peer] = []
        statuses = []
        for number in range(200):
            peers.append(stack.enter_context(Peer(at(relay))))
            peers[-1].send(handshake(f"/{number}"))
            statuses.append(peers[-1].read_answer().status)
        assert statuses.count(101) == sockets
        assert statuses.count(503) == 200 - sockets
        assert ask(relay, GET).status == 200
        assert ask(relay, GET.replace(b"healthz", b"readyz")).status == 200
        inside = [peer for peer, status in zip(peers, statuses, strict=True) if status == 101]
        for peer in inside:
            peer.send(frame(TEXT, b'{"to":{"id":"nobody"},"id":1}'))
        for peer in inside:
            assert str(peer.read_message()).startswith('{"ack"')
        for peer in inside[:5]:
            peer.sock.close()
        for number in range(5):
            eventually(lambda number=number: stack.enter_context(Peer(at(relay))).open(f"/late{number}"))


def test_silent_connections_at_the_limit_of_open_files(limited: LimitedFactory) -> None:
    """200 connections that say nothing keep neither a health check nor a socket outside."""
    relay = limited(64, DESCRIPTORS)
    with ExitStack() as stack:
        hold(stack, at(relay), 200)
        assert ask(relay, GET).status == 200
        with Browser(relay, "b") as browser:
            text = browser.say("b")
            assert browser.receive() == text
    assert "Too many open files" not in relay.log
