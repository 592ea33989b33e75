"""Properties of the parser: cuts change nothing, and no bytes whatsoever do harm."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imrelay.websocket import FrameError
from imrelay.websocket.deflate import negotiate_deflate
from imrelay.websocket.frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    encode_close,
    encode_frame,
    is_valid_close_code,
    read_close,
)
from imrelay.websocket.parser import FrameParser
from tests.support.websocket_peer import CONTINUATION, Peer, frame, handshake, running_server

#: Drawing a conversation takes a while on a busy machine, and that is no fault of the parser's.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

LIMIT = 1000
masks = st.binary(min_size=4, max_size=4)
controls = st.tuples(st.sampled_from((PING, PONG)), st.binary(max_size=125), masks)


@st.composite
def conversations(draw):
    """Draw what a client may send: its bytes, and the messages and control frames in them."""
    sent, expected = [], []
    for _ in range(draw(st.integers(1, 6))):
        is_text = draw(st.booleans())
        data = draw(st.text(max_size=200)).encode() if is_text else draw(st.binary(max_size=600))
        cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
        edges = [0, *cuts, len(data)]
        for index, (start, end) in enumerate(itertools.pairwise(edges)):
            if index or draw(st.booleans()):
                for opcode, payload, mask in draw(st.lists(controls, max_size=2)):
                    sent.append(frame(opcode, payload, mask=mask))
                    expected.append((opcode, payload))
            opcode = (TEXT if is_text else BINARY) if index == 0 else CONTINUATION
            sent.append(frame(opcode, data[start:end], fin=index == len(edges) - 2, mask=draw(masks)))
        expected.append((TEXT, data.decode()) if is_text else (BINARY, data))
    if draw(st.booleans()):
        payload = draw(st.sampled_from((b"", b"\x03\xe8", b"\x0f\xa0reason")))
        sent += [frame(CLOSE, payload, mask=draw(masks)), draw(st.binary(max_size=20))]
        expected.append((CLOSE, payload))
    return b"".join(sent), expected


def parse(data, cuts=(), *, budget=1 << 30, inflate=None):
    """Return what the parser makes of `data`, cut there, and its failure."""
    parser = FrameParser(max_size=LIMIT, inflate=inflate)
    found = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        events = parser.parse(data[start:end], budget)
        while True:
            assert len(events) <= budget
            for opcode, payload in events:
                assert type(payload) is bytes
                assert len(payload) <= LIMIT
                found.append((opcode, payload.decode() if opcode == TEXT else payload))
            if not parser.has_more:
                break
            events = parser.parse(b"", budget)
    return found, parser.failure


@patient
@given(conversations(), st.lists(st.integers(0, 5000), max_size=20))
def test_any_cut_gives_the_same_messages(conversation, cuts):
    """However a valid stream is cut into reads, the messages and control frames are those that were sent."""
    data, expected = conversation
    assert parse(data, cuts) == (expected, None)


@patient
@given(conversations())
def test_single_bytes_give_the_same_messages(conversation):
    """The finest cut of all is no exception."""
    data, expected = conversation
    assert parse(data, range(len(data))) == (expected, None)


@patient
@given(conversations(), st.integers(1, 5), st.lists(st.integers(0, 5000), max_size=5))
def test_any_budget_gives_the_same_messages(conversation, budget, cuts):
    """A parser that is stopped after some frames goes on where it was."""
    data, expected = conversation
    assert parse(data, cuts, budget=budget) == (expected, None)


@st.composite
def mutations(draw):
    """Draw a stream with some bytes changed, left out, or put in."""
    data = bytearray(draw(conversations())[0])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("change", "leave out", "put in"))):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "leave out":
                del data[at : at + draw(st.integers(1, 8))]
            case "put in":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


@settings(patient, max_examples=300)
@given(st.one_of(mutations(), st.binary(max_size=300)), st.lists(st.integers(0, 5000), max_size=10))
def test_no_bytes_raise_anything_else(data, cuts):
    """Broken streams end with a documented error at most, the same one however they are cut."""
    found, failure = parse(data, cuts)
    if failure is not None:
        assert type(failure) is FrameError
        assert failure.code in (1002, 1007, 1009)
    again, failed_again = parse(data)
    assert again == found
    assert (failed_again and failed_again.code) == (failure and failure.code)


@settings(patient, max_examples=200)
@given(st.one_of(mutations(), st.binary(max_size=300)), st.lists(st.integers(0, 5000), max_size=10))
def test_no_bytes_raise_anything_else_with_compression(data, cuts):
    """The same with permessage-deflate."""
    agreed = negotiate_deflate("permessage-deflate")
    assert agreed is not None
    _, failure = parse(data, cuts, inflate=agreed[1].inflate)
    assert failure is None or failure.code in (1002, 1007, 1009)


@patient
@given(st.sampled_from((TEXT, BINARY, PING, PONG)), st.binary(max_size=70_000))
def test_frames_are_encoded_in_their_shortest_form(opcode, payload):
    """What is encoded is one final, unmasked frame of the shortest length form."""
    encoded = encode_frame(opcode, payload)
    assert encoded == frame(opcode, payload, mask=None)


@patient
@given(st.integers(0, 65535), st.text(max_size=200))
def test_close_frames_say_what_they_are_given(code, reason):
    """Code and reason come back out of an encoded close frame, the reason cut at a character where it must be."""
    encoded = encode_close(code, reason)
    assert len(encoded) <= 127
    if is_valid_close_code(code):
        found, told = read_close(encoded[2:])
        assert found == code
        assert reason.startswith(told) or "\ufffd" in told or "?" in told
        assert told == reason or len(reason.encode("utf-8", "replace")) > 119
    else:
        with pytest.raises(FrameError):
            read_close(encoded[2:])


def test_a_server_survives_noise():
    """Random bytes behind a handshake, valid beginnings among them, end their own socket at most."""
    chance = random.Random(1)
    with running_server(max_message_size=LIMIT, close_timeout=0.2) as server, Peer(server) as bystander:
        bystander.open()
        for _ in range(150):
            noise = chance.randbytes(chance.randrange(1, 200))
            if chance.random() < 0.5:
                noise = frame(chance.choice((TEXT, BINARY, PING, CONTINUATION)), noise[:50]) + noise
            with Peer(server) as peer:
                peer.send(handshake() + noise)
                assert peer.read_answer().status == 101
        bystander.assert_alive()
