"""permessage-deflate (RFC 7692): off unless wanted, without context take-over, and bounded when inflated."""

from __future__ import annotations

import zlib

import pytest

from imrelay.websocket import FrameError
from imrelay.websocket.deflate import negotiate_deflate
from imrelay.websocket.parser import FrameParser
from tests.support.websocket_peer import (
    BINARY,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Peer,
    frame,
    handshake,
    running_server,
)

OFFER = "permessage-deflate; client_max_window_bits"


def deflated(data, *, final_block=False, level=9):
    """Return a message's payload as RFC 7692 section 7.2.1 has it."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -12)
    body = compressor.compress(data)
    if final_block:
        return body + compressor.flush() + b"\x00"
    return (body + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def inflated(payload):
    """Undo it."""
    return zlib.decompressobj(-15).decompress(payload + b"\x00\x00\xff\xff")


#: Settings of the server.
SERVER = {"permessage_deflate": True, "max_message_size": 100_000}


@pytest.fixture
def peer(server):
    with Peer(server) as peer:
        yield peer.open(Sec_WebSocket_Extensions=OFFER)


def test_it_is_off_unless_wanted():
    """Without the setting an offer is not answered, and a compressed frame is a protocol error."""
    with running_server() as server, Peer(server) as peer:
        peer.open(Sec_WebSocket_Extensions=OFFER)
        assert "sec-websocket-extensions" not in peer.answer.headers
        peer.send(frame(TEXT, deflated(b"hello"), rsv=4))
        peer.expect_closed(1002)


def test_it_is_off_unless_offered(server):
    """A client that does not offer it is neither answered nor sent compressed frames, and must not send any."""
    with Peer(server) as peer:
        peer.open()
        assert "sec-websocket-extensions" not in peer.answer.headers
        peer.send(frame(TEXT, b"x" * 5000))
        assert peer.read_message() == "x" * 5000
        peer.send(frame(TEXT, deflated(b"hello"), rsv=4))
        peer.expect_closed(1002)


@pytest.mark.parametrize(
    ("offer", "agreed"),
    [
        ("permessage-deflate", True),
        (OFFER, True),
        ("permessage-deflate; client_max_window_bits=10; server_no_context_takeover", True),
        ("x-webkit-deflate-frame, permessage-deflate", True),
        ("permessage-deflate; unknown=1, permessage-deflate", True),
        ("permessage-deflate; server_max_window_bits=8", False),
        ("permessage-deflate; unknown", False),
        ("permessage-bzip2", False),
    ],
)
def test_neither_side_keeps_context(server, offer, agreed):
    """The first offer that suits is agreed on, without context take-over on both sides; else none is."""
    with Peer(server) as peer:
        peer.open(Sec_WebSocket_Extensions=offer)
        answer = peer.answer.headers.get("sec-websocket-extensions", "")
        assert answer.startswith("permessage-deflate") is agreed
        assert ("server_no_context_takeover" in answer) is agreed
        assert ("client_no_context_takeover" in answer) is agreed
        peer.assert_alive()


def test_a_malformed_offer_is_refused(server):
    """An extension header against its grammar is a bad handshake."""
    with Peer(server) as peer:
        peer.send(handshake(Sec_WebSocket_Extensions="permessage-deflate; ="))
        assert peer.read_answer().status == 400


@pytest.mark.parametrize("size", [0, 1, 63, 64, 2043, 2044, 50_000, 100_000])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_compressed_messages_are_echoed(peer, size, opcode):
    """Compressed messages up to the limit are inflated, and answers that gain by it are compressed."""
    data = (b"0123456789abcdef" * 6250)[:size]
    for _ in range(2):
        peer.send(frame(opcode, deflated(data), rsv=4))
        found, payload, bits = peer.read_frame()
        assert found == opcode
        assert (inflated(payload) if bits & 4 else payload) == data
        assert bool(bits & 4) is (size >= 64)


def test_each_message_stands_alone(peer):
    """No answer refers to the one before it."""
    data = bytes(range(256)) * 20
    answers = set()
    for _ in range(3):
        peer.send(frame(BINARY, data))
        answers.add(peer.read_frame()[1])
    assert len(answers) == 1
    assert inflated(answers.pop()) == data


def test_incompressible_and_uncompressed_messages_pass(peer):
    """What does not get smaller is sent as it is; a message need not be compressed."""
    import random

    noise = random.Random(7).randbytes(100_000)
    peer.send(frame(BINARY, deflated(noise, level=0), rsv=4))
    assert peer.read_frame() == (BINARY, noise, 8)
    peer.send(frame(BINARY, noise))
    assert peer.read_frame() == (BINARY, noise, 8)


def test_a_final_block_is_understood(peer):
    """A message may end with a deflate block that says it is the last (RFC 7692 section 7.2.3.4)."""
    for _ in range(2):
        peer.send(frame(TEXT, deflated(b"hello", final_block=True), rsv=4))
        assert peer.read_message() == "hello"


def test_compressed_fragments_with_control_frames_between(peer):
    """RSV1 stands on the first fragment alone; pings between the fragments are answered."""
    data = "grüße ".encode() * 1000
    payload = deflated(data)
    parts = [payload[:1], b"", payload[1:20], payload[20:]]
    peer.send(frame(TEXT, parts[0], fin=False, rsv=4) + frame(PING, b"now"))
    assert peer.read_frame() == (PONG, b"now", 8)
    for byte in frame(CONTINUATION, parts[1], fin=False) + frame(CONTINUATION, parts[2], fin=False):
        peer.send(bytes((byte,)))
    peer.send(frame(CONTINUATION, parts[3]))
    _, echoed, _ = peer.read_frame()
    assert inflated(echoed) == data


@pytest.mark.parametrize("size", [100_001, 200_000, 50_000_000])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_bomb_ends_with_1009(peer, size, pieces):
    """A small frame that inflates to more than the limit is answered with 1009, in one frame or in several."""
    payload = deflated(b"\0" * size)
    cut = -(-len(payload) // pieces)
    parts = [payload[at : at + cut] for at in range(0, len(payload), cut)]
    for index, part in enumerate(parts):
        first, last = index == 0, index == len(parts) - 1
        peer.send(frame(BINARY if first else CONTINUATION, part, fin=last, rsv=4 if first else 0))
    peer.expect_closed(1009)


def test_little_is_inflated_in_one_turn():
    """A read full of small frames that inflate to large messages is not taken in at once."""
    agreed = negotiate_deflate("permessage-deflate")
    parser = FrameParser(max_size=65_536, inflate=agreed[1].inflate)
    turns = [parser.parse(frame(BINARY, deflated(b"\0" * 65_000), rsv=4) * 50, 128)]
    while parser.has_more:
        turns.append(parser.parse(b"", 128))
    assert [len(events) for events in turns] == [2] * 25


@pytest.mark.parametrize("allowed", [0, 1, 1000])
def test_inflating_stops_at_what_is_allowed(allowed):
    """The codec itself stops, be it that nothing more is allowed: it does not inflate a bomb to count it then."""
    codec = negotiate_deflate("permessage-deflate")[1]
    with pytest.raises(FrameError) as caught:
        codec.inflate(deflated(b"\0" * 1_000_000), True, True, allowed)
    assert caught.value.code == 1009


def test_nothing_may_come_beyond_the_limit(peer):
    """When the limit is used up exactly, one byte more in the next fragment is too many."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    full = compressor.compress(b"x" * 100_000) + compressor.flush(zlib.Z_SYNC_FLUSH)
    more = compressor.compress(b"y") + compressor.flush(zlib.Z_SYNC_FLUSH)
    peer.send(frame(BINARY, full, fin=False, rsv=4) + frame(CONTINUATION, more[:-4]))
    peer.expect_closed(1009)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(TEXT, b"\xff\xff\xff\xff garbage", rsv=4), 1002),
        (frame(TEXT, b"a", fin=False, rsv=4) + frame(CONTINUATION, b"b", rsv=4), 1002),
        (frame(PING, b"a", rsv=4), 1002),
        (frame(TEXT, deflated(b"hello"), rsv=6), 1002),
        (frame(TEXT, deflated(b"\xff\xfe"), rsv=4), 1007),
        (frame(TEXT, deflated(b"cut \xe2\x82"), rsv=4), 1007),
        (frame(TEXT, b"", rsv=4, announced=200_000), 1009),
    ],
)
def test_faults_have_their_codes(peer, sent, code):
    """Broken deflate data and misplaced RSV1 are 1002, text that is not UTF-8 is 1007, too large a frame 1009."""
    peer.send(sent)
    peer.expect_closed(code)
