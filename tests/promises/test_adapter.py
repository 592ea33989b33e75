"""The connection to a broker is opened, read, written and ended by one greenlet, whatever the other side does."""

from __future__ import annotations

import os
import re
import select
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gevent
import pytest
from gevent.event import Event
from pika import frame, spec

from imrelay.broker import connection as connection_module
from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection, ConnectionState
from imrelay.broker.stream import Stream
from imrelay.errors import ChannelLost
from tests.promises.test_amqps import Authority
from tests.support.fake_broker import BrokerSide, FakeBroker
from tests.support.harness import eventually

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """End a test that hangs."""
    with gevent.Timeout(3 * PATIENCE):
        yield


class Opened:
    """A connection of this process's own; use it as a context."""

    def __init__(self, url: str, *, heartbeat: int = 60, tls: ssl.SSLContext | None = None) -> None:
        self.connection = Connection(lambda: [url], name="test", heartbeat=heartbeat, tls=tls)

    def __enter__(self) -> Connection:
        self.connection.start()
        return self.connection

    def __exit__(self, *exception: object) -> None:
        self.connection.close(0.05)


@dataclass(frozen=True)
class TlsContexts:
    """The contexts of both sides; None: no TLS."""

    broker: ssl.SSLContext | None
    relay: ssl.SSLContext | None


@pytest.fixture(scope="module", params=["clear", "TLS"])
def tls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TlsContexts:
    """Each test that takes it runs without TLS and with it."""
    if request.param == "clear":
        return TlsContexts(None, None)
    authority = Authority(tmp_path_factory.mktemp("adapter") / "authority")
    broker = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    broker.load_cert_chain(*authority.issue("broker"))
    return TlsContexts(broker, ssl.create_default_context(cafile=str(authority.certificate)))


def wait_for_problem(connection: Connection, text: str) -> None:
    """Wait until the connection says that this has ended it."""
    eventually(lambda: text in connection.problem, PATIENCE, sleep=gevent.sleep)


def wait_in_thread(event: threading.Event) -> bool:
    """Wait for a thread's event while greenlets go on."""
    return bool(gevent.get_hub().threadpool.apply(event.wait, (PATIENCE,)))


# -- opening ---------------------------------------------------------------------------------------------------


def test_a_name_that_does_not_resolve_is_said() -> None:
    """The operator reads which URL it was, and what the resolver said."""
    with Opened("amqp://ann:secret@no-such-host.invalid/") as connection:
        eventually(
            lambda: connection.state is ConnectionState.WAITING and connection.problem,
            PATIENCE,
            sleep=gevent.sleep,
        )
        wait_for_problem(connection, "no-such-host.invalid")
        assert "secret" not in connection.problem
        assert "[Errno -" in connection.problem


