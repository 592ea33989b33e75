"""What becomes of a session when something in it fails: it ends, and its consumer, greenlets and place with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import gevent
import pytest
from gevent.event import Event

from imrelay import session as session_module
from imrelay.broker.frames import Delivery
from imrelay.broker.mailbox import Mailbox
from imrelay.config import WebSocketConfig
from imrelay.hub import Hub
from imrelay.mid import MessageIds
from imrelay.session import Services, Session, State
from imrelay.websocket import ConnectionClosed
from tests.brokers import resident_kib
from tests.browser import Browser
from tests.conftest import RelayFactory
from tests.harness import eventually

#: Guard against hanging, in seconds; no measure of speed.
PATIENCE = 20.0
PING = json.dumps({"ping": "x" * 60_000}).encode()


class FakeConsumer:
    """Remembers whether it was closed, and what it was told to acknowledge."""

    has_stood_by = False

    def __init__(self) -> None:
        self.is_closed = False
        self.acked: list[int] = []
        #: Whether the broker has confirmed the end of the channel.
        self.is_detached = Event()
        self.is_detached.set()
        self.failure: Exception | None = None

    def close(self) -> None:
        """Close, and fail if the test says so."""
        self.is_closed = True
        if self.failure is not None:
            raise self.failure

    def wait_detached(self, timeout: float) -> bool:
        """Block until the test lets the broker answer."""
        return self.is_detached.wait(timeout)

    def ack(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge."""
        self.acked += [delivery.tag for delivery in taken]

    ack_each = ack


class FakeSocket:
    """A WebSocket whose peer sends `incoming`, and takes something while `takes` is set."""

    subprotocol = "imrelay.v1"

    def __init__(self) -> None:
        self.incoming: list[tuple[bytes, bool]] = []
        self.received = 0
        self.taken: list[tuple[bytes, bool]] = []
        self.takes = Event()
        self.takes.set()
        self.came = Event()
        self.is_over = Event()
        self.close_code: int | None = None
        self.close_reason = ""
        #: What closing raises, and what its end waits for.
        self.failure: Exception | None = None
        self.is_answered = Event()
        self.is_answered.set()

    def receive_messages(self) -> list[tuple[bytes, bool]]:
        """Return one message at a time; nothing when it is over."""
        while not self.incoming and not self.is_over.is_set():
            self.came.wait()
            self.came.clear()
        if self.is_over.is_set():
            return []
        self.received += 1
        return [self.incoming.pop(0)]

    def send_messages(self, messages: Sequence[tuple[bytes, bool]]) -> None:
        """Block until the peer takes it."""
        self.takes.wait()
        if self.is_over.is_set():
            raise ConnectionClosed(self.close_code or 1006, "")
        self.taken += messages

    def close(self, code: int = 1000, reason: str = "", *, wait: bool = True) -> None:
        """Close, and fail if the test says so."""
        if self.close_code is None:
            self.close_code, self.close_reason = code, reason
        self.is_over.set()
        self.came.set()
        self.takes.set()
        if self.failure is not None:
            raise self.failure
        if wait:
            self.is_answered.wait()


class Bench:
    """A session with everything around it."""

    def __init__(self) -> None:
        self.hub = Hub(10)
        self.consumer = FakeConsumer()
        self.mailbox = Mailbox()
        self.socket = FakeSocket()
        services = Services(
            self.hub,
            cast(Any, self),
            cast(Any, None),
            MessageIds(lambda: 1_800_000_000.0),
            cast(Any, None),
            limits=WebSocketConfig(),
            node_envelope=False,
            remembered=1_024,
        )
        self.session = Session("ann", services)
        self.running = gevent.spawn(self.session.run, cast(Any, self.socket))

    def prepare(self, user: str, mailbox: Mailbox) -> FakeConsumer:
        """Stand in for the pool."""
        self.mailbox = mailbox
        return self.consumer

    def open(self) -> None:
        """Let it run until its welcome has been taken."""
        eventually(lambda: self.socket.taken, sleep=gevent.sleep)
        assert self.hub._by_id

    def expect_ended(self, code: int) -> None:
        """Expect that nothing of it is left."""
        self.running.join()
        assert self.socket.close_code == code
        assert self.consumer.is_closed
        assert self.session.state in (State.CLOSING, State.CLOSED)
        assert len(self.hub) == 0
        assert self.hub._by_id == {}
        assert self.writers() == []

    @staticmethod
    def writers() -> list[gevent.Greenlet]:
        """Return the writers that live."""
        import gc

        return [
            found
            for found in gc.get_objects()
            if isinstance(found, gevent.Greenlet)
            and not found.dead
            and str(getattr(found, "name", "")).startswith("writer:")
        ]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A session that runs."""
    with gevent.Timeout(PATIENCE):
        made = Bench()
        yield made
        made.socket.is_answered.set()
        made.socket.takes.set()
        made.socket.failure = made.consumer.failure = None
        made.running.kill()


def raise_fault(*arguments: object, **more: object) -> Any:
    """Fail as nobody expects."""
    raise RuntimeError("injected")


def test_a_fault_in_the_writer_ends_the_session(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails behind the write of a delivery ends the session with 1011; it is not acknowledged."""
    bench.open()
    monkeypatch.setattr(type(bench.session._protocol), "written", raise_fault)
    bench.mailbox.deliver(Delivery("inbox", 1, False, b"{}", None, False, True, None))
    bench.expect_ended(1011)
    assert bench.consumer.acked == []


