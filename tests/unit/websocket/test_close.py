"""The close handshake: codes both ways, a bounded wait in both directions, and never a reset in its place."""

from __future__ import annotations

import json

import pytest

from tests.support.websocket_peer import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PATIENCE,
    PING,
    PONG,
    TEXT,
    Peer,
    close_frame,
    frame,
    running_server,
)

#: Settings of the server.
SERVER = {"close_timeout": 0.5}


VALID = [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999]
INVALID = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]


@pytest.mark.parametrize("code", VALID)
def test_valid_codes_are_answered_with_the_same(peer, code):
    """A close frame is answered by one of its code, then the server ends the TCP connection."""
    peer.send(close_frame(code, "gründe".encode()))
    peer.expect_closed(code)


@pytest.mark.parametrize("code", INVALID)
def test_invalid_codes_are_answered_with_1002(peer, code):
    """A code that may not be sent is a protocol error."""
    peer.send(close_frame(code))
    peer.expect_closed(1002)


@pytest.mark.parametrize("sent", [close_frame(1000), frame(11)])
def test_the_end_of_the_connection_follows_the_close_frame_at_once(sent):
    """Behind our last frame comes our FIN; only the wait for the peer's takes up to `close_timeout`."""
    with running_server(close_timeout=PATIENCE * 10) as server, Peer(server) as peer:
        peer.open().send(sent)
        peer.read_close()
        peer.read_end()
        peer.send(b"x" * 1000)
        peer.send(b"still drained")


def test_an_empty_close_frame_is_answered_with_an_empty_one(peer):
    """No code is answered with no code."""
    peer.send(close_frame())
    peer.expect_closed(None)


def test_a_reason_may_fill_the_frame(peer):
    """123 bytes of reason are allowed."""
    peer.send(close_frame(1000, b"x" * 123))
    peer.expect_closed(1000)


@pytest.mark.parametrize(("sent", "code"), [(close_frame(4321, b"bye"), 4321), (close_frame(), 1005)])
def test_the_application_sees_the_peers_code(server, sent, code):
    """After the peer's close `receive` returns None, and code and reason are the peer's; 1005 stands for none."""
    with Peer(server) as peer:
        peer.open(f"/echo?name=seen{code}")
        peer.send(sent)
        peer.read_close()
        assert server.await_report(f"end:seen{code}") == [code, "bye" if code == 4321 else ""]


@pytest.mark.parametrize("reset", [False, True])
def test_a_lost_connection_is_1006(server, reset):
    """An end of stream without a close frame is no close, and told apart from one."""
    with Peer(server) as peer:
        peer.open(f"/echo?name=lost{reset}")
        if reset:
            peer.sock.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")
    assert server.await_report(f"end:lost{reset}")[0] == 1006


@pytest.mark.parametrize("behind", [frame(PING), frame(TEXT, b"late"), close_frame(1001), b"\xff" * 70_000])
def test_nothing_is_answered_behind_a_close_frame(peer, behind):
    """What a peer sends behind its close frame is drained, and does not reset our answer."""
    peer.send(close_frame(1000) + behind)
    peer.expect_closed(1000)


def test_a_message_before_the_close_is_answered_before_it(peer):
    """An echo application gets its last echo out before the close frame is answered."""
    peer.send(frame(TEXT, b"last") + close_frame(1000))
    assert peer.read_message() == "last"
    peer.expect_closed(1000)


def test_a_close_inside_a_fragmented_message_ends_it(peer):
    """A peer may close in the middle of a message, which is then not delivered."""
    peer.send(frame(TEXT, b"half", fin=False) + close_frame(1000) + frame(CONTINUATION, b"other half"))
    peer.expect_closed(1000)


def test_a_close_is_answered_while_the_application_is_busy(server):
    """A close frame does not wait for an application that is not receiving."""
    with Peer(server) as peer:
        peer.open("/busy?name=close")
        peer.send(frame(TEXT, b"taken"))
        peer.send(close_frame(1001))
        peer.expect_closed(1001)
        server.get("/go?go:close")
        assert server.await_report("end:close")[0] == 1001


def test_a_close_is_answered_though_messages_wait_for_a_busy_application(server):
    """The application has a bounded time to answer what came before the close; then the close is answered."""
    with Peer(server) as peer:
        peer.open("/busy?name=waiting")
        peer.send(frame(TEXT, b"taken") + frame(TEXT, b"waiting") + close_frame(1001))
        peer.expect_closed(1001)
        server.get("/go?go:waiting")
        assert server.await_report("end:waiting")[0] == 1001


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 1012, 1013, 3000, 4408, 4999])
def test_our_close_carries_code_and_reason(server, code):
    """`close(code, reason)` sends both, waits for the peer's answer, then ends the TCP connection."""
    with Peer(server) as peer:
        peer.open(f"/close?code={code}&reason=warum&name=ours{code}")
        peer.send(frame(TEXT, b"go"))
        assert peer.answer_close() == (code, "warum")
        assert server.await_report(f"end:ours{code}") == [code, "warum"]


