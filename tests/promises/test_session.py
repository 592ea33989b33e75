"""A session in which something fails ends, with its consumer, its greenlet and its place in the registry."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import gevent
import pytest
from gevent.event import Event

from imrelay.broker.codec import Delivery
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.publication import Publication
from imrelay.messages.message_ids import MessageIds
from imrelay.sessions import intake
from imrelay.sessions.intake import SessionState
from imrelay.sessions.registry import Registry
from imrelay.sessions.services import Services
from imrelay.sessions.session import Session
from imrelay.settings.values import WebSocketConfig
from imrelay.websocket import ConnectionClosed
from tests.conftest import RelayFactory
from tests.support.brokers import resident_kib
from tests.support.browser import Browser
from tests.support.harness import eventually

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0
MESSAGE = b'{"to":{"id":"ben"}}'
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
    """A WebSocket whose peer sends what `receive` is given, and takes something while `takes` is set."""

    subprotocol = "imrelay.v1"

    def __init__(self) -> None:
        self.incoming: list[tuple[bytes, bool]] = []
        self.received = 0
        self.taken: list[tuple[bytes, bool]] = []
        self.takes = Event()
        self.takes.set()
        self.is_over = Event()
        self.is_paused = False
        self.on_message: Callable[[bytes, bool], None] = raise_fault
        self.on_close: Callable[[], None] = raise_fault
        self.close_code: int | None = None
        self.close_reason = ""
        #: What closing raises, and what its end waits for.
        self.failure: Exception | None = None
        self.is_answered = Event()
        self.is_answered.set()

    def receive(self, *messages: bytes) -> None:
        """Receive messages from the peer; they are handed over in the event loop."""
        self.incoming += [(message, False) for message in messages]
        gevent.get_hub().loop.run_callback(self._hand_over)

    def _hand_over(self) -> None:
        while self.incoming and not (self.is_paused or self.is_over.is_set()):
            self.received += 1
            self.on_message(*self.incoming.pop(0))

    def pause(self) -> None:
        """Hand over nothing."""
        self.is_paused = True

    def resume(self) -> None:
        """Hand over again."""
        self.is_paused = False
        self.receive()

    def lose(self) -> None:
        """Be closed by the peer."""
        self.close_code = self.close_code or 1006
        self.is_over.set()
        gevent.get_hub().loop.run_callback(self.on_close)

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
        self.takes.set()
        if self.failure is not None:
            raise self.failure
        if wait:
            self.is_answered.wait()


def raise_fault(*arguments: object, **more: object) -> Any:
    """Raise an unexpected exception."""
    raise RuntimeError("injected")


class FakePublisher:
    """Has room while the test says so, and keeps what it is given."""

    def __init__(self) -> None:
        self.has_room = True
        self.publications: list[Publication] = []
        self.waiting: dict[Publication, Callable[[], None]] = {}

    def publish(self, publication: Publication, on_room: Callable[[], None]) -> bool:
        """Take a message, or let it wait."""
        if not self.has_room:
            self.waiting[publication] = on_room
            return False
        self.publications.append(publication)
        return True

    def give_room(self) -> None:
        """Take the message that has waited longest; called in the event loop, as by a confirm."""
        publication = next(iter(self.waiting))
        self.publications.append(publication)
        gevent.get_hub().loop.run_callback(self.waiting.pop(publication))

    def withdraw(self, publication: Publication) -> None:
        """Forget a message that waits."""
        del self.waiting[publication]


class Bench:
    """A session with everything around it."""

    def __init__(self) -> None:
        self.registry = Registry(10)
        self.consumer = FakeConsumer()
        self.mailbox = Mailbox()
        self.socket = FakeSocket()
        self.publisher = FakePublisher()
        self.before = greenlets()
        services = Services(
            self.registry,
            cast(Any, self),
            cast(Any, self.publisher),
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
        assert self.registry._by_id

    def expect_ended(self, code: int) -> None:
        """Expect that nothing of it is left."""
        self.running.join()
        assert self.socket.close_code == code
        assert self.consumer.is_closed
        assert self.session.state in (SessionState.CLOSING, SessionState.CLOSED)
        assert len(self.registry) == 0
        assert self.registry._by_id == {}
        assert greenlets() <= self.before


def greenlets() -> set[gevent.Greenlet]:
    """Return the greenlets that live."""
    # by its type: some test may have left a weak proxy, which cannot be asked
    found = [one for one in gc.get_objects() if issubclass(type(one), gevent.Greenlet)]
    return {greenlet for greenlet in found if greenlet.started and not greenlet.dead}


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


def test_a_fault_behind_a_write_ends_the_session(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails behind the write of a delivery ends the session with 1011; it is not acknowledged."""
    bench.open()
    monkeypatch.setattr(type(bench.session._protocol), "written", raise_fault)
    bench.mailbox.deliver(Delivery("inbox", 1, False, b"{}", None, False, True, None))
    bench.expect_ended(1011)
    assert bench.consumer.acked == []
    assert "RuntimeError: injected" in caplog.text


