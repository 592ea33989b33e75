"""A broker's name becomes a socket in steps; each has a deadline, and nothing of an attempt stays behind."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import gevent
import pytest

from imrelay.broker import stream as module
from imrelay.broker.stream import Addresses, Stream, open_stream
from tests.support.fake_broker import BrokerSide, FakeBroker

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """End a test that hangs."""
    with gevent.Timeout(3 * PATIENCE):
        yield


def addresses(*ports: int) -> list[Any]:
    """Return what a lookup returns for a host that listens on these ports."""
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]


def connect(found: list[Any], *, step_timeout: float = PATIENCE, tls: Any = None) -> Stream:
    """Connect to the first of the addresses that answers."""
    return open_stream(found, step_timeout=step_timeout, timeout=PATIENCE, prepare=lambda sock: None, tls=tls)


@pytest.fixture
def full() -> Iterator[int]:
    """A port that takes no connection and refuses none: its queue is full."""
    with ExitStack() as sockets, socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        for _ in range(4):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def nothing(peer: BrokerSide) -> None:
    """Say nothing, until the other side closes."""
    assert peer.read(1) == b""


def test_the_next_address_is_tried(full: int) -> None:
    """An address that refuses, and one that does not answer in time, are passed by."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        refuses = gone.getsockname()[1]
    with FakeBroker(nothing) as broker:
        stream = connect(addresses(refuses, full, broker.port), step_timeout=0.1)
        assert stream.receive() is None
        stream.close()


def test_what_was_wrong_with_the_last_address_is_said(full: int) -> None:
    """Where no address can be reached, the problem names the one that was tried last, and the time it had."""
    with pytest.raises(TimeoutError, match=rf"no TCP connection to 127\.0\.0\.1:{full} within 0\.1 s"):
        connect(addresses(full), step_timeout=0.1)
    with pytest.raises(OSError, match="no address"):
        connect([])


def test_tls_has_a_deadline() -> None:
    """A port that takes the connection and does not speak TLS is left, and its socket closed."""
    ended = threading.Event()

    def be_silent(peer: BrokerSide) -> None:
        while peer.read(1):
            pass
        ended.set()

    with FakeBroker(be_silent) as broker:
        context = ssl.create_default_context()
        with pytest.raises(TimeoutError, match=r"no TLS with 127\.0\.0\.1:\d+ within 0\.1 s"):
            connect(addresses(broker.port), step_timeout=0.1, tls=(context, "localhost"))
        assert gevent.get_hub().threadpool.apply(ended.wait, (PATIENCE,))


def test_an_attempt_that_is_killed_closes_its_socket() -> None:
    """A greenlet that is killed while it waits for TLS leaves nothing open."""
    begun, ended = threading.Event(), threading.Event()

    def be_silent(peer: BrokerSide) -> None:
        assert peer.read(1)
        begun.set()
        while peer.read(1):
            pass
        ended.set()

    with FakeBroker(be_silent) as broker:
        tls = (ssl.create_default_context(), "localhost")
        attempt = gevent.spawn(connect, addresses(broker.port), tls=tls)
        wait = gevent.get_hub().threadpool.apply
        assert wait(begun.wait, (PATIENCE,))
        attempt.kill()
        assert wait(ended.wait, (PATIENCE,))


def test_a_lookup_that_takes_too_long_is_left_and_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver cannot be interrupted: one lookup of a name at a time, and its answer counts when it comes."""
    may_answer = gevent.event.Event()
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **more: Any) -> list[Any]:
        asked.append(host)
        may_answer.wait()
        return addresses(port)

    monkeypatch.setattr(module.gevent_socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(module, "_NAME_TIMEOUT", 0.05)
    names = Addresses()
    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"the name slow was not resolved within 0\.05 s"):
            names.find("slow", 5672)
    assert asked == ["slow"]
    monkeypatch.setattr(module, "_NAME_TIMEOUT", PATIENCE)
    waiting = gevent.spawn(names.find, "slow", 5672)
    gevent.sleep(0)
    may_answer.set()
    assert waiting.get() == addresses(5672)
    assert asked == ["slow"]
    assert names.find("slow", 5672) == addresses(5672)
    assert asked == ["slow", "slow"], "an answer is not kept: a broker may move"


@pytest.mark.parametrize("name", ["no-such-host.invalid", "x" * 64 + ".invalid", "a..b"])
def test_a_name_that_stands_for_nothing_is_an_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is wrong with a name it is an `OSError`, and nothing else is printed."""
    with pytest.raises(OSError, match=r"\w"):
        Addresses().find(name, 5672)
    gevent.sleep(0)
    assert capsys.readouterr().err == ""


class OddTls:
    """A TLS socket that cannot read or write before it has done the other (a change of keys)."""

    def __init__(self) -> None:
        self.raises: Exception | None = None

    def fileno(self) -> int:
        """Stand for none."""
        return -1

    def settimeout(self, seconds: float) -> None:
        """Be told not to block."""

    def _do(self) -> None:
        if self.raises is not None:
            raise self.raises

    def recv(self, size: int) -> bytes:
        """Read."""
        self._do()
        return b"read"

    def send(self, data: memoryview) -> int:
        """Write."""
        self._do()
        return len(data)


def test_tls_that_has_to_do_the_other_first_says_so() -> None:
    """The stream says what to wait for, until the next read or write succeeds."""
    sock = OddTls()
    stream = Stream(sock, is_tls=True, deadline=0.0)
    sock.raises = ssl.SSLWantWriteError()
    assert (stream.receive(), stream.wants_to_write) == (None, True)
    assert (stream.send(b"abc"), stream.wants_to_read) == (0, False)
    sock.raises = ssl.SSLWantReadError()
    assert (stream.receive(), stream.wants_to_write) == (None, False)
    assert (stream.send(b"abc"), stream.wants_to_read) == (0, True)
    sock.raises = None
    assert (stream.send(b"abc"), stream.wants_to_read) == (3, False)
    assert stream.send(b"x" * 100_000) == 65_536
