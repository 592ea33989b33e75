"""The load generator: browsers on raw sockets, messages cut from prepared tapes, each arrival checked.

A pair is a sender and a receiver. All that the sender will ever send is one tape: a few hundred numbered messages,
framed and masked, over and over. What the receiver must get is the same tape as the server frames it, so that a
chunk from the socket is checked by one comparison: that each message came, once, whole, in order. Only a chunk
that is not what the tape says (or a protocol whose frames are not known to the byte) is taken apart.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache

from wires import CLOSE, PING, PONG, PlainWire, frame, message, parse_frame, server_frame

__all__ = ["Client", "LoadError", "Loop", "Meter", "Pair", "closed_loop", "connect", "open_loop", "probe"]

clock = time.perf_counter

#: Bytes taken from a socket at once.
_CHUNK = 65_536
#: Seconds that a server may take to answer a connect, and for what is under way at the end to arrive.
_PATIENCE = 30.0
_DRAIN = 5.0
#: Seconds between two probes of a receiver that has not got one yet.
_PROBE_EVERY = 0.2
_PROBE = b'"content":"probe '
_NUMBER = re.compile(rb'"content":"(\d{8})')


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


class Meter:
    """What came: how many messages, how late, and what was wrong with them."""

    def __init__(self) -> None:
        self.count = 0
        self.is_recording = False
        #: Seconds from sending (open loop: from when it was due) to arrival, while recording.
        self.latencies: list[float] = []
        #: Of the messages: lost, doubled, swapped, damaged.
        self.faults: Counter[str] = Counter()
        #: The first payload that was none of ours.
        self.stranger: bytes | None = None


class Client:
    """One browser: its socket, its login, and what it expects."""

    __slots__ = (
        "_awaited", "_login", "_rest", "_unsent", "at", "is_ready", "loop", "number", "pair", "reached", "socket",
        "user", "wire",
    )  # fmt: skip

    def __init__(self, loop: Loop, wire: PlainWire, address: tuple[str, int], user: str) -> None:
        self.loop, self.wire, self.user = loop, wire, user
        self.pair: Pair | None = None
        #: The receiver's place on the pair's tape (bytes), and the number of the message that it expects next.
        self.at = self.number = 0
        self.is_ready = False
        #: The last probe that came.
        self.reached = b""
        self._rest = b""
        self._unsent = memoryview(b"")
        self._login: Iterator[tuple[bytes | None, bytes]] = iter(wire.login(user))
        self._awaited = b"HTTP/1.1 101"
        self.socket = socket.create_connection(address, timeout=_PATIENCE)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add(self)
        self.send(memoryview(wire.request(user, f"{address[0]}:{address[1]}")))

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
            chunk = self.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as exc:
            raise LoadError(f"{self.user}: {exc.strerror}") from exc
        if not chunk:
            raise LoadError(f"{self.user}: the server closed the connection{self._last_words()}")
        self.receive(chunk)

    def receive(self, chunk: bytes) -> None:
        """Check a chunk against the tape, or take it apart."""
        pair = self.pair
        if pair is not None and pair.expected is not None and not self._rest:
            if pair.expected.startswith(chunk, self.at):
                self._advance(pair, len(chunk))
                return
            begun = self.at % pair.back_size
            self._rest = pair.expected[self.at - begun : self.at]
            self.at -= begun
        self._rest += chunk
        if not self.is_ready and not self._upgraded():
            return
        self._take_apart()

    def close(self) -> None:
        """Leave: a close frame, and the end of the connection."""
        self.loop.remove(self)
        with suppress(OSError):
            self.socket.send(frame(b"\x03\xe8", CLOSE))
        self.socket.close()

    def _advance(self, pair: Pair, size: int) -> None:
        """Go on by so many bytes of the tape."""
        ended = (self.at + size) // pair.back_size - self.at // pair.back_size
        self.at = (self.at + size) % pair.lap
        if ended:
            first, self.number = self.number, (self.number + ended) % pair.count
            pair.arrived(first, ended)

    def _upgraded(self) -> bool:
        """Whether the answer to the upgrade is behind us; what follows it stays in `_rest`."""
        if not self._awaited.startswith(b"HTTP"):
            return True
        head, end, rest = self._rest.partition(b"\r\n\r\n")
        if not end:
            return False
        if not head.startswith(self._awaited):
            raise LoadError(f"{self.user}: no upgrade but {head.splitlines()[0]!r}")
        self._rest = rest
        self._next_login()
        return True

    def _next_login(self) -> None:
        step = next(self._login, None)
        if step is None:
            self.is_ready = True
            return
        data, self._awaited = step
        if data is not None:
            self.send(memoryview(frame(data)))

    def _take_apart(self) -> None:
        """Handle each whole frame of `_rest`."""
        data, at = self._rest, 0
        while (found := parse_frame(data, at)) is not None:
            first, begin, end = found
            opcode = first & 15
            if not first & 128 or opcode == 0:
                raise LoadError(f"{self.user}: a fragmented message, which this generator does not put together")
            payload = data[begin:end]
            if opcode == PING:
                self.send(memoryview(frame(payload, PONG)))
            elif opcode == CLOSE:
                raise LoadError(f"{self.user}: closed by the server with {payload!r}")
            elif not self.is_ready:
                if not payload.startswith(self._awaited):
                    raise LoadError(f"{self.user}: {payload[:200]!r} where {self._awaited!r} was due")
                self._next_login()
            elif opcode != PONG:
                self._take(payload)
            at = end
        self._rest = data[at:]
        pair = self.pair
        if pair is not None and pair.expected is not None:
            self.at = self.number * pair.back_size
            if pair.expected.startswith(self._rest, self.at):
                self.at += len(self._rest)
                self._rest = b""

    def _take(self, payload: bytes) -> None:
        """Handle one payload: a message, a probe, or the protocol's own business."""
        content = self.wire.unwrap(payload)
        if content is None:
            if answer := self.wire.reply(payload):
                self.send(memoryview(frame(answer)))
        elif _PROBE in content:
            self.reached = content
        elif self.pair is not None:
            self.pair.check(self, content)

    def _last_words(self) -> str:
        return f" after {self._rest[:200]!r}" if self._rest else ""


