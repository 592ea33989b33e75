"""Fairness: no flood of one peer makes another socket's echo wait.

The promise is 50 ms on an idle machine; here, beside everything else that runs, the bound is ten times that. The
measured figures are printed by `scripts/websocket-cost`.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.support.websocket_peer import BINARY, CONTINUATION, PING, PONG, TEXT, Peer, frame

#: Seconds that a bystander's echo may take.
BOUND = 0.5

FLOODS = {
    "small messages": frame(TEXT, b"x") * 10_000,
    "empty messages": frame(BINARY) * 10_000,
    "pings": frame(PING, b"x" * 10) * 5_000,
    "pongs": frame(PONG) * 10_000,
    "empty continuations": frame(TEXT, b"", fin=False) + frame(CONTINUATION, b"", fin=False) * 4000
    + frame(CONTINUATION, b""),
    "the largest messages": frame(TEXT, b"x" * 65536, mask=b"\1\2\3\4") * 4,
    "the largest messages of many bytes a character": frame(TEXT, "中".encode() * 21845) * 4,
}  # fmt: skip

#: Sends its standard input again and again, and reads what comes back, until it is killed.
FLOODER = """
import socket, sys, threading
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
flood = sys.stdin.buffer.read()
def read():
    while sock.recv(1 << 20):
        pass
threading.Thread(target=read, daemon=True).start()
sock.sendall(flood[:int(sys.argv[2])])
print("begun", flush=True)
while True:
    sock.sendall(flood[int(sys.argv[2]):])
"""


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_does_not_keep_others_waiting(server, flood):
    """While one peer floods, the echoes of another come back in time."""
    from tests.support.websocket_peer import handshake

    head = handshake()
    flooder = subprocess.Popen(
        [sys.executable, "-c", FLOODER, str(server.port), str(len(head))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        flooder.stdin.write(head + flood)
        flooder.stdin.close()
        assert flooder.stdout.readline() == b"begun\n"
        with Peer(server) as peer:
            peer.open()
            waits = []
            for number in range(40):
                begun = time.monotonic()
                peer.assert_alive(str(number))
                waits.append(time.monotonic() - begun)
        assert flooder.poll() is None, "the flood ended"
        assert max(waits) < BOUND
    finally:
        flooder.kill()
        flooder.wait()
        flooder.stdout.close()


def test_pipelined_plain_requests_take_turns(server):
    """A client that pipelines plain requests without end does not keep others waiting either."""
    request = b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"
    flooder = subprocess.Popen(
        [sys.executable, "-c", FLOODER, str(server.port), "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        flooder.stdin.write(request * 2000)
        flooder.stdin.close()
        assert flooder.stdout.readline() == b"begun\n"
        with Peer(server) as peer:
            peer.open()
            for number in range(20):
                begun = time.monotonic()
                peer.assert_alive(str(number))
                assert time.monotonic() - begun < BOUND
    finally:
        flooder.kill()
        flooder.wait()
        flooder.stdout.close()
