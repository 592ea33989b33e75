"""Request bodies: read as RFC 9112 says, bounded in time and size, and no flood of one keeps others waiting."""

from __future__ import annotations

import contextlib
import json
import socket

import pytest
from gevent import pywsgi

from tests.support.flood import Flood, wait_for_reset
from tests.support.websocket_peer import PATIENCE, Peer, handshake, running_server

#: Settings of the server.
SERVER = {
    "application_decides": True,
    "body_timeout": PATIENCE * 10,
    "answer_timeout": PATIENCE * 10,
    "handshake_timeout": PATIENCE * 10,
}
#: Round trips of another client that have to get through while a flood goes on.
ROUNDS = 50


@pytest.fixture(scope="module")
def hasty():
    with running_server(body_timeout=0.3, answer_timeout=0.3) as server:
        yield server


@pytest.fixture(scope="module")
def strict():
    with running_server(max_body_size=100) as server:
        yield server


def request(path: str, *headers: str, method: str = "POST") -> bytes:
    """Return the head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


CHUNKED = "Transfer-Encoding: chunked"


# -- floods --------------------------------------------------------------------------------------------------

FLOODS = {
    "one-byte chunks that nobody reads": (request("/page", CHUNKED), b"1\r\nx\r\n" * 2000),
    "one-byte chunks that the application reads": (request("/swallow", CHUNKED), b"1\r\nx\r\n" * 2000),
    "one-byte chunks with extensions": (request("/swallow", CHUNKED), b"1;a=b\r\nx\r\n" * 2000),
    "lines of one byte": (request("/lines", CHUNKED), b"2\r\n\n\n\r\n" * 2000),
    "trailers": (request("/swallow", CHUNKED) + b"0\r\n", b"A: b\r\n" * 2000),
    "trailers that nobody reads": (request("/page", CHUNKED) + b"0\r\n", b"A: b\r\n" * 2000),
    "a body of a petabyte": (request("/swallow", f"Content-Length: {10**15}"), b"x" * 65_536),
    "a petabyte that nobody reads": (request("/page", f"Content-Length: {10**15}"), b"x" * 65_536),
    "headers": (b"GET /page HTTP/1.1\r\n", b"A: b\r\n" * 2000),
    "requests whose answers nobody reads": (b"", request("/page", method="GET") * 200),
    "empty lines": (b"", b"\r\n" * 5000),
    "junk": (b"", b"\x16\x03\x01\x00\xff" * 2000),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_a_flood_keeps_nobody_waiting(server, flood):
    """Another client's echoes and requests get through while the flood goes on."""
    with Peer(server) as other, Flood(server.port, *flood) as running:
        other.open()
        running.wait_for_more()
        for _ in range(ROUNDS):
            other.assert_alive()
        assert server.get("/page")["path"] == "/page"
        if flood is not FLOODS["requests whose answers nobody reads"]:  # that one waits for itself
            running.wait_for_more()


def test_a_thousand_requests_at_once(server):
    """Pipelined requests are answered in order, by turns with everybody else."""
    with Peer(server) as greedy, Peer(server) as other:
        other.open()
        greedy.send(b"".join(request(f"/{number}", method="GET") for number in range(1000)))
        other.assert_alive()
        for number in range(1000):
            assert json.loads(greedy.read_answer().body)["path"] == f"/{number}"


# -- what is read --------------------------------------------------------------------------------------------

