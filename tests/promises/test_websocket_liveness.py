"""Liveness: the server pings, a peer that does not answer is gone in time, and pings of the peer never wait."""

from __future__ import annotations

import time

import pytest

from tests.support.websocket_peer import CONTINUATION, PING, PONG, TEXT, Peer, close_frame, frame, running_server

#: Settings of the server.
SERVER = {"ping_interval": 0.3, "ping_timeout": 0.4, "close_timeout": 0.5}


@pytest.fixture(scope="module")
def silent():
    with running_server(ping_interval=0, ping_timeout=0.2) as server:
        yield server


def test_an_idle_socket_is_pinged_and_stays_while_it_answers(server):
    """Ping after ping comes, each with another payload, and a peer that answers them stays open."""
    with Peer(server) as peer:
        peer.open()
        payloads = []
        for _ in range(4):
            opcode, payload, _ = peer.read_frame()
            assert opcode == PING
            payloads.append(payload)
            peer.send(frame(PONG, payload))
        assert len(set(payloads)) == 4
        peer.assert_alive()


def test_a_half_open_peer_is_gone_in_time(server):
    """A peer that answers nothing is left after ping_interval + ping_timeout, and the application told 1006."""
    with Peer(server) as peer:
        peer.open("/echo?name=half-open")
        begun = time.monotonic()
        code, reason = server.await_report("end:half-open")
        took = time.monotonic() - begun
        assert (code, reason) == (1006, "no pong within 0.4 s")
        assert 0.6 <= took < 3.0  # generous: what is wrong here is "never"


@pytest.mark.parametrize("answer", [frame(PONG, b"else"), frame(PONG), frame(TEXT, b"hello"), b"\x81"])
def test_only_the_pong_itself_counts(server, answer):
    """A pong of another payload, a small message, or a frame that never gets on, is no answer to the ping."""
    with Peer(server) as peer:
        name = f"wrong{hash(answer) & 0xFFFF}"
        peer.open(f"/echo?name={name}")
        while peer.read_frame()[0] != PING:
            pass
        peer.send(answer)
        assert b"\x89\x04" not in peer.read_to_end(), "pinged again, so the first ping counts as answered"
        assert server.await_report(f"end:{name}") == [1006, "no pong within 0.4 s"]


def test_a_large_message_on_its_way_counts_as_life(server):
    """A peer that cannot send its pong because of the large frame it is sending is not taken for dead."""
    message = frame(TEXT, b"x" * 60_000)
    with Peer(server) as peer, Peer(server) as clock:
        peer.open()
        clock.open()
        for number in range(5):  # four pings of another socket: longer than interval and timeout together
            peer.send(message[number * 12_000 : (number + 1) * 12_000])
            if number < 4:
                opcode, payload, _ = clock.read_frame()
                assert opcode == PING
                clock.send(frame(PONG, payload))
        peer.send(message[60_000:])
        opcode, payload, _ = peer.read_frame()
        while opcode == PING:
            peer.send(frame(PONG, payload))
            opcode, payload, _ = peer.read_frame()
        assert (opcode, len(payload)) == (TEXT, 60_000)


def test_pings_are_answered_while_the_application_is_busy(server):
    """An application that is blocked elsewhere keeps no ping of the peer waiting, fragments or not."""
    with Peer(server) as peer:
        peer.open("/busy?name=busy")
        peer.send(frame(TEXT, b"taken") + frame(PING, b"one"))
        assert peer.read_frame() == (PONG, b"one", 8)
        peer.send(frame(TEXT, b"wait", fin=False) + frame(PING, b"two") + frame(CONTINUATION, b"ing"))
        assert peer.read_frame() == (PONG, b"two", 8)
        server.get("/go?go:busy")
        found = peer.read_frame()
        while found[0] == PING:
            peer.send(frame(PONG, found[1]))
            found = peer.read_frame()
        assert found[1] == b"waiting"


def test_a_busy_application_does_not_make_its_peer_look_dead(server):
    """While nothing is read because too many messages wait, an unread pong is not missed; none of them is lost."""
    with Peer(server) as peer:
        peer.open("/busy?name=full")
        peer.send(b"".join(frame(TEXT, b"%d" % number) for number in range(500)))
        opcode, payload, _ = peer.read_frame()
        assert opcode == PING
        peer.send(frame(PONG, payload))
        with Peer(server) as clock:  # its end shows that every deadline has passed by far
            clock.open("/echo?name=clock")
            server.await_report("end:clock")
        server.get("/go?go:full")
        expected = 1  # the first was taken
        while expected < 500:
            opcode, payload, _ = peer.read_frame()
            if opcode == PING:
                peer.send(frame(PONG, payload))
            else:
                assert int(payload) == expected
                expected += 1
        peer.send(close_frame(1000))


def test_an_interval_of_zero_sends_no_pings(silent, server):
    """With `ping_interval = 0` an idle peer is neither pinged nor dropped."""
    with Peer(silent) as peer, Peer(server) as clock:
        peer.open()
        clock.open("/echo?name=silence")
        server.await_report("end:silence")
        peer.assert_alive()  # the echo is the first frame
