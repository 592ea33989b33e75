"""What a WebSocket does in the event loop, with a clock of the test, which no peer could make happen."""

from __future__ import annotations

import contextlib

import gevent
import pytest
from gevent import socket

from imrelay.websocket import ConnectionClosed, WebSocket, WebSocketHandler, closing, conversation
from imrelay.websocket.fairness import turns_of
from tests.support.websocket_peer import CLOSE, PING, PONG, TEXT, close_frame, frame


class FrozenClock:
    """A clock that stands still."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = FrozenClock()
    monkeypatch.setattr(conversation, "monotonic", clock)
    monkeypatch.setattr(closing, "monotonic", clock)
    return clock


@contextlib.contextmanager
def pair(**limits):
    """Make a WebSocket and the socket of its peer, in this process."""
    peer, ours = socket.socketpair()
    peer.settimeout(10.0)
    websocket = WebSocket(ours, gevent.get_hub(), type("Limits", (WebSocketHandler,), limits))
    websocket.start()
    try:
        yield websocket, peer
    finally:
        websocket.abort()
        peer.close()


def settle():
    """Run the event loop until it has nothing to do."""
    for _ in range(5):
        gevent.sleep(0.001)


def test_a_pong_that_waited_in_the_kernel_is_not_late(clock):
    """When reading goes on after a pause, the pong has its time again: it may lie there unread."""
    with pair(ping_interval=10.0, ping_timeout=50.0) as (websocket, peer):
        peer.sendall(frame(TEXT, b"x") * 100)
        settle()
        clock.now += 10
        websocket.on_due(clock.now)
        assert peer.recv(2) == b"\x89\x04"
        payload = peer.recv(4)
        peer.sendall(frame(PONG, payload))
        clock.now += 49
        for _ in range(64):
            websocket.receive()
        websocket._go_on()  # reads again from here on, but the event loop has not come to it yet
        websocket.on_due(clock.now + 5)
        assert not websocket.closed
        for _ in range(36):
            assert websocket.receive() == "x"


def test_a_pause_of_the_reading_is_no_silence_of_the_peer(clock):
    """While nothing is read, a missing pong proves nothing, however long that takes."""
    with pair(ping_interval=10.0, ping_timeout=50.0) as (websocket, peer):
        peer.sendall(frame(TEXT, b"x") * 100)
        settle()
        for _ in range(10):
            clock.now += 60
            websocket.on_due(clock.now)
        assert not websocket.closed


def test_after_a_fault_of_ours_there_is_one_close_frame():
    """When the conversation ends with 1011, the peer's close frame is drained, and not answered by another."""
    with pair() as (websocket, peer):
        websocket._on_bug()
        assert websocket.close_code == 1011
        peer.sendall(frame(PING) + close_frame(1011))
        assert peer.recv(100) == b"\x88\x10\x03\xf3internal error"
        assert peer.recv(100) == b""
        peer.close()
        settle()
        with pytest.raises(ConnectionClosed, match="1011 internal error"):
            websocket.send("too late")


def test_deadlines_of_a_closing_socket(clock):
    """A peer that answers no close frame, and one that answers but stays, are left when their time is over."""
    for answer in (b"", close_frame(1000)):
        with pair(close_timeout=5.0) as (websocket, peer):
            websocket.close(1000, wait=False)
            assert peer.recv(1)[0] & 0x0F == CLOSE
            peer.sendall(answer)
            settle()
            assert websocket.due == clock.now + 5.0
            websocket.on_due(websocket.due)
            waiter = gevent.spawn(websocket.wait_closed)
            waiter.join(timeout=10.0)
            assert waiter.dead
            assert websocket.close_code == 1000


def test_in_the_event_loop_nothing_blocks():
    """`send` and `close` called in the event loop queue their bytes in the outbox and return."""
    with pair() as (websocket, peer):
        done = []

        def in_the_hub():
            websocket.send(b"x" * 3_000_000)
            websocket.close(4000)
            done.append(True)

        gevent.get_hub().loop.run_callback(in_the_hub)
        settle()
        assert done
        received = b""
        while not received.endswith(b"\x88\x02\x0f\xa0"):
            received += peer.recv(1 << 20)
        assert len(received) == 3_000_000 + 10 + 4


def test_a_killed_sender_leaves_the_stream_intact():
    """A greenlet that is killed in `send` is no longer woken, and its message still leaves whole."""
    with pair() as (websocket, peer):
        sender = gevent.spawn(websocket.send, b"x" * 3_000_000)
        settle()
        sender.kill()
        other = gevent.spawn(websocket.send, "behind")
        received = b""
        while len(received) < 3_000_000 + 10 + 8:
            received += peer.recv(1 << 20)
        assert received.endswith(b"\x81\x06behind")
        other.get(timeout=10.0)


def test_a_close_is_heard_though_reading_had_stopped():
    """After `close` the peer's answer is read, whatever lies before it that nobody had room for."""
    with pair(close_timeout=1000.0) as (websocket, peer):
        peer.sendall(frame(TEXT, b"x") * 1000)
        settle()
        closer = gevent.spawn(websocket.close, 4000)
        assert peer.recv(100) == b"\x88\x02\x0f\xa0"
        peer.sendall(close_frame(4000))
        closer.join(timeout=10.0)
        assert closer.dead


def test_a_half_closed_peer_gets_what_was_sent_to_it():
    """A peer that closes and sends FIN while much waits for it still gets all of it, and the close frame."""
    with pair() as (websocket, peer):
        sender = gevent.spawn(websocket.send, b"x" * 3_000_000)
        settle()
        peer.sendall(close_frame(1000))
        peer.shutdown(socket.SHUT_WR)
        settle()
        received = b""
        while data := peer.recv(1 << 20):
            received += data
        assert len(received) == 3_000_000 + 10 + 4
        assert received.endswith(b"\x88\x02\x03\xe8")
        sender.get(timeout=10.0)


def test_a_socket_waits_for_one_turn_at_a_time():
    """However often there is more to do, a socket stands in the line once."""
    with pair() as (websocket, peer):
        queue = turns_of(gevent.get_hub())._queue
        sender = gevent.spawn(peer.sendall, frame(TEXT, b"x") * 20_000)
        longest = 0
        for _ in range(20_000):
            assert websocket.receive() == "x"
            longest = max(longest, len(queue))
        sender.get(timeout=10.0)
        assert longest == 1


def test_a_killed_receiver_is_not_woken_again():
    """A greenlet that is killed in `receive` leaves the next message to the next one that asks."""
    with pair() as (websocket, peer):
        receiver = gevent.spawn(websocket.receive)
        settle()
        peer.sendall(frame(TEXT, b"hello"))
        receiver.kill(block=False)
        settle()
        if receiver.value == "hello":  # the message came first
            peer.sendall(frame(TEXT, b"hello"))
        assert websocket.receive() == "hello"


def test_after_a_close_nothing_is_received():
    """Messages that nobody took before `close` are thrown away with it."""
    with pair() as (websocket, peer):
        peer.sendall(frame(TEXT, b"x") * 3)
        settle()
        websocket.close(4000, wait=False)
        assert websocket.receive() is None


def test_first_close_reason_wins():
    """A close frame that waits for the messages before it changes nothing when the connection is lost before."""
    with pair() as (websocket, peer):
        peer.sendall(frame(TEXT, b"x") * 3 + close_frame(4000))
        settle()
        websocket.abort()
        assert [websocket.receive() for _ in range(4)] == ["x", "x", "x", None]
        assert websocket.close_code == 1006
        websocket.wait_closed()
