"""One writer: frames never mix, whoever sends; what waits for a slow peer is bounded in bytes and in time."""

from __future__ import annotations

import collections

import pytest

from tests.support.websocket_peer import BINARY, PING, PONG, TEXT, Peer, close_frame, frame, running_server

#: More than the kernel keeps for one connection, on both sides.
HUGE = 32 << 20


#: Settings of the server.
SERVER = {"max_send_buffer": 1 << 20, "send_timeout": 0.5, "close_timeout": 0.5}


@pytest.fixture(scope="module")
def patient():
    with running_server(max_send_buffer=1 << 20, send_timeout=60.0) as server:
        yield server


@pytest.mark.parametrize(("size", "count"), [(10, 300), (100_000, 6)])
def test_frames_of_many_greenlets_do_not_mix(patient, size, count):
    """Messages of greenlets that send at once, and pongs between them, arrive whole and in each one's order."""
    with Peer(patient, receive_buffer=8192) as peer:
        peer.open(f"/send-in-parts?size={size}&count={count}&greenlets=8")
        peer.send(b"".join(frame(PING, b"%d" % number) for number in range(50)))
        seen = collections.defaultdict(list)
        pongs = []
        while sum(map(len, seen.values())) < 8 * count:
            opcode, payload, bits = peer.read_frame()
            assert bits == 8
            if opcode == PONG:
                pongs.append(int(payload))
                continue
            assert opcode == TEXT
            number, index, body = payload.decode().split(":")
            assert body == chr(97 + int(number)) * size
            seen[number].append(int(index))
        assert all(indices == list(range(count)) for indices in seen.values())
        assert pongs == sorted(pongs)
        peer.send(frame(TEXT, b"done"))
        while (found := peer.read_frame())[0] == PONG:
            pongs.append(int(found[1]))
        assert found[1] == b"done"
        assert pongs[-1] == 49


def test_several_messages_in_one_write(server):
    """`send_messages` keeps order and kind; an empty list sends nothing."""
    with Peer(server) as peer:
        peer.open("/send-batches")
        assert [peer.read_message() for _ in range(3)] == ["one", b"\x00two", "drei €"]
        peer.assert_alive()


def test_a_peer_that_does_not_read_is_ended_with_4408(server):
    """Bytes that wait longer than `send_timeout` end the socket; a blocked sender and receiver are woken."""
    with Peer(server, receive_buffer=4096) as peer, Peer(server) as other:
        peer.open("/send-big?size=100000&name=slow")
        other.open()
        received, sender = server.await_report("senders:slow")
        assert received is None
        assert sender == "4408 too slow: bytes waited longer than 0.5 s"
        assert server.await_report("end:slow")[0] == 4408
        other.assert_alive()


def test_too_many_waiting_bytes_end_the_socket_with_4408(patient):
    """More than `max_send_buffer` behind the write under way ends the socket at once, for all its senders."""
    with Peer(patient, receive_buffer=4096) as peer, Peer(patient) as other:
        peer.open("/send-big?size=100000&greenlets=13&name=full")
        other.open()
        received, *senders = patient.await_report("senders:full")
        assert received is None
        assert set(senders) == {"4408 too slow: more than 1048576 bytes wait to be sent"}
        other.assert_alive()


def test_one_message_over_the_buffer_can_be_sent(patient):
    """A message larger than `max_send_buffer` reaches a peer that reads, and others may wait behind it."""
    with Peer(patient, receive_buffer=65536) as peer:
        peer.open(f"/send-big?size={HUGE}&once&name=huge")
        opcode, payload, _ = peer.read_frame()
        assert (opcode, len(payload)) == (BINARY, HUGE)
        peer.send(close_frame(1000))
        assert patient.await_report("senders:huge") == [None, "sent"]


def test_a_second_message_over_the_buffer_is_too_much(patient):
    """While one message larger than `max_send_buffer` waits, another one of that kind ends the socket."""
    with Peer(patient, receive_buffer=65536) as peer:
        peer.open(f"/send-big?size={HUGE}&once&greenlets=2&name=two")
        assert {sender[:4] for sender in patient.await_report("senders:two")[1:]} == {"4408"}


def test_a_pong_may_wait_behind_a_huge_message(patient):
    """Control frames do not count as too much while one huge message is under way; the latest ping is answered."""
    with Peer(patient, receive_buffer=65536) as peer:
        peer.open(f"/send-big?size={HUGE}&once&name=pong")
        peer.take(100)  # it is under way
        peer.send(b"".join(frame(PING, b"%d" % number) for number in range(2000)))
        peer.take(HUGE + 10 - 100)
        opcode, payload, _ = peer.read_frame()
        while payload != b"1999":
            opcode, payload, _ = peer.read_frame()
        assert opcode == PONG


def test_a_trickle_does_not_hold_a_huge_message_for_ever(server):
    """A peer that takes a little now and then is ended when the whole message has had its time."""
    with Peer(server, receive_buffer=4096) as peer:
        # 4 MiB with a buffer of 1 MiB: four times `send_timeout`, though each has its progress
        peer.open(f"/send-big?size={4 << 20}&greenlets=2&name=trickle")
        peer.sock.settimeout(0.05)
        left = False
        while not left:
            try:
                left = not peer.sock.recv(2048)
            except TimeoutError:
                continue
            except ConnectionResetError:
                left = True
        assert all(sender.startswith("4408") for sender in server.await_report("senders:trickle")[1:])


def test_a_slow_reader_that_keeps_up_stays(server):
    """A peer that takes everything within the time stays, whatever has to wait for it meanwhile."""
    with Peer(server, receive_buffer=65536) as peer:
        peer.open("/send-in-parts?size=500000&count=4&greenlets=2")
        for _ in range(8):
            assert len(peer.read_message()) > 500_000
        peer.assert_alive()


def test_a_flood_of_pings_to_a_peer_that_does_not_read_is_bounded(server):
    """Pongs that wait are replaced by the latest: a peer that only pings is ended as slow, not fed memory."""
    with Peer(server, receive_buffer=4096) as peer:
        peer.open("/echo?name=pings")
        pings = frame(PING, b"x" * 125) * 500
        peer.send_until_refused(pings)
        assert server.await_report("end:pings")[0] == 4408