GOOD = {
    "one chunk": (b"5\r\nhello\r\n0\r\n\r\n", "hello"),
    "several": (b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", "hello"),
    "none": (b"0\r\n\r\n", ""),
    "hexadecimal": (b"a\r\n0123456789\r\nA\r\nabcdefghij\r\n000\r\n\r\n", "0123456789abcdefghij"),
    "extensions": (b'5;a;b=c ;d="e;f"\r\nhello\r\n0;x\r\n\r\n', "hello"),
    "trailers": (b"5\r\nhello\r\n0\r\nA: b\r\nC:\r\n\r\n", "hello"),
    "line ends inside": (b"4\r\n\r\n\r\n\r\n3\r\n0\r\n\r\n0\r\n\r\n", "\r\n\r\n0\r\n"),
    "a large one": (b"30d40\r\n" + b"y" * 200_000 + b"\r\n0\r\n\r\n", "y" * 200_000),
}


@pytest.mark.parametrize(("body", "text"), GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("path", ["/body", "/lines", "/bytes"])
def test_chunks_are_joined(server, path, body, text):
    """However the application reads, it gets what the chunks hold; the next request follows."""
    with Peer(server) as peer:
        peer.send(request(path, CHUNKED) + body + request("/next", method="GET"))
        found = json.loads(peer.read_answer().body)
        assert "".join(found) == text
        if path == "/lines":
            assert found == text.splitlines(keepends=True)
        assert b"/next" in peer.read_answer().body


def test_chunks_in_pieces(server):
    """A chunked body may come byte by byte."""
    with Peer(server) as peer:
        for byte in request("/body", CHUNKED) + GOOD["trailers"][0]:
            peer.send(bytes((byte,)))
        assert json.loads(peer.read_answer().body) == "hello"


BAD = {
    "a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "a negative size": b"-5\r\nhello\r\n0\r\n\r\n",
    "a blank before": b" 5\r\nhello\r\n0\r\n\r\n",
    "a blank behind": b"5 \r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "an underscore": b"0_5\r\nhello\r\n0\r\n\r\n",
    "no hexadecimal": b"g\r\nhello\r\n0\r\n\r\n",
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "a line feed alone": b"5\nhello\r\n0\r\n\r\n",
    "a carriage return alone": b"5\rhello\r\n0\r\n\r\n",
    "more than it says": b"5\r\nhello!\r\n0\r\n\r\n",
    "a control in an extension": b"5;a=\x00\r\nhello\r\n0\r\n\r\n",
    "a long extension": b"5;" + b"a" * 2000 + b"\r\nhello\r\n0\r\n\r\n",
    "many extensions": (b"1;" + b"a" * 900 + b"\r\nx\r\n") * 20 + b"0\r\n\r\n",
    "no trailer": b"0\r\nA b\r\n\r\n",
    "a folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "many trailers": b"0\r\n" + b"A: b\r\n" * 50 + b"\r\n",
    "long trailers": b"0\r\nA: " + b"b" * 9000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
@pytest.mark.parametrize("path", ["/body", "/lines"])
def test_bad_chunks_are_refused(server, path, body):
    """400 with a JSON body, and nothing behind it is taken for a request."""
    with Peer(server) as peer:
        peer.send(request(path, CHUNKED) + body + request("/next", method="GET"))
        answer = peer.read_answer()
        assert (answer.status, answer.error) == (400, "bad_request")
        peer.read_end()


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_behind_bad_chunks_that_nobody_read_the_connection_ends(server, body):
    """The application's answer arrives, and nothing behind the body is taken for a request."""
    with Peer(server) as peer:
        peer.send(request("/page", CHUNKED) + body + request("/next", method="GET"))
        assert peer.read_answer().status == 200
        peer.read_end()


@pytest.mark.parametrize("headers", [("Content-Length: 1000000000000000",), (CHUNKED,)])
def test_a_body_that_ends_early(server, headers):
    """400; a length that was only announced costs no memory."""
    with Peer(server) as peer:
        peer.send(request("/body", *headers) + b"5\r\nhel")
        peer.sock.shutdown(socket.SHUT_WR)
        answer = peer.read_answer()
        assert (answer.status, answer.error) == (400, "bad_request")


def test_an_application_that_makes_something_else_of_a_bad_body(server):
    """What it answers, or raises, because it could not read the body, is not what the client is told."""
    for path in ("/body-or-500", "/body-raises", "/body-later"):
        with Peer(server) as peer:
            peer.send(request(path, CHUNKED) + b"x\r\n")
            answer = peer.read_answer()
            assert (answer.status, answer.error) == (400, "bad_request")


# -- what could be understood in two ways --------------------------------------------------------------------

AMBIGUOUS = {
    "length and chunks": ("Content-Length: 5", CHUNKED),
    "chunks and length": (CHUNKED, "Content-Length: 5"),
    "two lengths": ("Content-Length: 5", "Content-Length: 6"),
    "the same length twice": ("Content-Length: 5", "Content-Length: 5"),
    "a list of lengths": ("Content-Length: 5, 5",),
    "a signed length": ("Content-Length: +5",),
    "a negative length": ("Content-Length: -5",),
    "an underscore": ("Content-Length: 0_5",),
    "hexadecimal": ("Content-Length: 0x5",),
    "no length": ("Content-Length:",),
    "a length of 30 digits": ("Content-Length: " + "9" * 30,),
    "a blank before the colon": ("Content-Length : 5",),
    "a folded header": ("X: a", " Content-Length: 5"),
    "a bare carriage return": ("X: a\rContent-Length: 5",),
    "a vertical tab": ("X: a\x0bContent-Length: 5",),
    "a null byte": ("X: a\x00b",),
    "no name": (": 5",),
    "no colon": ("Content-Length",),
    "two hosts": ("Host: y",),
}


@pytest.mark.parametrize("headers", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_proxies_may_read_differently_is_refused(server, headers):
    """400 with a JSON body, and nothing behind it is taken for a request: no request can be smuggled."""
    with Peer(server) as peer:
        peer.send(request("/body", *headers) + b"hello" + request("/next", method="GET"))
        answer = peer.read_answer()
        assert (answer.status, answer.error) == (400, "bad_request")
        peer.read_end()


@pytest.mark.parametrize(
    "coding", ["gzip", "gzip, chunked", "chunked, chunked", "identity", "\x0bchunked", "xchunked"]
)
def test_other_codings_are_refused(server, coding):
    """A Transfer-Encoding that is not understood is never taken for no body."""
    with Peer(server) as peer:
        peer.send(request("/body", f"Transfer-Encoding: {coding}") + b"0\r\n\r\n" + request("/next"))
        assert peer.read_answer().status in (400, 501)
        peer.read_end()


@pytest.mark.parametrize(
    "head",
    [
        b"POST /body HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /page HTTP/1.1\r\n\r\n",
        b"GET /page HTTP/1.1\r\nHost: user@x\r\n\r\n",
        b"GET /page HTTP/1.1\r\nHost: x/y\r\n\r\n",
        b"GET page HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://user@x/page HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET\x85/page HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /pa\x00ge HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /page HTTP/1\r\nHost: x\r\n\r\n",
        b"GET /page HTTP/1.1.1\r\nHost: x\r\n\r\n",
        b"GET /page http/1.1\r\nHost: x\r\n\r\n",
        b"G(T /page HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        bytes(range(256)) + b"\r\n\r\n",
    ],
)
def test_malformed_heads_are_refused(server, head):
    """400 with a JSON body."""
    with Peer(server) as peer:
        peer.send(head)
        answer = peer.read_answer()
        assert (answer.status, answer.error) == (400, "bad_request")


def test_a_head_that_ends_early_is_no_request(server):
    """A connection that ends in the middle of the headers has asked for nothing."""
    with Peer(server) as peer:
        peer.send(b"GET /page HTTP/1.1\r\nHost: x\r\n")
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.read_answer().status == 400


def test_the_absolute_form(server):
    """`GET http://host/path` is answered like the path, and its host counts (RFC 9112 section 3.2.2)."""
    with Peer(server) as peer:
        for target, path in (("http://y/page?a=b", "/page"), ("HTTP://y", "/")):
            peer.send(request(target, method="GET"))
            assert json.loads(peer.read_answer().body)["path"] == path
    with Peer(server) as peer:
        peer.send(handshake("http://evil.example/same-origin", Origin="http://127.0.0.1", Host="127.0.0.1"))
        assert peer.read_answer().status == 403


# -- bounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [("Content-Length: 10",), (CHUNKED,)], ids=["length", "chunked"])
@pytest.mark.parametrize("path", ["/body", "/lines", "/bytes"])
def test_a_body_that_never_comes(hasty, headers, path):
    """408 after `body_timeout`, also for one that trickles."""
    with Peer(hasty) as peer:
        peer.send(request(path, *headers) + b"1")
        answer = peer.read_answer()
        assert (answer.status, answer.error) == (408, "request_timeout")
        peer.read_end()


def test_a_trickled_body_gets_408(hasty):
    """The time is for the whole body."""
    with Peer(hasty) as peer:
        peer.sock.settimeout(0.05)
        peer.send(request("/body", "Content-Length: 100000"))
        while b"\r\n\r\n" not in peer.buffer:
            peer.send(b"x")
            try:
                peer.fill()
            except TimeoutError:
                continue
        assert peer.read_answer().status == 408


def test_a_body_that_nobody_waits_for_never_comes(hasty):
    """The answer comes at once, and then the connection ends."""
    with Peer(hasty) as peer:
        peer.send(request("/page", "Content-Length: 10"))
        assert peer.read_answer().status == 200
        peer.read_end()


def test_an_answer_that_nobody_reads(hasty):
    """After `answer_timeout` the connection is reset, with what the kernel still holds for it."""
    with Peer(hasty, receive_buffer=4096) as peer:
        peer.send(request("/big?20000000", method="GET"))
        wait_for_reset(peer)


def test_pipelined_answers_that_nobody_reads(hasty):
    """The same holds for many small ones."""
    with Peer(hasty, receive_buffer=4096) as peer:
        peer.sock.setblocking(False)
        with contextlib.suppress(OSError):
            peer.send(request("/big?60000", method="GET") * 1000)
        wait_for_reset(peer)


def test_an_answer_that_is_read_slowly_enough(hasty):
    """It is the waiting that counts: an answer may take longer than the time when the client takes each part."""
    with Peer(hasty) as peer:
        peer.send(request("/slow-answer", method="GET"))
        assert len(peer.read_to_end().split(b"part")) == 6


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (("Content-Length: 101",), b"x" * 101),
        (("Content-Length: 101", "Expect: 100-continue"), b""),
        ((CHUNKED,), b"64\r\n" + b"x" * 100 + b"\r\n1\r\nx\r\n0\r\n\r\n"),
        ((CHUNKED,), b"ffffffffffffffff\r\n"),
    ],
    ids=["length", "expected", "chunks", "huge"],
)
def test_a_body_over_the_limit(strict, headers, body):
    """413 with a JSON body; a client that expects 100 gets it before it sends the body."""
    with Peer(strict) as peer:
        peer.send(request("/body", *headers) + body)
        answer = peer.read_answer()
        assert (answer.status, answer.error) == (413, "too_large")
        peer.read_end()


def test_a_body_at_the_limit(strict):
    """What the limit allows is read."""
    with Peer(strict) as peer:
        peer.send(request("/body", "Content-Length: 100") + b"x" * 100)
        assert json.loads(peer.read_answer().body) == "x" * 100
        peer.send(request("/body", CHUNKED) + b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n")
        assert json.loads(peer.read_answer().body) == "x" * 100


def test_a_small_body_that_nobody_read_is_skipped(server):
    """The connection is kept."""
    with Peer(server) as peer:
        for headers, body in ((("Content-Length: 5",), b"hello"), ((CHUNKED,), b"5\r\nhello\r\n0\r\n\r\n")):
            peer.send(request("/page", *headers) + body)
            answer = peer.read_answer()
            assert (answer.status, answer.headers.get("connection")) == (200, None)
        peer.open().assert_alive()


def test_a_large_body_that_nobody_read_ends_the_connection(server):
    """It is not read to its end; the answer arrives all the same, and says so."""
    with Peer(server) as peer:
        peer.send(request("/page", "Content-Length: 200000") + b"x" * 200_000)
        answer = peer.read_answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        peer.read_end()


def test_expect(server):
    """100 comes when the application begins to read, once; without that none comes, and nothing is waited for."""
    with Peer(server) as peer:
        peer.send(request("/body", "Content-Length: 5", "Expect: 100-Continue"))
        while b"\r\n\r\n" not in peer.buffer:
            peer.fill()
        head, _, peer.buffer = peer.buffer.partition(b"\r\n\r\n")
        assert head == b"HTTP/1.1 100 Continue"
        peer.send(b"hello")
        assert json.loads(peer.read_answer().body) == "hello"
        peer.send(request("/page", "Content-Length: 5", "Expect: 100-continue"))
        answer = peer.read_answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        peer.read_end()
    with Peer(server) as peer:
        peer.send(request("/page", "Expect: the-impossible"))
        assert (answer := peer.read_answer()).status == 417
        assert answer.error == "expectation_failed"


def test_http_1_0(server):
    """A client of HTTP/1.0 gets its answer, and the end of the connection unless it asks to keep it."""
    with Peer(server) as peer:
        peer.send(b"POST /body HTTP/1.0\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\nhello")
        assert json.loads(peer.read_answer().body) == "hello"
        peer.send(b"GET /page HTTP/1.0\r\n\r\n")
        assert peer.read_answer().status == 200
        peer.read_end()


def test_the_private_names_of_pywsgi():
    """What `request_handler` overrides, answers or calls is still called so."""
    for name in ("_sendall", "_handle_client_error", "_connection_upgrade_requested", "_orig_status"):
        assert hasattr(pywsgi.WSGIHandler, name), name
    assert hasattr(pywsgi.Input, "_discard")
    for name in ("_start_accepting_if_started", "start_accepting", "stop_accepting"):
        assert hasattr(pywsgi.WSGIServer, name), name