def test_a_silent_broker_is_left_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The AMQP handshake has a deadline; the socket is closed behind it."""
    ended = threading.Event()

    def be_silent(peer: BrokerSide) -> None:
        assert peer.read(8) == b"AMQP\x00\x00\x09\x01"
        assert peer.read(1) == b""
        ended.set()

    monkeypatch.setattr(connection_module, "_CONNECT_TIMEOUT", 0.2)
    with FakeBroker(be_silent) as broker, Opened(broker.url) as connection:
        wait_for_problem(connection, "did not finish the AMQP handshake within 0.2 s")
        assert wait_in_thread(ended)


def test_closing_while_it_is_being_opened_ends_the_attempt_at_once() -> None:
    """Nothing of an attempt outlives the keeper that made it: the socket is closed, no timer is left."""
    ended = threading.Event()
    begun = threading.Event()

    def tune_and_wait(peer: BrokerSide) -> None:
        peer.start()
        peer.read_method(spec.Connection.StartOk)
        peer.send(0, spec.Connection.Tune(2047, 131_072, 60))
        peer.read_method(spec.Connection.Open)
        begun.set()
        assert peer.read(1) == b""
        ended.set()

    with FakeBroker(tune_and_wait) as broker, Opened(broker.url) as connection:
        assert wait_in_thread(begun)
        adapter = connection._adapter
        connection.close()
        assert wait_in_thread(ended)
        assert adapter is not None
        assert adapter.is_closed


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("nothing", "broker has closed the TCP connection"),
        ("start", "broker has closed the TCP connection"),
        ("refusal", "ACCESS_REFUSED"),
    ],
)
def test_a_broker_that_closes_during_the_handshake_is_said(after: str, said: str) -> None:
    """However far the handshake had come, the reason is what the broker said, or that it said nothing."""

    def close_early(peer: BrokerSide) -> None:
        if after == "nothing":
            peer.read(8)
            return
        peer.start()
        peer.read_method(spec.Connection.StartOk)
        if after == "refusal":
            peer.send(0, spec.Connection.Close(403, "ACCESS_REFUSED - no", 0, 0))
            peer.read(1)

    with FakeBroker(close_early) as broker, Opened(broker.url) as connection:
        wait_for_problem(connection, said)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"\x01\x00\x00\x7f\xff\xff\xff",
        frame.Method(0, spec.Connection.TuneOk()).marshal()[:-1] + b"?",
    ],
    ids=["another protocol", "2 GiB", "no end"],
)
def test_what_is_no_amqp_ends_the_connection_at_once(answer: bytes) -> None:
    """A server of another kind, or a frame that is too large, is not waited for and not gathered."""
    ended = threading.Event()

    def answer_and_wait(peer: BrokerSide) -> None:
        peer.read(8)
        peer.sock.sendall(answer)
        assert peer.read(1) == b""
        ended.set()

    with FakeBroker(answer_and_wait) as broker, Opened(broker.url) as connection:
        assert wait_in_thread(ended)
        eventually(lambda: connection.state is ConnectionState.WAITING, PATIENCE, sleep=gevent.sleep)
        assert any(said in connection.problem for said in ("no AMQP 0-9-1", "largest allowed", "FRAME_END"))


def test_a_broker_of_another_version_is_said() -> None:
    """A broker that does not speak 0-9-1 answers by its protocol header and closes."""

    def answer(peer: BrokerSide) -> None:
        peer.read(8)
        peer.sock.sendall(b"AMQP\x00\x01\x00\x00")

    with FakeBroker(answer) as broker, Opened(broker.url) as connection:
        wait_for_problem(connection, r"no AMQP 0-9-1: b'AMQP\x00\x01\x00\x00'")


def test_attempts_that_fail_leave_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty attempts, each refused after the socket was there: as many descriptors as before."""
    monkeypatch.setattr(connection_module, "_pause", lambda tries: 0.0)
    attempts = 0

    def refuse(peer: BrokerSide) -> None:
        nonlocal attempts
        peer.read(8)
        attempts += 1

    before = len(os.listdir("/proc/self/fd"))
    with FakeBroker(refuse) as broker:
        with Opened(broker.url):
            eventually(lambda: attempts > 30, PATIENCE, sleep=gevent.sleep)
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1, PATIENCE, sleep=gevent.sleep)


# -- reading ---------------------------------------------------------------------------------------------------


def delivery(channel: int, tag: int, size: int) -> bytes:
    """Return a delivery of so many bytes, in one body frame."""
    parts = (
        frame.Method(channel, spec.Basic.Deliver("inbox", tag, False, "direct_message", "ben")),
        frame.Header(channel, size, spec.BasicProperties(message_id="m", app_id="imrelay", type="text")),
        frame.Body(channel, b"x" * size),
    )
    return b"".join(part.marshal() for part in parts)


def test_a_broker_that_floods_starves_nobody(tls: TlsContexts) -> None:
    """Between two reads of 64 KiB the others have their turn, however much there is to read."""
    total = 500

    def flood(peer: BrokerSide) -> None:
        peer.open()
        channel = peer.open_channel()
        for tag in range(total):
            peer.sock.sendall(delivery(channel, tag, 60_000))
        peer.read_frame()

    turns = 0
    seen: list[int] = []
    is_done = Event()

    def on_delivery(taken: Any) -> None:
        seen.append(turns)
        if len(seen) == total:
            is_done.set()

    def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            gevent.sleep(0)

    with FakeBroker(flood, tls=tls.broker) as broker, Opened(broker.url, tls=tls.relay) as connection:
        assert connection.wait_open(PATIENCE)
        ticker = gevent.spawn(take_turns)
        channel = Channel(connection, on_delivery=on_delivery)
        assert is_done.wait(PATIENCE)
        ticker.kill()
        assert channel.lost is None
    assert max(seen.count(turn) for turn in set(seen)) <= 3, "deliveries of one read share a turn, and no more"


