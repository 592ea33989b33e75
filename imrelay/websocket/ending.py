"""Ending a connection of plain HTTP so that its answer arrives: closing with unread input would reset it."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import gevent

from imrelay.websocket.fairness import yield_turn

__all__ = ["linger", "reset", "turn_away"]

#: Seconds and bytes for which input is drained after an answer.
LINGER_SECONDS, LINGER_BYTES = 1.0, 262_144


def linger(sock: Any) -> None:
    """Send FIN and drain what still comes."""
    sock.settimeout(LINGER_SECONDS)
    deadline = gevent.Timeout.start_new(LINGER_SECONDS)
    try:
        sock.shutdown(socket.SHUT_WR)
        left = LINGER_BYTES
        while left > 0:
            data = sock.recv(16_384)
            if not data:
                break
            left -= len(data)
            yield_turn()
    except OSError:
        pass  # the peer is gone, or slow
    except gevent.Timeout as timeout:
        if timeout is not deadline:
            raise
    finally:
        deadline.close()


def turn_away(sock: Any, answer: bytes) -> None:
    """Send an answer as far as the kernel takes it, and close; does not block."""
    try:
        sock.settimeout(0.0)
        sock.send(answer)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(16_384)
    except OSError:
        pass  # the peer is gone, or has sent nothing
    finally:
        sock.close()


def reset(sock: Any) -> None:
    """Have the kernel forget, at the close that follows, what it still holds for a peer that does not read."""
    with contextlib.suppress(OSError):  # the connection is gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
