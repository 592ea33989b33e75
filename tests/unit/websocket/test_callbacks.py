"""An application that takes its messages in the event loop: in order, within bounds, and to the last one."""

from __future__ import annotations

from collections import Counter

import gevent
import pytest

from imrelay.websocket import ConnectionClosed, conversation
from imrelay.websocket.conversation import ANSWER_BEFORE_CLOSE, MAX_QUEUED_BYTES, MAX_QUEUED_MESSAGES
from imrelay.websocket.fairness import turns_of
from imrelay.websocket.transport import READ_SIZE
from tests.support.harness import eventually
from tests.support.websocket_peer import BINARY, PING, TEXT, close_frame, frame
from tests.unit.websocket.test_conversation import FrozenClock, pair, settle

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, far ahead of that of the sweeper, for which nothing is due then."""
    made = FrozenClock()
    made.now = 1e9
    monkeypatch.setattr(conversation, "monotonic", made)
    return made


class Application:
    """Takes messages until it has `most`, then pauses; notes what came, and that it is over."""

    def __init__(self, websocket, most=1 << 30):
        self.websocket = websocket
        self.most = most
        self.messages = []
        self.ends = []
        #: How many messages came in one turn of the event loop.
        self.turns = Counter()
        websocket.on_message = self.take
        websocket.on_close = self.end

    def take(self, payload, binary):
        assert gevent.getcurrent() is gevent.get_hub()
        assert not self.ends
        self.messages.append((payload, binary))
        self.turns[gevent.get_hub().loop.iteration] += 1
        if len(self.messages) >= self.most:
            self.websocket.pause()

    def end(self):
        self.ends.append(len(self.messages))

    def go_on(self, most=1 << 30):
        self.most = most
        self.websocket.resume()

    def wait(self, count):
        """Wait until so many messages have come, and see that there are no more."""
        eventually(lambda: len(self.messages) >= count, PATIENCE, sleep=gevent.sleep)
        settle()
        assert len(self.messages) == count

    def wait_over(self):
        eventually(lambda: self.ends, PATIENCE, sleep=gevent.sleep)
        settle()
        assert len(self.ends) == 1, "told twice"


def numbered(count, opcode=TEXT):
    return b"".join(frame(opcode, b"%d" % number) for number in range(count))


def is_numbered(application, count):
    return application.messages == [(b"%d" % number, False) for number in range(count)]


def test_messages_come_in_order_as_they_are():
    """Texts as UTF-8 and what is binary as such, also those that came before anybody wanted them."""
    with pair() as (websocket, peer):
        peer.sendall(frame(TEXT, "ä".encode()))
        settle()
        application = Application(websocket)
        assert application.messages == [], "not before the setter has returned"
        application.wait(1)
        peer.sendall(frame(BINARY, b"\xff") + frame(TEXT, b""))
        application.wait(3)
        assert application.messages == [("ä".encode(), False), (b"\xff", True), (b"", False)]


def test_one_turn_is_bounded():
    """A flood is handed over in turns of at most 64 messages, whether it came before or after a pause."""
    with pair() as (websocket, peer):
        application = Application(websocket, 10)
        sender = gevent.spawn(peer.sendall, numbered(20_000))
        application.wait(10)
        application.go_on(5_000)
        application.wait(5_000)
        application.go_on()
        application.wait(20_000)
        sender.get(timeout=PATIENCE)
        assert is_numbered(application, 20_000)
        assert max(application.turns.values()) <= MAX_QUEUED_MESSAGES


@pytest.mark.parametrize("size", [1, 10_000])
def test_while_it_is_paused_little_is_read(size):
    """Behind a pause no more is kept than for any busy application; then it all comes."""
    with pair() as (websocket, peer):
        application = Application(websocket, 1)
        flood = frame(TEXT, b"x" * size) * 2_000
        sender = gevent.spawn(peer.sendall, flood)
        settle()
        application.wait(1)
        assert len(websocket._messages) <= MAX_QUEUED_MESSAGES
        assert websocket._queued <= MAX_QUEUED_BYTES + READ_SIZE
        assert not websocket._reading
        for most in (2, 3):
            application.go_on(most)
            application.wait(most)
            assert len(websocket._messages) <= MAX_QUEUED_MESSAGES
        application.go_on()
        application.wait(2_000)
        sender.get(timeout=PATIENCE)
        assert websocket._queued == 0


@pytest.mark.parametrize("end", [b"", close_frame(4000)], ids=["open", "closing"])
@pytest.mark.parametrize("count", [2, 64, 65, 100, 500])
def test_a_pause_takes_no_turns(count, end):
    """While an application pauses, the event loop has nothing to do for its socket, whatever lies there."""
    with pair() as (websocket, peer):
        application = Application(websocket, 1)
        peer.sendall(numbered(count) + end)
        application.wait(1)
        assert not turns_of(gevent.get_hub())._queue
        application.go_on()
        application.wait(count)
        assert is_numbered(application, count)


def test_a_pause_is_no_silence_of_the_peer(clock):
    """While nothing is read, a missing pong proves nothing; pings are answered as long as something is."""
    with pair(ping_interval=10.0, ping_timeout=50.0) as (websocket, peer):
        Application(websocket, 1)
        peer.sendall(frame(TEXT, b"x") * 2 + frame(PING, b"here"))
        assert peer.recv(100) == b"\x8a\x04here"
        peer.sendall(frame(TEXT, b"x") * 100)
        settle()
        for _ in range(10):
            clock.now += 60
            websocket.on_due(clock.now)
        assert not websocket.closed


def test_a_fault_ends_that_socket_and_no_other(caplog):
    """An exception is logged and closes with 1011; what follows is not handed over, and others go on."""
    with pair() as (websocket, peer), pair() as (other, other_peer):
        application, bystander = Application(websocket), Application(other)

        def fail(payload, binary):
            application.take(payload, binary)
            raise RuntimeError("the application is broken")

        websocket.on_message = fail
        peer.sendall(frame(TEXT, b"x") * 3)
        assert peer.recv(100) == b"\x88\x10\x03\xf3internal error"
        application.wait_over()
        assert len(application.messages) == 1
        assert "RuntimeError: the application is broken" in caplog.text
        other_peer.sendall(frame(TEXT, b"x"))
        bystander.wait(1)
        assert not other.closed
        with pytest.raises(ConnectionClosed, match="1011"):
            websocket.send("too late")


def test_a_fault_at_the_end_is_logged(caplog):
    """An exception in `on_close` is logged, and those who wait for the end are woken all the same."""
    with pair() as (websocket, peer):

        def fail():
            raise RuntimeError("the application is broken")

        websocket.on_close = fail
        waiter = gevent.spawn(websocket.wait_closed)
        settle()
        peer.close()
        waiter.get(timeout=PATIENCE)
        assert "RuntimeError: the application is broken" in caplog.text


@pytest.mark.parametrize("how", ["a close frame", "the end of the stream"])
def test_the_end_comes_behind_the_messages(how):
    """What came before the end is handed over first, and then `on_close` is called, once."""
    with pair() as (websocket, peer):
        application = Application(websocket)
        peer.sendall(numbered(200) + (close_frame(4000) if how == "a close frame" else b""))
        if how == "a close frame":
            assert peer.recv(100) == b"\x88\x02\x0f\xa0"
        peer.close()
        application.wait_over()
        assert is_numbered(application, 200)
        assert websocket.close_code == (4000 if how == "a close frame" else 1006)


@pytest.mark.parametrize("how", ["a close frame", "the end of the stream"])
def test_the_end_comes_after_the_messages_of_a_pause(how, clock):
    """The peer's close is answered after a while; the messages before it are handed over even so, then the end."""
    with pair() as (websocket, peer):
        application = Application(websocket, 10)
        peer.sendall(numbered(50) + (close_frame(4000) if how == "a close frame" else b""))
        application.wait(10)
        if how == "a close frame":
            assert not websocket.closed
            clock.now += ANSWER_BEFORE_CLOSE
            websocket.on_due(clock.now)
            assert peer.recv(100) == b"\x88\x02\x0f\xa0"
        peer.close()
        eventually(lambda: websocket.closed, PATIENCE, sleep=gevent.sleep)
        websocket.wait_closed()
        assert application.ends == []
        application.go_on(20)
        application.wait(20)
        assert application.ends == []
        application.go_on(50)
        application.wait(50)
        assert application.ends == [], "it has not said that it wants no more"
        application.go_on()
        application.wait_over()
        assert is_numbered(application, 50)