def test_what_came_before_a_write_fails_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker closes with a reason, and a write meets the broken connection first: the reason is told."""
    may_close = threading.Event()

    def close(peer: BrokerSide) -> None:
        peer.open()
        peer.open_channel()
        may_close.wait(PATIENCE)
        peer.send(0, spec.Connection.Close(320, "CONNECTION_FORCED - bye", 0, 0))

    def send(stream: Stream, data: bytes) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    with FakeBroker(close) as broker, Opened(broker.url) as connection:
        assert connection.wait_open(PATIENCE)
        channel = Channel(connection)
        eventually(lambda: channel._can_send, PATIENCE, sleep=gevent.sleep)
        monkeypatch.setattr(Stream, "send", send)
        may_close.set()
        adapter = connection._adapter
        assert adapter is not None
        assert adapter._stream is not None
        # the event loop stands meanwhile
        assert select.select([adapter._stream], [], [], PATIENCE)[0]
        channel._outbound.emit_now(b"something")
        assert channel.lost is None
        assert channel.wait_ended(PATIENCE)
        assert channel.lost is not None
        assert "CONNECTION_FORCED - bye" in channel.lost.reason


def test_a_write_that_fails_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing had come before, the reason is what the write met; nothing more is written."""
    writes: list[bytes] = []

    def send(stream: Stream, data: bytes) -> int:
        writes.append(data)
        raise OSError(105, "No buffer space available")

    with FakeBroker(lambda peer: (peer.open(), peer.read(1))) as broker, Opened(broker.url) as connection:
        assert connection.wait_open(PATIENCE)
        monkeypatch.setattr(Stream, "send", send)
        channel = Channel(connection)
        channel._outbound.emit_now(b"something")
        channel._outbound.emit_now(b"more")
        assert channel.wait_ended(PATIENCE)
        assert channel.lost is not None
        assert "No buffer space available" in channel.lost.reason
        assert len(writes) == 1


