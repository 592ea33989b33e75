"""Text is strict UTF-8, across fragments, and a fault is told as early as the bytes allow."""

from __future__ import annotations

import pytest

from tests.support.websocket_peer import BINARY, CLOSE, CONTINUATION, TEXT, Peer, frame

VALID = [
    "κόσμε",
    "Hello-µ@ßöäüàá-UTF-8!!",
    "\x00\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff",
    "\ud7ff\ue000\ufffd\ufffe\ufeff",
    "😀" * 1000,
]
INVALID = [
    b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",  # a surrogate
    b"\xed\xbf\xbf",
    b"\xc0\xaf",  # not in its shortest form
    b"\xe0\x80\xaf",
    b"\xf0\x80\x80\xaf",
    b"\xf8\x88\x80\x80\x80",  # five bytes
    b"\xf4\x90\x80\x80",  # beyond the last code point
    b"\x80",
    b"\xff",
    b"ok\xc3(",
]
UNFINISHED = [b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"text \xce"]


@pytest.mark.parametrize("text", VALID)
def test_valid_text_is_echoed_however_it_is_cut(peer, text):
    """Code points may be cut anywhere by fragments and by reads."""
    data = text.encode()
    peer.send(frame(TEXT, data))
    assert peer.read_message() == text
    data = data[:40]
    peer.send(frame(TEXT, b"", fin=False))
    for byte in data:
        peer.send(frame(CONTINUATION, bytes((byte,)), fin=False))
    peer.send(frame(CONTINUATION, text.encode()[40:]))
    assert peer.read_message() == text


@pytest.mark.parametrize("data", INVALID + UNFINISHED)
def test_invalid_text_ends_the_socket_with_1007(peer, data):
    """A text that is not UTF-8 is answered with 1007."""
    peer.send(frame(TEXT, data))
    peer.expect_closed(1007)


@pytest.mark.parametrize("data", INVALID + UNFINISHED)
def test_invalid_text_in_fragments_ends_the_socket_with_1007(peer, data):
    """The same across fragments; a text that ends inside a code point is invalid at its last frame."""
    peer.send(frame(TEXT, data[:1], fin=False) + frame(CONTINUATION, data[1:]))
    peer.expect_closed(1007)


@pytest.mark.parametrize("data", INVALID)
def test_a_fault_is_told_before_the_message_ends(peer, data):
    """The fault is answered though the message, and even its frame, is not complete."""
    peer.send(frame(TEXT, b"begun ", fin=False) + frame(CONTINUATION, data + b"x" * 50)[: 6 + len(data)])
    peer.expect_closed(1007)


@pytest.mark.parametrize("data", [b"\xf4\x90", b"\xed\xa0", b"\xe0\x80", b"\xf0\x8f", b"\xc1", b"\xf5"])
def test_a_fault_is_told_with_the_byte_that_makes_it(peer, data):
    """A sequence that no further byte can repair is answered without waiting for one."""
    peer.send(frame(TEXT, data, fin=False))
    peer.expect_closed(1007)


@pytest.mark.parametrize("data", UNFINISHED)
def test_a_code_point_may_end_in_the_next_fragment(peer, data):
    """What the next fragment can still complete is no fault."""
    whole = {b"\xc3": "ü", b"\xe2\x82": "€", b"\xf0\x9f\x98": "😀", b"text \xce": "text κ"}[data]
    peer.send(frame(TEXT, data, fin=False))
    peer.send(frame(CONTINUATION, whole.encode()[len(data) :]))
    assert peer.read_message() == whole


@pytest.mark.parametrize("data", INVALID + UNFINISHED)
def test_binary_messages_may_hold_anything(peer, data):
    """Binary is not looked into."""
    peer.send(frame(BINARY, data))
    assert peer.read_message() == data


@pytest.mark.parametrize("data", INVALID + UNFINISHED)
def test_a_close_reason_is_utf8_too(peer, data):
    """A close frame whose reason is not UTF-8 is answered with 1007."""
    peer.send(frame(CLOSE, b"\x03\xe8" + data))
    peer.expect_closed(1007)


def test_messages_as_they_came(server):
    """`receive_messages` gives the payload's bytes, and says which messages are binary."""
    with Peer(server) as peer:
        peer.open("/receive-raw")
        long = "ü" * 20_000
        for opcode, payload in ((TEXT, "ü".encode()), (BINARY, b"\xff"), (TEXT, long.encode()), (TEXT, b"")):
            peer.send(
                frame(opcode, payload, fin=False) + frame(CONTINUATION)
                if opcode == TEXT
                else frame(opcode, payload)
            )
            hexadecimal, binary = __import__("json").loads(peer.read_message())
            assert bytes.fromhex(hexadecimal) == payload
            assert binary == (opcode == BINARY)