def test_a_close_frame_is_answered_when_a_pause_ends(clock):
    """An application that has taken all messages before a close frame in time has it answered at once."""
    with pair() as (websocket, peer):
        application = Application(websocket, 50)
        peer.sendall(numbered(50) + close_frame(4000))
        application.wait(50)
        assert not websocket.closed
        application.go_on()
        assert peer.recv(100) == b"\x88\x02\x0f\xa0"
        application.wait_over()


def test_callbacks_that_are_set_after_the_end_are_called():
    """A socket whose peer has left before it was wanted still gives its messages, and its end."""
    with pair() as (websocket, peer):
        peer.sendall(numbered(3))
        peer.close()
        websocket.wait_closed()
        application = Application(websocket)
        application.wait_over()
        assert is_numbered(application, 3)


@pytest.mark.parametrize("is_paused", [False, True])
def test_after_a_close_of_ours_nothing_comes(is_paused):
    """An application that closes gets no more messages, whether it closes in its callback or while it paused."""
    with pair() as (websocket, peer):
        application = Application(websocket, 2)

        def take(payload, binary):
            application.take(payload, binary)
            if len(application.messages) == 2 and not is_paused:
                websocket.close(4000, wait=False)

        websocket.on_message = take
        peer.sendall(numbered(5))
        application.wait(2)
        if is_paused:
            websocket.close(4000, wait=False)
        peer.sendall(numbered(5) + close_frame(4000))
        application.wait_over()
        websocket.resume()
        application.wait(2)
        assert websocket.close_code == 4000
        assert websocket._messages == []


def test_a_close_of_ours_behind_that_of_the_peer_throws_away_what_waits():
    """Whoever closes a socket that has ended, and whose messages it has not taken, is told of the end as well."""
    with pair() as (websocket, peer):
        application = Application(websocket, 1)
        peer.sendall(numbered(5))
        application.wait(1)
        peer.close()
        websocket.wait_closed()
        assert application.ends == []
        websocket.close(1000)
        application.wait_over()
        assert len(application.messages) == 1