def test_a_read_that_waits_to_write_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TLS reads only when the kernel has taken something, a broker that reads nothing does not hold it."""
    may_send = threading.Event()

    def send_and_freeze(peer: BrokerSide) -> None:
        peer.open()
        may_send.wait(PATIENCE)
        peer.sock.sendall(frame.Heartbeat().marshal())
        is_over.wait(PATIENCE)

    def receive(stream: Stream) -> None:
        stream.wants_to_write = True
        waits.set()

    waits, is_over = Event(), threading.Event()
    with FakeBroker(send_and_freeze, buffer=4096) as broker, Opened(broker.url) as connection:
        assert connection.wait_open(PATIENCE)
        channel = Channel(connection)
        channel._outbound.emit_now(b"x" * 8_000_000)
        assert channel.has_unsent
        monkeypatch.setattr(Stream, "receive", receive)
        may_send.set()
        assert waits.wait(PATIENCE)
        monkeypatch.undo()
        assert connection._adapter is not None
        connection._adapter.abort(ConnectionError("it is frozen"))
        assert channel.wait_ended(2)
        is_over.set()


def test_large_messages_of_two_channels_arrive_whole(tls: TlsContexts) -> None:
    """A message of several body frames is put together, whatever comes between its frames or is in its headers."""
    body = os.urandom(400_000)

    def interleave(peer: BrokerSide) -> None:
        peer.open()
        one, two = peer.open_channel(), peer.open_channel()
        key = frame.Method(one, spec.Basic.Deliver("inbox", 7, True, "user.ben", "@@@@")).marshal()
        peer.sock.sendall(key.replace(b"@@@@", b"\xff\xfe\xff\xfe"))
        header = frame.Header(one, len(body), spec.BasicProperties(message_id="big", headers={"a": 1}))
        peer.sock.sendall(header.marshal())
        for number, at in enumerate(range(0, len(body), 100_000)):
            peer.sock.sendall(frame.Body(one, body[at : at + 100_000]).marshal())
            peer.sock.sendall(delivery(two, number, 5))
            peer.sock.sendall(frame.Heartbeat().marshal())
        peer.read_frame()

    arrived: dict[str, list[Any]] = {"one": [], "two": []}
    with FakeBroker(interleave, tls=tls.broker) as fake, Opened(fake.url, tls=tls.relay) as connection:
        assert connection.wait_open(PATIENCE)
        Channel(connection, on_delivery=arrived["one"].append)
        Channel(connection, on_delivery=arrived["two"].append)
        eventually(lambda: len(arrived["two"]) == 4 and arrived["one"], PATIENCE, sleep=gevent.sleep)
        (big,) = arrived["one"]
        assert (big.tag, big.redelivered, big.mid, big.body == body) == (7, True, "big", True)
        assert [small.tag for small in arrived["two"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "frames",
    [
        [frame.Body(1, b"x")],
        [frame.Header(1, 5, spec.BasicProperties())],
        [frame.Method(1, spec.Basic.Deliver("t", 1, False, "e", "k")), frame.Method(1, spec.Channel.OpenOk())],
        [
            frame.Method(1, spec.Basic.Deliver("t", 1, False, "e", "k")),
            frame.Header(1, 200_000, spec.BasicProperties()),
            frame.Body(1, b"x" * 120_000),
            frame.Body(1, b"x" * 120_000),
        ],
    ],
    ids=["body", "header", "method", "too much"],
)
def test_frames_out_of_order_end_the_connection(frames: list[Any]) -> None:
    """A broker that has lost count cannot be followed any further."""

    def be_odd(peer: BrokerSide) -> None:
        peer.open()
        assert peer.open_channel() == 1
        peer.sock.sendall(b"".join(one.marshal() for one in frames))
        peer.read_frame()

    with FakeBroker(be_odd) as broker, Opened(broker.url) as connection:
        assert connection.wait_open(PATIENCE)
        channel = Channel(connection, on_delivery=lambda taken: None)
        assert channel.wait_ended(PATIENCE)
        assert channel.lost is not None
        assert re.search("out of order|within a message", channel.lost.reason)


def test_a_failing_delivery_callback_ends_its_connection_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """An exception where nothing may raise is logged, each channel is told of the end, and it comes back."""

    def deliver(peer: BrokerSide) -> None:
        peer.open()
        peer.sock.sendall(delivery(peer.open_channel(), 1, 5))
        peer.read_frame()

    def fail(taken: Any) -> None:
        raise RuntimeError("cannot take it")

    def fail_at_the_end(reason: ChannelLost) -> None:
        raise RuntimeError("cannot take that either")

    with FakeBroker(deliver) as broker, Opened(broker.url) as connection:
        assert connection.wait_open(PATIENCE)
        lost = Event()
        Channel(connection, on_delivery=fail, on_lost=fail_at_the_end)
        Channel(connection, on_lost=lambda reason: lost.set())
        assert lost.wait(PATIENCE)
        assert connection.wait_open(PATIENCE)
    assert "cannot take it" in caplog.text


# -- writing and the end ---------------------------------------------------------------------------------------


def test_a_peer_that_does_not_read_gets_everything_in_order_later(tls: TlsContexts) -> None:
    """What the kernel does not take waits, and arrives as it was given once the broker reads again."""
    may_read = threading.Event()
    parts = [bytes([number]) * 100_000 for number in range(100)]
    received: list[bytes] = []

    def read_late(peer: BrokerSide) -> None:
        peer.open()
        peer.open_channel()
        may_read.wait(PATIENCE)
        received.append(peer.read(sum(map(len, parts))))

    fake = FakeBroker(read_late, tls=tls.broker, buffer=65_536)
    with fake as broker, Opened(broker.url, tls=tls.relay) as connection:
        assert connection.wait_open(PATIENCE)
        channel = Channel(connection)
        adapter = connection._adapter
        assert adapter is not None
        eventually(lambda: channel._can_send, PATIENCE, sleep=gevent.sleep)
        drained = Event()
        channel.watch_drained(drained.set)
        for part in parts:
            adapter.outbound.emit_now(part)
        assert channel.has_unsent
        assert adapter.outbound.unsent_bytes <= sum(map(len, parts))
        may_read.set()
        assert drained.wait(PATIENCE)
        assert not channel.has_unsent
        assert wait_in_thread(broker.played)
    assert received == [b"".join(parts)]


def test_a_broker_that_is_frozen_is_left_by_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes and nothing is taken any more: pika's check ends the connection through the adapter."""
    frozen = threading.Event()

    def freeze(peer: BrokerSide) -> None:
        peer.open()
        frozen.wait(PATIENCE)

    real = connection_module.Adapter._adapter_call_later

    def call_later(adapter: Any, delay: float, callback: Any) -> Any:
        return real(adapter, delay / 50, callback)

    monkeypatch.setattr(connection_module.Adapter, "_adapter_call_later", call_later)
    with FakeBroker(freeze) as broker, Opened(broker.url, heartbeat=1) as connection:
        assert connection.wait_open(PATIENCE)
        lost = Event()
        Channel(connection, on_lost=lambda reason: lost.set())
        assert lost.wait(PATIENCE)
        frozen.set()


