"""Clients that do harm with plain HTTP: they send without end, or hold connections and say nothing."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import ExitStack, suppress
from typing import Any

from tests.support.websocket_peer import PATIENCE, Peer

__all__ = ["Flood", "hold", "wait_for_reset"]

#: Seconds that a flood waits for the kernel to take a block, before it begins anew.
_PAUSE = 0.5


class Flood:
    """Sends `head` and then `block` again and again, and never reads; begins anew whenever it is cut off."""

    def __init__(self, port: int, head: bytes, block: bytes) -> None:
        self._port = port
        self._head = head
        self._block = block
        self._over = threading.Event()
        self._moved = threading.Condition()
        #: How often something was taken from it: a connection, or a block.
        self.progress = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE)

    def wait_for_more(self) -> None:
        """Wait until the flood has got on: it is not over."""
        with self._moved:
            seen = self.progress
            assert self._moved.wait_for(lambda: self.progress > seen, PATIENCE), "the flood has run dry"

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), _PAUSE) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
                self._step()
                sock.sendall(self._head)
                while not self._over.is_set():
                    sock.sendall(self._block)
                    self._step()

    def _step(self) -> None:
        with self._moved:
            self.progress += 1
            self._moved.notify_all()


def hold(stack: ExitStack, server: Any, count: int, data: bytes = b"") -> list[Peer]:
    """Open so many connections, send the same on each, and keep them until the stack is left."""
    peers = [stack.enter_context(Peer(server)) for _ in range(count)]
    for peer in peers:
        peer.send(data)
    return peers


def wait_for_reset(peer: Peer) -> None:
    """Wait, without reading anything, until the other side has reset the connection."""
    poll = select.poll()
    poll.register(peer.sock, select.POLLERR | select.POLLHUP)
    assert poll.poll(PATIENCE * 1000), "it is still open"
