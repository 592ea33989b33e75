"""Limits of size: told with 1009 before anything large is read, and little memory for what is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.websocket_peer import BINARY, CONTINUATION, PING, TEXT, Peer, frame, running_server

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 10_000


#: Settings of the server.
SERVER = {"max_message_size": LIMIT, "close_timeout": 0.5}


def test_a_message_of_exactly_the_limit_passes(peer):
    """The limit itself is allowed, in one frame and in several."""
    peer.send(frame(TEXT, b"x" * LIMIT))
    assert peer.read_message() == "x" * LIMIT
    peer.send(frame(BINARY, b"x" * (LIMIT - 1), fin=False) + frame(CONTINUATION, b"", fin=False))
    peer.send(frame(CONTINUATION, b"x"))
    assert peer.read_message() == b"x" * LIMIT


@pytest.mark.parametrize("announced", [LIMIT + 1, 65535, 65536, 8 << 30, (1 << 63) - 1])
def test_a_frame_over_the_limit_is_told_by_its_head(peer, announced):
    """The head alone is answered with 1009; not a byte of payload is needed."""
    peer.send(frame(BINARY, b"", announced=announced))
    peer.expect_closed(1009)


def test_fragments_count_together(peer):
    """The head of the fragment that goes over the limit is answered with 1009."""
    peer.send(frame(TEXT, b"x" * LIMIT, fin=False) + frame(CONTINUATION, b"", fin=False))
    peer.send(frame(PING) + frame(CONTINUATION, b"", announced=1))
    assert peer.read_frame()[0] == 10
    peer.expect_closed(1009)


def test_a_new_message_starts_from_zero(peer):
    """What one message used up is the next one's again."""
    for _ in range(3):
        peer.send(frame(TEXT, b"x" * 6000, fin=False) + frame(CONTINUATION, b"y" * 4000))
        assert len(peer.read_message()) == LIMIT


def test_the_number_of_fragments_is_bounded(peer):
    """A message of endless empty fragments is answered with 1009."""
    peer.send(frame(TEXT, b"", fin=False) + frame(CONTINUATION, b"", fin=False) * 1024)
    peer.expect_closed(1009)


def test_many_fragments_pass(peer):
    """A thousand fragments, control frames between them, are allowed."""
    peer.send(frame(TEXT, b"", fin=False) + (frame(CONTINUATION, b"x", fin=False) + frame(9)) * 1000)
    peer.send(frame(CONTINUATION, b"end"))
    message = None
    while message is None:
        opcode, payload, _ = peer.read_frame()
        message = payload if opcode == TEXT else None
    assert message == b"x" * 1000 + b"end"


def test_a_peer_that_goes_on_sending_gets_the_close_frame(peer):
    """1009 arrives though the peer sends its whole oversized message before it reads."""
    peer.send(frame(BINARY, b"x" * 500_000))
    peer.expect_closed(1009)


def test_a_peer_that_never_stops_sending_is_left(peer):
    """The input of a failed socket is drained for a bounded time."""
    peer.send(frame(BINARY, b"", announced=1 << 40))
    peer.send_until_refused(b"x" * 65536)


@pytest.mark.parametrize(
    ("opcode", "payload", "fragments"),
    [(BINARY, b"\xff" * 4_000_000, 1), (TEXT, b"x" * 4_000_000, 1), (TEXT, "中".encode() * 1_300_000, 7)],
)
def test_a_message_costs_at_most_two_and_a_half_times_its_size(opcode, payload, fragments):
    """From its first byte to the application's hand, a message needs at most 2.5 times its size."""
    with running_server(max_message_size=5_000_000) as server, Peer(server) as peer:
        peer.open("/peak")
        assert peer.read_message() == "ready"
        size = -(-len(payload) // fragments)
        for index in range(fragments):
            part = payload[index * size : (index + 1) * size]
            peer.send(
                frame(opcode if index == 0 else CONTINUATION, part, fin=index == fragments - 1, mask=b"\0\0\0\0")
            )
        length, used = json.loads(peer.read_message())
        assert length == len(payload.decode() if opcode == TEXT else payload)
        assert used < 2.5 * len(payload)


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize(
    "payload",
    [b"x" * 2_000_000 + "😀".encode(), "😀".encode() * 500_000, "é".encode() * 1_000_000],
    ids=["one emoji at the end", "emojis", "accents"],
)
def test_a_text_as_it_came_costs_no_more_whatever_its_characters(payload, fragments):
    """Taken as bytes, a text needs no more than binary, though its str would be of four bytes a character."""
    with running_server(max_message_size=5_000_000) as server, Peer(server) as peer:
        peer.open("/peak?raw=")
        assert peer.read_message() == "ready"
        for index in range(fragments):
            size = -(-len(payload) // fragments)
            part = payload[index * size : (index + 1) * size]
            head = TEXT if index == 0 else CONTINUATION
            peer.send(frame(head, part, fin=index == fragments - 1, mask=b"\0\0\0\0"))
        length, used = json.loads(peer.read_message())
        assert length == len(payload)
        assert used < 2.5 * len(payload)


#: Takes a message of 50,000 bytes one by one; tells what it took at most, in bytes.
BYTE_BY_BYTE = """
import tracemalloc
from imrelay.websocket.parser import FrameParser
from tests.support.websocket_peer import TEXT, frame

parser = FrameParser(max_size=100_000)
sent = frame(TEXT, b"x" * 50_000)
tracemalloc.start()
events = [event for index in range(len(sent)) for event in parser.parse(sent[index : index + 1])]
print(tracemalloc.get_traced_memory()[1])
assert len(events[0][1]) == 50_000
"""


def test_single_bytes_cost_no_more():
    """A message that comes byte by byte is kept as bytes, not as a list of pieces."""
    used = subprocess.run([sys.executable, "-c", BYTE_BY_BYTE], check=True, capture_output=True, cwd=ROOT).stdout
    assert int(used) < 2.5 * 50_000 + 10_000