def test_a_broker_that_does_not_answer_the_close_is_left() -> None:
    """`close` waits for connection.close-ok as long as it is told, and then ends the connection all the same."""
    ended = threading.Event()

    def ignore(peer: BrokerSide) -> None:
        peer.open()
        while peer.read_frame() is not None:
            pass
        ended.set()

    with FakeBroker(ignore) as broker, Opened(broker.url) as connection:
        assert connection.wait_open(PATIENCE)
        channel = Channel(connection)
        connection.close(0.05)
        assert wait_in_thread(ended)
        assert channel.lost is not None
        assert "did not answer connection.close in time" in channel.lost.reason


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_close_of_both_sides_at_once_ends_the_channel(is_answered: bool) -> None:
    """The broker's channel.close crosses ours: the channel has ended, whether the broker answers ours or not."""

    def cross(peer: BrokerSide) -> None:
        peer.open()
        channel = peer.open_channel()
        peer.read_method(spec.Channel.Close)
        peer.send(channel, spec.Channel.Close(406, "PRECONDITION_FAILED", 0, 0))
        peer.read_method(spec.Channel.CloseOk)
        if is_answered:
            peer.send(channel, spec.Channel.CloseOk())
        peer.send(peer.open_channel(), spec.Queue.DeclareOk("q", 0, 0))
        peer.read_frame()

    with FakeBroker(cross) as broker, Opened(broker.url) as connection:
        assert connection.wait_open(PATIENCE)
        channel = Channel(connection)
        asking = gevent.spawn(channel.call, spec.Queue.Declare(queue="q"))
        gevent.sleep(0)
        channel.close()
        channel.close()
        assert connection.channels == 1, "its number is in use until the broker has answered"
        with pytest.raises(ChannelLost, match="PRECONDITION_FAILED"):
            asking.get()
        assert channel.wait_ended(PATIENCE)
        assert connection.channels == 0
        assert Channel(connection).call(spec.Queue.Declare(queue="q"))[0].queue == "q"
        assert connection.is_open


def test_a_late_answer_to_a_close_does_not_end_the_next_channel_of_that_number() -> None:
    """A channel that is not being closed has asked for no channel.close-ok."""

    def answer_late(peer: BrokerSide) -> None:
        peer.open()
        channel = peer.open_channel()
        peer.send(channel, spec.Channel.CloseOk(), spec.Queue.DeclareOk("q", 0, 0))
        peer.read_frame()

    with FakeBroker(answer_late) as broker, Opened(broker.url) as connection:
        assert connection.wait_open(PATIENCE)
        channel = Channel(connection)
        assert channel.call(spec.Queue.Declare(queue="q"))[0].queue == "q"
        assert channel.lost is None