@lru_cache(maxsize=1024)
def _tapes(
    wire: PlainWire, sender: str, to: str, size: int, count: int
) -> tuple[list[bytes], bytes, bytes | None]:
    """Return the messages of one lap, two laps of what is sent, and two of what comes back (None: not known)."""
    messages = [message(sender, to, f"{number:08d}", size) for number in range(count)]
    out = b"".join(frame(wire.wrap(one, to)) for one in messages)
    if not wire.is_fixed:
        return messages, out * 2, None
    # A chunk may begin anywhere in the first lap: whatever is taken at once must end on the tape.
    back = b"".join(server_frame(wire.wrap_back(one)) for one in messages)
    return messages, out * 2, back * (2 + _CHUNK // len(back))


class Pair:
    """A sender and a receiver with `window` messages under way, or with as many as `send` is told to."""

    def __init__(self, meter: Meter, sender: Client, receiver: Client, size: int, window: int, count: int) -> None:
        self.meter, self.sender, self.receiver = meter, sender, receiver
        self.window = window
        #: The numbers go round: no more than half of them may ever be under way.
        self.count = count
        self.messages, out, self.expected = _tapes(sender.wire, sender.user, receiver.user, size, count)
        self._out = memoryview(out)
        self._out_size = len(out) // 2 // count
        #: Bytes of one message as it comes back, and of one lap of the tape.
        self.back_size = len(server_frame(sender.wire.wrap_back(self.messages[0]))) if self.expected else 0
        self.lap = self.back_size * count
        self.sent = self.came = 0
        self.is_open = True
        self._next = 0
        self._stamps = [0.0] * count
        self._missing: set[int] = set()
        receiver.pair = self
        receiver.at = receiver.number = 0

    def send(self, count: int, due: float | None = None) -> None:
        """Send the next `count` messages; their latency counts from `due`, if given, else from now."""
        first = self._next
        begin = first * self._out_size
        stamp = clock() if due is None else due
        if first + count <= self.count:
            self._stamps[first : first + count] = [stamp] * count
        else:
            for number in range(first, first + count):
                self._stamps[number % self.count] = stamp
        self._next = (first + count) % self.count
        self.sent += count
        self.sender.send(self._out[begin : begin + count * self._out_size])

    def arrived(self, first: int, count: int) -> None:
        """Count messages that came in order, and send as many again while the window is open."""
        meter = self.meter
        meter.count += count
        self.came += count
        if meter.is_recording:
            now = clock()
            if first + count <= self.count:
                meter.latencies += [now - stamp for stamp in self._stamps[first : first + count]]
            else:
                meter.latencies += [now - self._stamps[n % self.count] for n in range(first, first + count)]
        if self.window and self.is_open:
            self.send(count)

    def check(self, receiver: Client, content: bytes) -> None:
        """Tell what a message is that was taken apart: the next one, or one lost, doubled, swapped, damaged."""
        due = receiver.number
        if content == self.messages[due]:
            receiver.number = (due + 1) % self.count
            self.arrived(due, 1)
            return
        faults = self.meter.faults
        found = _NUMBER.search(content)
        number = int(found[1]) if found else self.count
        if number >= self.count or content != self.messages[number]:
            faults["damaged"] += 1
            self.meter.stranger = self.meter.stranger or content[:200]
        elif (number - due) % self.count <= self.count // 2:
            # Ahead of its time: those between are missing until they come.
            self._missing.update(n % self.count for n in range(due, due + (number - due) % self.count))
            receiver.number = (number + 1) % self.count
            self.arrived(number, 1)
        elif number in self._missing:
            self._missing.remove(number)
            faults["swapped"] += 1
            self.arrived(number, 1)
        else:
            faults["doubled"] += 1

    def finish(self) -> None:
        """Count as lost what was sent and never came."""
        if self.sent > self.came:
            self.meter.faults["lost"] += self.sent - self.came
        self.receiver.pair = None


def connect(
    loop: Loop, wire: PlainWire, address: tuple[str, int], users: Sequence[str], at_once: int = 64
) -> list[Client]:
    """Connect all users, `at_once` at a time, and return them when each is logged in."""
    clients: list[Client] = []
    waiting: list[Client] = []
    progress = clock()
    for user in users:
        clients.append(Client(loop, wire, address, user))
        waiting.append(clients[-1])
        while len(waiting) >= at_once:
            loop.turn(0.05)
            left = [client for client in waiting if not client.is_ready]
            if len(left) < len(waiting):
                waiting, progress = left, clock()
            elif clock() - progress > _PATIENCE:
                raise LoadError(f"{waiting[0].user}: no answer within {_PATIENCE:g} s")
    if not loop.run(clock() + _PATIENCE, lambda: all(client.is_ready for client in waiting)):
        raise LoadError(f"no answer to the last connects within {_PATIENCE:g} s")
    return clients


def probe(loop: Loop, pairs: Sequence[tuple[Client, Client]]) -> None:
    """Return when a new message from each sender has reached its receiver.

    Whatever waited in an inbox is before it, so it is gone then; and a server that answers an upgrade before its
    queue is bound has bound it.
    """
    nonce = time.time_ns()
    waiting = [
        (sender, receiver, message(sender.user, receiver.user, f"probe {nonce}")) for sender, receiver in pairs
    ]

    def missing() -> list[tuple[Client, Client, bytes]]:
        return [one for one in waiting if one[1].reached != one[2]]

    until = clock() + _PATIENCE
    while waiting:
        if clock() > until:
            raise LoadError(f"nothing reaches {waiting[0][1].user}")
        for sender, receiver, text in waiting:
            sender.send(memoryview(frame(sender.wire.wrap(text, receiver.user))))
        loop.run(clock() + _PROBE_EVERY, lambda: not missing())
        waiting = missing()


def closed_loop(
    loop: Loop,
    pairs: Sequence[Pair],
    *,
    warm: float,
    seconds: float,
    mark: Callable[[], None],
    drain: float = _DRAIN,
) -> None:
    """Keep each pair's window full; call `mark` when the measurement begins and when it ends."""
    for pair in pairs:
        pair.send(pair.window)
    _drive(loop, pairs, loop.run, warm, seconds, mark, drain)


def open_loop(
    loop: Loop, pairs: Sequence[Pair], *, rate: float, warm: float, seconds: float, mark: Callable[[], None]
) -> None:
    """Send `rate` messages a second at even distances, the pairs in turn, whatever comes back or doesn't."""
    due, turn = clock(), 0

    def run(until: float) -> None:
        nonlocal due, turn
        while (now := clock()) < until:
            while due <= now:
                pairs[turn % len(pairs)].send(1, due)
                due += 1 / rate
                turn += 1
            loop.turn(max(0.0, min(due, until) - clock()))

    _drive(loop, pairs, run, warm, seconds, mark, _DRAIN)


def _drive(
    loop: Loop,
    pairs: Sequence[Pair],
    run: Callable[[float], object],
    warm: float,
    seconds: float,
    mark: Callable[[], None],
    drain: float,
) -> None:
    """Run warm-up, measurement and drain; see `closed_loop`."""
    meter = pairs[0].meter
    run(clock() + warm)
    meter.is_recording = True
    mark()
    run(clock() + seconds)
    mark()
    meter.is_recording = False
    for pair in pairs:
        pair.is_open = False
    loop.run(clock() + drain, lambda: all(pair.came >= pair.sent for pair in pairs))
    # A message that comes twice may come a little later than the first time.
    loop.run(clock() + 0.05)
    for pair in pairs:
        pair.finish()