def test_a_fault_while_a_message_is_read_ends_the_session(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails in the event loop ends the session with 1011 and is logged; what follows is not looked at."""
    bench.open()
    monkeypatch.setattr(intake, "parse", raise_fault)
    bench.socket.receive(b"{}", b"{}")
    bench.expect_ended(1011)
    assert bench.socket.received == 1
    assert "RuntimeError: injected" in caplog.text


def test_a_fault_of_an_answer_ends_the_session(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A session whose browser cannot be answered ends with 1011."""
    bench.open()
    bench.socket.receive(b'{"to":{"id":"ben"},"id":1}')
    eventually(lambda: bench.publisher.publications, sleep=gevent.sleep)
    monkeypatch.setattr(intake, "ack_frame", raise_fault)
    (publication,) = bench.publisher.publications
    publication.on_done(publication, None)
    bench.expect_ended(1011)
    assert "RuntimeError: injected" in caplog.text


@pytest.mark.parametrize("broken", ["_greet", "_open", "_choose"])
def test_a_fault_at_the_start_ends_the_session(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails before the first message ends the session with 1011."""
    with gevent.Timeout(PATIENCE):
        bench = Bench()
        monkeypatch.setattr(Session, broken, raise_fault)
        bench.expect_ended(1011)


def test_the_end_of_its_socket_ends_the_session(bench: Bench) -> None:
    """When the browser has left, the greenlet that waits for deliveries ends, and the consumer at once."""
    bench.open()
    bench.socket.lose()
    bench.expect_ended(1006)


@pytest.mark.parametrize("moment", ["waiting", "writing", "waiting for the browser"])
def test_killing_the_greenlet_ends_the_session(bench: Bench, moment: str) -> None:
    """Whenever the server ends the greenlet of the request, nothing of the session is left."""
    bench.open()
    code = 1001
    if moment == "writing":
        bench.socket.takes.clear()
        bench.mailbox.put(b"{}")
        gevent.sleep(0)
    elif moment == "waiting for the browser":
        bench.socket.is_answered.clear()
        code = 1000
        bench.session.close(code)
        gevent.sleep(0)
    assert not bench.running.ready()
    bench.running.kill()
    bench.expect_ended(code)


def test_a_session_that_ends_withdraws_the_message_that_waits(bench: Bench) -> None:
    """The message for which there was no room goes with its sender: nothing of an ended session waits."""
    bench.open()
    bench.publisher.has_room = False
    bench.socket.receive(MESSAGE)
    eventually(lambda: bench.publisher.waiting, sleep=gevent.sleep)
    bench.session.close(4408)
    bench.expect_ended(4408)
    assert bench.publisher.waiting == {}
    assert bench.publisher.publications == []


def test_without_room_one_message_waits_and_no_more_is_read(bench: Bench) -> None:
    """While the publisher has no room the socket is not read, but written to; with room it goes on in order."""
    bench.open()
    bench.publisher.has_room = False
    messages = [json.dumps({"to": {"id": "ben"}, "number": number}).encode() for number in range(5)]
    bench.socket.receive(*messages)
    eventually(lambda: bench.publisher.waiting, sleep=gevent.sleep)
    bench.mailbox.deliver(Delivery("inbox", 1, False, b'{"x":1}', None, False, True, None))
    eventually(lambda: len(bench.socket.taken) == 2, sleep=gevent.sleep)
    assert bench.socket.received == len(bench.publisher.waiting) == 1
    bench.publisher.give_room()
    eventually(lambda: bench.publisher.waiting, sleep=gevent.sleep)
    assert bench.socket.received == 2
    bench.publisher.has_room = True
    bench.publisher.give_room()
    eventually(lambda: bench.socket.received == 5, sleep=gevent.sleep)
    assert [publication.sent for publication in bench.publisher.publications] == messages


def test_messages_without_an_answer_are_bounded_in_number(bench: Bench) -> None:
    """With 256 messages that nobody has answered the socket is paused, until the first one is."""
    bench.open()
    bench.socket.receive(*[MESSAGE] * 300)
    eventually(lambda: bench.socket.is_paused, sleep=gevent.sleep)
    assert bench.socket.received == len(bench.publisher.publications) == 256
    for publication in bench.publisher.publications[:10]:
        publication.on_done(publication, None)
    eventually(lambda: bench.socket.received == 266, sleep=gevent.sleep)
    assert bench.socket.is_paused


@pytest.mark.parametrize("broken", ["socket", "consumer"])
def test_a_failing_close_does_not_prevent_the_others(bench: Bench, broken: str) -> None:
    """When closing the socket or the consumer fails, all else is closed, and the registry counts it no longer."""
    bench.open()
    getattr(bench, broken).failure = RuntimeError("injected")
    with pytest.raises(RuntimeError, match="injected"):
        bench.session.close(1000)
    bench.expect_ended(1000)


def test_answers_that_nobody_takes_are_bounded_in_bytes(bench: Bench) -> None:
    """A browser that sends large pings and reads nothing is not read any more; later every one is answered."""
    bench.open()
    bench.socket.takes.clear()
    bench.socket.receive(*[PING] * 256)
    eventually(lambda: bench.socket.is_paused, sleep=gevent.sleep)
    assert bench.socket.received <= 6
    assert bench.mailbox.answer_bytes <= 65_536 + len(PING)
    bench.socket.takes.set()
    eventually(lambda: len(bench.socket.taken) == 1 + 256, sleep=gevent.sleep)
    assert bench.session._unanswered == 0


def test_who_resumes_a_session_waits_until_the_broker_has_back_what_it_had(bench: Bench) -> None:
    """Each call that ends a session waits, also when it has ended by itself; another user's call ends nothing."""
    bench.open()
    session = bench.session.id
    bench.registry.end("bob", session, 600)
    assert bench.session.state is SessionState.OPEN
    bench.consumer.is_detached.clear()
    first = gevent.spawn(bench.registry.end, "ann", session, 600)
    eventually(lambda: len(bench.registry) == 0, sleep=gevent.sleep)
    second = gevent.spawn(bench.registry.end, "ann", session, 600)
    gevent.idle()
    assert not first.ready()
    assert not second.ready()
    bench.consumer.is_detached.set()
    gevent.joinall([first, second], raise_error=True)
    bench.expect_ended(4409)
    bench.registry.end("ann", session, 600)  # it is unknown now


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