def test_messages_that_cross_our_close_are_drained(server):
    """What the peer had under way when we closed neither is answered nor turns the close into a reset."""
    with Peer(server) as peer:
        peer.open("/close?code=4000")
        crossing = b"".join(frame(BINARY, b"x" * 60_000) for _ in range(8)) + frame(PING)
        peer.send(frame(TEXT, b"go") + crossing)
        assert peer.read_close() == (4000, "")
        peer.send(crossing + close_frame(4000) + frame(TEXT, b"x") * 1000)
        peer.read_end()


@pytest.mark.parametrize("sent", [b"", frame(BINARY, b"x" * 1000), b"\x81"])
def test_our_wait_for_the_peers_answer_is_bounded(server, sent):
    """A peer that never answers our close frame is left after `close_timeout`."""
    with Peer(server) as peer:
        peer.open(f"/close?code=4000&name=unanswered{len(sent)}")
        peer.send(frame(TEXT, b"go"))
        assert peer.read_close() == (4000, "")
        if sent:
            peer.send(sent)
        assert peer.read_to_end() == b""
        assert server.await_report(f"end:unanswered{len(sent)}") == [4000, ""]


def test_garbage_in_answer_to_our_close_ends_it(server):
    """A violation behind our close frame gets no second close frame."""
    with Peer(server) as peer:
        peer.open("/close?code=4000")
        peer.send(frame(TEXT, b"go"))
        assert peer.read_close() == (4000, "")
        peer.send(frame(11))
        peer.read_end()


def test_a_peer_that_keeps_its_side_open_is_left(server):
    """After both close frames a peer that does not end its TCP connection holds ours for a bounded time."""
    with Peer(server) as peer:
        peer.open("/echo?name=open-side")
        peer.send(close_frame(1000))
        peer.expect_closed(1000)
        assert server.await_report("end:open-side") == [1000, ""]
        peer.send_until_refused(frame(PING))


def test_a_peer_that_half_closes_after_its_close_frame_gets_the_answer(peer):
    """A FIN right behind the close frame does not lose our answer."""
    peer.send(frame(TEXT, b"x" * 50_000) + close_frame(1000))
    peer.sock.shutdown(1)
    assert peer.read_message() == "x" * 50_000
    peer.expect_closed(1000)


@pytest.mark.parametrize("path", ["/go-away", "/close-at-once"])
def test_an_application_that_returns_closes_with_1000(server, path):
    """The end of the application is a normal closure."""
    with Peer(server) as peer:
        peer.open(path)
        if path == "/go-away":
            peer.send(frame(TEXT, b"go"))
        assert peer.answer_close() == (1000, "")


def test_an_application_that_fails_closes_with_1011(server):
    """An exception of the application is told as 1011, without its text."""
    with Peer(server) as peer:
        peer.open("/fail?name=fail")
        peer.send(frame(TEXT, b"go"))
        assert peer.answer_close() == (1011, "internal error")


def test_close_from_another_greenlet_wakes_the_receiver(server):
    """`close` from any greenlet ends a blocked `receive` with None."""
    with Peer(server) as peer:
        peer.open("/close-unasked?name=unasked")
        server.get("/go?go:unasked")
        assert peer.read_close() == (4000, "unasked")
        assert server.await_report("received:unasked") is None
        peer.send(close_frame(4000))
        peer.read_end()


def test_wrong_calls_are_told_to_the_caller(server):
    """Codes that may not be sent, and what is no message, raise at once; a second close changes nothing."""
    with Peer(server) as peer:
        peer.open("/bad-calls?name=calls")
        assert json.loads(peer.read_message()) == ["ValueError", "ValueError", "TypeError", "UnicodeEncodeError"]
        assert peer.answer_close() == (4000, "ü" * 61)  # cut to 123 bytes, at a character
        assert server.await_report("late:calls") == [4000, "ü" * 100]


def test_one_reader_at_a_time(server):
    """A second greenlet that receives on the same socket is told so, and the first one is not disturbed."""
    with Peer(server) as peer:
        peer.open("/receive-twice")
        assert peer.read_message() == "ConcurrentReceive"
        peer.send(frame(TEXT, b"for the first"))
        assert peer.read_close() == (1000, "")


def test_a_receive_that_was_given_up_loses_nothing(server):
    """After a timeout in `receive` the next message is there for the next `receive`."""
    with Peer(server) as peer:
        peer.open("/receive-briefly")
        assert peer.read_message() == "waited"
        peer.assert_alive()


def test_the_close_opcode_is_what_is_sent(peer):
    """Our close frame is final and has no reserved bit."""
    peer.send(close_frame(1000))
    assert peer.read_frame() == (CLOSE, b"\x03\xe8", 8)
    assert PONG != CLOSE
