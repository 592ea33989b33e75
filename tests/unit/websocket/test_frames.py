"""Frames on the wire: what RFC 6455 section 5 allows is echoed, anything else ends the socket with its code."""

from __future__ import annotations

import pytest

from tests.support.websocket_peer import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Peer,
    close_frame,
    frame,
)

#: Settings of the server.
SERVER = {"max_message_size": 200_000}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 124, 125, 126, 127, 128, 65535, 65536, 200_000])
@pytest.mark.parametrize("piece", [None, 997])
def test_messages_of_all_length_forms_are_echoed(peer, size, piece):
    """Text comes back as text and binary as binary, for each of the three length forms and in any pieces."""
    text = "*" * size
    data = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    sent = frame(TEXT, text.encode()) + frame(BINARY, data)
    for start in range(0, len(sent), piece or len(sent)):
        peer.send(sent[start : start + (piece or len(sent))])
    assert peer.read_message() == text
    assert peer.read_message() == data


@pytest.mark.parametrize("mask", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x01\x02\x03\x04"])
def test_any_mask_is_taken_off(peer, mask):
    """Unmasking follows the key, in whole frames and in pieces of every alignment."""
    sent = frame(TEXT, b"abcdefghijklmnopqrstuvwxyz", mask=mask)
    peer.send(sent)
    assert peer.read_message() == "abcdefghijklmnopqrstuvwxyz"
    for start in range(0, len(sent), 3):
        peer.send(sent[start : start + 3])
    assert peer.read_message() == "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("byte_by_byte", [False, True])
def test_fragments_make_one_message(peer, byte_by_byte):
    """A message in fragments, empty ones among them, comes back whole."""
    sent = (
        frame(TEXT, b"", fin=False)
        + frame(CONTINUATION, "fräg".encode()[:3], fin=False)
        + frame(CONTINUATION, b"", fin=False)
        + frame(CONTINUATION, "fräg".encode()[3:], fin=False)
        + frame(CONTINUATION, b"", fin=True)
    )
    for start in range(len(sent)) if byte_by_byte else (0,):
        peer.send(sent[start : start + 1] if byte_by_byte else sent)
    assert peer.read_message() == "fräg"


def test_control_frames_may_stand_between_fragments(peer):
    """A ping inside a fragmented message is answered at once, and the message is not disturbed."""
    peer.send(frame(TEXT, b"one ", fin=False) + frame(PING, b"now"))
    assert peer.read_frame() == (PONG, b"now", 8)
    peer.send(frame(CONTINUATION, b"two ", fin=False) + frame(PONG, b"unasked") + frame(CONTINUATION, b"three"))
    assert peer.read_message() == "one two three"


@pytest.mark.parametrize("payload", [b"", b"hello", bytes(range(125)), b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"])
def test_pings_are_answered_with_their_payload(peer, payload):
    """A pong carries what its ping carried."""
    peer.send(frame(PING, payload))
    assert peer.read_frame() == (PONG, payload, 8)


def test_ten_pings_get_ten_pongs_in_order(peer):
    """Pings of a peer that reads are answered one by one."""
    peer.send(b"".join(frame(PING, b"%d" % number) for number in range(10)))
    for number in range(10):
        assert peer.read_frame() == (PONG, b"%d" % number, 8)


def test_unasked_pongs_are_ignored(peer):
    """A pong that answers nothing changes nothing."""
    peer.send(frame(PONG, b"unasked") + frame(PONG))
    peer.assert_alive()


VIOLATIONS = {
    "an unmasked frame": frame(TEXT, b"hello", mask=None),
    "an unmasked close": frame(CLOSE, b"", mask=None),
    "RSV1 without an extension": frame(TEXT, b"hello", rsv=4),
    "RSV2": frame(TEXT, b"hello", rsv=2),
    "RSV3": frame(BINARY, b"hello", rsv=1),
    "all reserved bits": frame(BINARY, b"hello", rsv=7),
    "RSV1 on a ping": frame(PING, b"hello", rsv=4),
    "RSV1 on a close": frame(CLOSE, b"", rsv=4),
    **{f"opcode {opcode}": frame(opcode, b"hello") for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "a ping of 126 bytes": frame(PING, b"x" * 126),
    "a close of 126 bytes": frame(CLOSE, b"\x03\xe8" + b"x" * 124),
    "a ping with a long length": frame(PING, b"hello", width=2),
    "a ping without FIN": frame(PING, b"hello", fin=False),
    "a close without FIN": frame(CLOSE, b"", fin=False),
    "a continuation of nothing": frame(CONTINUATION, b"hello"),
    "an unfinished continuation of nothing": frame(CONTINUATION, b"hello", fin=False),
    "a text inside a message": frame(TEXT, b"one", fin=False) + frame(TEXT, b"two"),
    "a binary inside a message": frame(TEXT, b"one", fin=False) + frame(BINARY, b"two", fin=False),
    "RSV1 on a continuation": frame(TEXT, b"one", fin=False) + frame(CONTINUATION, b"two", rsv=4),
    "5 bytes as a length of two bytes": frame(TEXT, b"hello", width=2),
    "5 bytes as a length of eight bytes": frame(TEXT, b"hello", width=8),
    "125 bytes as a length of two bytes": frame(TEXT, b"x" * 125, width=2),
    "65535 bytes as a length of eight bytes": frame(TEXT, b"x" * 65535, width=8),
    "a length with the highest bit": frame(TEXT, b"", width=8, announced=1 << 63),
    "a close of one byte": frame(CLOSE, b"\x03"),
}


@pytest.mark.parametrize("sent", VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_violations_end_the_socket_with_1002(peer, sent):
    """Whatever section 5 forbids is answered with 1002 and a whole close frame, without a reset."""
    peer.send(sent)
    peer.expect_closed(1002)


@pytest.mark.parametrize(
    "begun",
    [
        b"\x83",  # a reserved opcode
        b"\xf1",  # reserved bits
        b"\x09",  # a ping without FIN
        b"\x80",  # a continuation of nothing
        b"\x81\x05",  # no mask
        b"\x89\xfe",  # a ping of more than 125 bytes
        b"\x81\xfe\x00\x10",  # a length that is not in its shortest form
        b"\x88\x81\0\0\0\0\x03",  # a close of one byte
    ],
)
def test_violations_are_told_as_soon_as_they_are_seen(peer, begun):
    """The peer need not send more than the byte that shows the violation."""
    peer.send(begun)
    peer.expect_closed(1002)


@pytest.mark.parametrize("sent", [frame(TEXT, b"x", rsv=2), frame(11), frame(CONTINUATION)])
def test_messages_before_a_violation_are_still_answered(peer, sent):
    """What was valid is delivered and its echo sent before the close frame; what follows is not looked at."""
    peer.send(frame(TEXT, b"first") + frame(BINARY, b"second") + sent + frame(TEXT, b"third"))
    assert peer.read_message() == "first"
    assert peer.read_message() == b"second"
    peer.expect_closed(1002)


def test_a_violation_closes_while_the_application_is_busy(server):
    """A peer that breaks the rules is told so though nobody receives its messages."""
    with Peer(server) as peer:
        peer.open("/busy?name=violation")
        peer.send(frame(TEXT, b"taken") + frame(TEXT, b"waiting") + frame(11))
        peer.expect_closed(1002)
        server.get("/go?go:violation")
        assert server.await_report("end:violation")[0] == 1002


def test_one_violation_leaves_other_sockets_alone(server):
    """A socket's violation ends that socket and no other."""
    with Peer(server) as good, Peer(server) as bad:
        good.open()
        bad.open()
        bad.send(frame(11))
        bad.expect_closed(1002)
        good.assert_alive()


def test_a_close_frame_after_garbage_is_no_conversation(peer):
    """After a violation nothing is answered any more, not even a close frame."""
    peer.send(frame(11) + close_frame(1000) + frame(PING))
    peer.expect_closed(1002)