def test_a_fault_in_the_reader_ends_the_session(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails while a message is read ends the session with 1011."""
    bench.open()
    monkeypatch.setattr(session_module, "parse", raise_fault)
    bench.socket.incoming.append((b"{}", False))
    bench.socket.came.set()
    bench.expect_ended(1011)


@pytest.mark.parametrize("broken", ["_greet", "_open", "_choose"])
def test_a_fault_at_the_start_ends_the_session(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails before the first message ends the session with 1011."""
    with gevent.Timeout(PATIENCE):
        bench = Bench()
        monkeypatch.setattr(Session, broken, raise_fault)
        bench.expect_ended(1011)


def test_a_writer_that_is_killed_takes_the_session_along(bench: Bench) -> None:
    """A session without its writer would read and answer nothing."""
    bench.open()
    (writer,) = bench.writers()
    writer.kill()
    bench.expect_ended(1011)


def test_a_writer_that_is_killed_wakes_a_reader_that_waits_for_it(bench: Bench) -> None:
    """A reader that waits until its browser has taken answers ends with the writer."""
    bench.open()
    bench.socket.takes.clear()
    bench.socket.incoming += [(PING, False)] * 20
    bench.socket.came.set()
    eventually(lambda: bench.session._paid._waiting, sleep=gevent.sleep)
    (writer,) = bench.writers()
    writer.kill()
    bench.expect_ended(1011)


@pytest.mark.parametrize("moment", ["reading", "waiting for the writer", "waiting for the browser"])
def test_a_reader_that_is_killed_takes_the_session_along(bench: Bench, moment: str) -> None:
    """Whenever the server ends the greenlet of the request, nothing of the session is left."""
    bench.open()
    code = 1001
    if moment == "waiting for the writer":
        bench.socket.takes.clear()
        bench.mailbox.put(b"{}")
        gevent.sleep(0)
        bench.socket.close = raise_nothing(bench.socket)  # type: ignore[method-assign]
        code = 1000
        bench.session.close(code)
        gevent.sleep(0.01)
    elif moment == "waiting for the browser":
        bench.socket.is_answered.clear()
        code = 1000
        bench.session.close(code)
        eventually(lambda: not bench.writers(), sleep=gevent.sleep)
    bench.running.kill()
    bench.socket.takes.set()
    eventually(lambda: not bench.writers(), sleep=gevent.sleep)
    bench.expect_ended(code)


def raise_nothing(socket: FakeSocket) -> Callable[..., None]:
    """Return a `close` of a socket whose peer still takes nothing."""

    def close(code: int = 1000, reason: str = "", *, wait: bool = True) -> None:
        socket.close_code = socket.close_code or code
        socket.is_over.set()
        socket.came.set()

    return close


@pytest.mark.parametrize("broken", ["socket", "consumer"])
def test_what_cannot_be_closed_does_not_keep_the_rest(bench: Bench, broken: str) -> None:
    """When closing the socket or the consumer fails, all else is closed, and the hub counts it no longer."""
    bench.open()
    getattr(bench, broken).failure = RuntimeError("injected")
    with pytest.raises(RuntimeError, match="injected"):
        bench.session.close(1000)
    bench.expect_ended(1000)


def test_answers_that_nobody_takes_are_bounded_in_bytes(bench: Bench) -> None:
    """A browser that sends large pings and reads nothing is not read any more; later every one is answered."""
    bench.open()
    bench.socket.takes.clear()
    bench.socket.incoming += [(PING, False)] * 256
    bench.socket.came.set()
    eventually(lambda: bench.session._paid._waiting, sleep=gevent.sleep)
    assert bench.socket.received <= 6
    assert bench.mailbox.frame_bytes <= 65_536 + len(PING)
    bench.socket.takes.set()
    eventually(lambda: len(bench.socket.taken) == 1 + 256, sleep=gevent.sleep)
    assert bench.session._owed == 0


def test_who_resumes_a_session_waits_until_the_broker_has_back_what_it_had(bench: Bench) -> None:
    """Its end is awaited by all who resume it, and also when it has left by itself; a stranger ends nothing."""
    bench.open()
    session = bench.session.id
    bench.hub.end("bob", session, 600)
    assert bench.session.state is State.OPEN
    bench.consumer.is_detached.clear()
    first = gevent.spawn(bench.hub.end, "ann", session, 600)
    eventually(lambda: len(bench.hub) == 0, sleep=gevent.sleep)
    second = gevent.spawn(bench.hub.end, "ann", session, 600)
    gevent.idle()
    assert not first.ready()
    assert not second.ready()
    bench.consumer.is_detached.set()
    gevent.joinall([first, second], raise_error=True)
    bench.expect_ended(4409)
    bench.hub.end("ann", session, 600)  # it is unknown now


# -- against a relay -----------------------------------------------------------------------------------------


def test_who_reads_and_never_acknowledges_holds_no_bodies(relay: RelayFactory) -> None:
    """Ten browsers that do not acknowledge 100 messages of 60 KiB each cost the relay no 60 MiB."""
    host = relay(websocket_ack_timeout=600)
    users = [f"silent {number}" for number in range(10)]
    with Browser(host, "writer") as writer:
        browsers = [Browser(host, user, subprotocols=["imrelay.v1"]) for user in users]

        def write(count: int) -> None:
            for number in range(count):
                for user in users:
                    writer.say(user, "x" * 60_000, id=number)
                for _ in users:
                    writer.ack()
                for browser in browsers:
                    browser.read()

        for browser in browsers:
            browser.read()
        write(5)
        before = resident_kib(host.pid)
        write(95)
        assert resident_kib(host.pid) < before + 20 * 1_024
        for browser in browsers:
            browser.close()
