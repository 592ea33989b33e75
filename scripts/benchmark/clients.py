"""Browsers on raw sockets in one event loop: connect, log in, check what comes by the chunk."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from benchmark.client_frames import CLOSE, PING, PONG, frame, parse_frame
from benchmark.protocols import PlainProtocol

if TYPE_CHECKING:
    from benchmark.pairs import Pair

__all__ = ["CHUNK", "PATIENCE", "PROBE", "Client", "LoadError", "Loop", "clock"]

clock = time.perf_counter

#: Bytes taken from a socket at once.
CHUNK = 65_536
#: Seconds that a server may take to answer a connect.
PATIENCE = 30.0
#: In the content of a message that only asks whether messages arrive.
PROBE = b'"content":"probe '


class LoadError(Exception):
    """The server did what makes a measurement impossible: refused, closed, never answered."""


class Loop:
    """Waits for many sockets. Made before them, so that its own descriptor is small enough for `select`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._clients: dict[int, Client] = {}

    def add(self, client: Client) -> None:
        """Begin to tell a client when it may read."""
        fd = client.socket.fileno()
        self._clients[fd] = client
        self._epoll.register(fd, select.EPOLLIN)

    def want_write(self, client: Client, wanted: bool) -> None:
        """Begin or cease to tell a client when it may write."""
        self._epoll.modify(client.socket.fileno(), select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def remove(self, client: Client) -> None:
        """Forget a client before its socket is closed."""
        fd = client.socket.fileno()
        if self._clients.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def turn(self, seconds: float) -> None:
        """Handle what is ready; wait at most `seconds` for something (to the microsecond)."""
        if seconds > 0:
            select.select([self._epoll], [], [], seconds)
        for fd, events in self._epoll.poll(0):
            client = self._clients.get(fd)
            if client is None:
                continue
            if events & select.EPOLLOUT:
                client.flush()
            if events & ~select.EPOLLOUT:
                client.read()

    def run(self, until: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Turn until that time, or until it is `enough`; return whether it was."""
        while not enough():
            left = until - clock()
            if left <= 0:
                return False
            self.turn(min(left, 0.05))
        return True

    def close(self) -> None:
        """Close all clients."""
        for client in list(self._clients.values()):
            client.close()
        self._epoll.close()


class Client:
    """One browser: its socket, its login, and what it expects."""

    __slots__ = (
        "_awaited", "_is_upgraded", "_login", "_rest", "_unsent", "at", "incoming", "is_ready", "loop", "number",
        "outgoing", "protocol", "reached", "socket", "user",
    )  # fmt: skip

    def __init__(self, loop: Loop, protocol: PlainProtocol, address: tuple[str, int], user: str) -> None:
        self.loop, self.protocol, self.user = loop, protocol, user
        #: The pairs in which it is the receiver and the sender.
        self.incoming: Pair | None = None
        self.outgoing: Pair | None = None
        #: The receiver's place in the pair's cycle (bytes), and the number of the message that it expects next.
        self.at = self.number = 0
        self.is_ready = False
        #: The last probe that came.
        self.reached = b""
        self._rest = b""
        self._unsent = memoryview(b"")
        self._login: Iterator[tuple[bytes | None, tuple[bytes, ...]]] = iter(protocol.login(user))
        self._awaited: tuple[bytes, ...] = ()
        self._is_upgraded = False
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add(self)
        self.send(memoryview(protocol.request(user, f"{address[0]}:{address[1]}")))

    def send(self, data: memoryview) -> None:
        """Send now what the socket takes, and the rest as it goes."""
        if self._unsent:
            self._unsent = memoryview(bytes(self._unsent) + data)
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            raise LoadError(f"{self.user}: {exc.strerror}") from exc
        if sent < len(data):
            self._unsent = data[sent:]
            self.loop.want_write(self, True)

    def flush(self) -> None:
        """Send more of what had to wait."""
        data, self._unsent = self._unsent, memoryview(b"")
        self.send(data)
        if not self._unsent:
            self.loop.want_write(self, False)

    def read(self) -> None:
        """Take what has come."""
        try:
            chunk = self.socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as exc:
            raise LoadError(f"{self.user}: {exc.strerror}") from exc
        if not chunk:
            said = f" after {self._rest[:200]!r}" if self._rest else ""
            raise LoadError(f"{self.user}: the server closed the connection{said}")
        self.receive(chunk)

    def receive(self, chunk: bytes) -> None:
        """Compare a chunk with the pair's cycle, or take it apart."""
        pair = self.incoming
        if pair is not None and pair.expected is not None and not self._rest:
            if pair.expected.startswith(chunk, self.at):
                self._advance(pair, len(chunk))
                return
            begun = self.at % pair.back_size
            self._rest = pair.expected[self.at - begun : self.at]
            self.at -= begun
        self._rest += chunk
        if self._is_upgraded or self._upgrade():
            self._take_apart()

    def close(self) -> None:
        """Leave: a close frame, and the end of the connection."""
        self.loop.remove(self)
        with suppress(OSError):
            self.socket.send(frame(b"\x03\xe8", CLOSE))
        self.socket.close()

    def _advance(self, pair: Pair, size: int) -> None:
        """Go on by so many bytes of the cycle."""
        ended = (self.at + size) // pair.back_size - self.at // pair.back_size
        self.at = (self.at + size) % pair.cycle
        if ended:
            first, self.number = self.number, (self.number + ended) % pair.count
            pair.arrived(first, ended)
            pair.refill()

    def _upgrade(self) -> bool:
        """Read the answer to the upgrade; return whether it is whole. What follows it stays in `_rest`."""
        head, end, rest = self._rest.partition(b"\r\n\r\n")
        if not end:
            return False
        if not head.startswith(b"HTTP/1.1 101"):
            raise LoadError(f"{self.user}: no upgrade but {head.splitlines()[0]!r}")
        self._rest = rest
        self._is_upgraded = True
        self._next_login()
        return True

    def _next_login(self) -> None:
        step = next(self._login, None)
        if step is None:
            self.is_ready = True
            return
        data, self._awaited = step
        if data is not None:
            self.send(memoryview(frame(data, self.protocol.opcode)))

    def _take_apart(self) -> None:
        """Handle each whole frame of `_rest`."""
        data, at = self._rest, 0
        replies: list[bytes] = []
        while (found := parse_frame(data, at)) is not None:
            first, begin, at = found
            self._take_frame(first, data[begin:at], replies)
        self._rest = data[at:]
        if replies:
            self.send(memoryview(b"".join(replies)))
        if self.outgoing is not None:
            self.outgoing.refill()
        if (pair := self.incoming) is None:
            return
        pair.refill()
        if pair.expected is not None:
            self.at = self.number * pair.back_size
            if pair.expected.startswith(self._rest, self.at):
                self.at += len(self._rest)
                self._rest = b""

    def _take_frame(self, first: int, payload: bytes, replies: list[bytes]) -> None:
        """Handle one frame; what has to be sent for it is added to `replies`."""
        opcode = first & 15
        if not first & 128 or opcode == 0:
            raise LoadError(f"{self.user}: a fragmented message, which this generator does not put together")
        if opcode == PING:
            replies.append(frame(payload, PONG))
        elif opcode == CLOSE:
            raise LoadError(f"{self.user}: closed by the server with {payload!r}")
        elif opcode != PONG:
            try:
                packets = self.protocol.packets(payload)
            except ValueError as exc:
                raise LoadError(f"{self.user}: {exc}") from exc
            for packet in packets:
                if reply := self.protocol.reply(packet):
                    replies.append(frame(reply, self.protocol.opcode))
                self._take(packet, has_reply=bool(reply))

    def _take(self, packet: bytes, *, has_reply: bool) -> None:
        """Handle one packet: of the login, an answer, a message, a probe, or the protocol's own business."""
        if not self.is_ready:
            if packet.startswith(self._awaited):
                self._next_login()
            elif not has_reply:  # else a message that waited, or a question whether the client is there
                raise LoadError(f"{self.user}: {packet[:200]!r} where {self._awaited[0]!r} was due")
            return
        if (number := self.protocol.answered(packet)) is not None:
            if self.outgoing is not None:
                self.outgoing.answered(number)
            return
        content = self.protocol.unwrap(packet)
        if content is None:
            return
        if PROBE in content:
            self.reached = content
        elif self.incoming is not None:
            self.incoming.check(self, content)
        elif self.outgoing is not None:
            self.outgoing.refused(content)
