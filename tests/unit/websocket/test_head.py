"""A request's head has a deadline and a size, so that a slow client holds nothing for long."""

from __future__ import annotations

import io
from http.client import parse_headers

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imrelay.websocket.head import Fields, Malformed, read_fields
from tests.support.websocket_peer import PATIENCE, Peer, handshake, running_server

#: Settings of the server.
SERVER = {"handshake_timeout": 0.4}


@pytest.fixture(scope="module")
def patient():
    with running_server(handshake_timeout=PATIENCE * 10) as server:
        yield server


@pytest.mark.parametrize("begun", [b"G", b"GET /echo HTTP/1.1", handshake()[:-1], handshake()[:60]])
def test_an_unfinished_head_gets_408(server, begun):
    """A head that is not complete in time is answered with 408 and the end of the connection."""
    with Peer(server) as peer:
        peer.send(begun)
        answer = peer.read_answer()
        assert (answer.status, answer.error) == (408, "request_timeout")
        peer.read_end()


def test_a_trickled_head_is_ended(server):
    """The deadline is that of the whole head: a client that keeps sending single bytes is ended all the same."""
    with Peer(server) as peer:
        peer.sock.settimeout(0.1)
        request = iter(handshake(X_Long="x" * 10_000))
        answered = False
        while not answered:
            peer.send(bytes((next(request),)))
            try:
                answered = peer.fill() and b"\r\n\r\n" in peer.buffer
            except TimeoutError:
                continue
        assert peer.read_answer().status == 408


def test_a_connection_that_asks_for_nothing_is_closed(server):
    """An idle connection ends without an answer, since nothing was asked."""
    with Peer(server) as peer:
        peer.read_end()


def test_a_kept_connection_that_asks_for_nothing_more_is_closed(server):
    """The same holds between two requests of one connection."""
    with Peer(server) as peer:
        peer.send(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n")
        assert peer.read_answer().status == 200
        peer.read_end()


def test_a_websocket_outlives_the_deadline(server):
    """The deadline ends with the head: a socket that was upgraded stays."""
    with Peer(server) as peer, Peer(server) as idle:
        peer.open()
        idle.read_end()  # the deadline has passed
        peer.assert_alive()


def test_a_head_in_pieces_passes(patient):
    """A head may come byte by byte."""
    with Peer(patient) as peer:
        for byte in handshake():
            peer.send(bytes((byte,)))
        assert peer.read_answer().status == 101
        peer.assert_alive()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /echo HTTP/1.1\r\nHost x\r\n" + b"A: " + b"x" * 70_000, 400),
        (handshake(X_Long="x" * 40_000), 400),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 400),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: five\r\n\r\n", 400),
    ],
)
def test_no_request_is_refused(patient, request_, status):
    """A head that is too large, or no HTTP, is answered at once with JSON, whatever else was sent."""
    with Peer(patient) as peer:
        peer.send(request_)
        answer = peer.read_answer()
        assert (answer.status, answer.error) == (status, "bad_request")
        peer.read_end()


NAMES = st.sampled_from(["Host", "host", "X-A", "x-a", "From", "Content-Type", "Upgrade"])
VALUES = st.text(st.characters(max_codepoint=0xFF, exclude_characters="\r\n")) | st.sampled_from(
    ["", " a ", "\t:b\x85"]
)


@given(st.lists(st.tuples(NAMES, st.sampled_from(["", " ", "\t "]), VALUES, st.sampled_from(["\n", "\r\n"]))))
@example(
    [
        ("X-A", "\t", ":b\x85 ", "\n"),
        ("From", "", " me", "\n"),
        ("x-a", " \t", "1", "\r\n"),
        ("X-A", "", "2", "\n"),
    ]
)
def test_fields_are_those_of_http_client(lines):
    """What is not refused is read as `http.client` reads it, which pywsgi would do."""
    raw = "".join("".join((name, ":", *rest)) for name, *rest in lines).encode("latin-1") + b"\r\n"
    try:
        fields = read_fields(io.BytesIO(raw))
    except Malformed:
        assert any((char < " " and char != "\t") or char == "\x7f" for _, _, value, _ in lines for char in value)
        return
    theirs = parse_headers(io.BytesIO(raw))
    assert fields.items() == theirs.items()
    assert list(fields.headers) == [f"{name}: {value}\r\n" for name, value in theirs.items()]
    assert fields.typeheader == theirs.get("content-type")
    for name in ("HOST", "x-A", "none"):
        assert fields.get(name) == fields.getheader(name) == theirs.get(name)
        assert fields.get_all(name) == theirs.get_all(name, [])


def test_fields_can_be_exchanged():
    """`remove` takes all of a name, in any case; `add` comes last."""
    fields = Fields()
    for name in ("Host", "A", "HOST"):
        fields.add(name, name)
    fields.remove("host")
    fields.add("Host", "b")
    assert fields.items() == [("A", "A"), ("Host", "b")]
    del fields["a"]
    assert fields.items() == [("Host", "b")]
    assert fields.get("a", "none") == "none"
