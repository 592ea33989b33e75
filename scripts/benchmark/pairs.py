"""Senders and receivers in pairs: what is sent, what has to come of it, and what was wrong.

All that a sender will ever send is one cycle of a few hundred numbered messages, framed and masked, over and over.
What the receiver must get is the same cycle as the server frames it, so that a chunk from the socket is checked by
one comparison: that each message came, once, whole, in order. Only a chunk that is not what the cycle says (or a
protocol whose frames are not known to the byte) is taken apart. Where the server answers, each message has an
`id`, and it is in flight until it has arrived *and* its sender has the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from benchmark.client_frames import frame, server_frame
from benchmark.clients import CHUNK, Client, clock
from benchmark.protocols import PlainProtocol, message

__all__ = ["Meter", "Pair"]

_NUMBER = re.compile(rb'"content":"(\d{8})')


class Meter:
    """What came: how many messages, how late, and what was wrong with them."""

    def __init__(self) -> None:
        self.count = 0
        self.is_recording = False
        #: Seconds from sending (open loop: from when it was due) to arrival, while recording.
        self.latencies: list[float] = []
        #: Messages lost, doubled, swapped, damaged; unanswered, answered twice, refused.
        self.faults: Counter[str] = Counter()
        #: The first payload that was none of ours.
        self.stranger: bytes | None = None


@lru_cache(maxsize=1024)
def _cycle(
    protocol: PlainProtocol, sender: str, to: str, size: int, count: int
) -> tuple[list[bytes], bytes, bytes | None]:
    """Return the messages of a cycle, two cycles of what is sent, more of what comes back (None: not known)."""
    asks = protocol.answers
    messages = [message(sender, to, f"{n:08d}", size, n if asks else None) for n in range(count)]
    out = b"".join(frame(protocol.wrap(one, to, n), protocol.opcode) for n, one in enumerate(messages))
    if not protocol.is_fixed:
        return messages, out * 2, None
    # A chunk may begin anywhere in the first cycle: whatever is taken at once must end on these bytes.
    back = b"".join(server_frame(protocol.wrap_back(one)) for one in messages)
    return messages, out * 2, back * (2 + CHUNK // len(back))


class Pair:
    """A sender and a receiver with `window` messages in flight, or with as many as `send` is told to."""

    def __init__(self, meter: Meter, sender: Client, receiver: Client, size: int, window: int, count: int) -> None:
        self.meter, self.sender, self.receiver = meter, sender, receiver
        self.window = window
        #: The numbers go round: no more than half of them may ever be in flight.
        self.count = count
        protocol = sender.protocol
        self._messages, out, self.expected = _cycle(protocol, sender.user, receiver.user, size, count)
        self._out = memoryview(out)
        self._out_size = len(out) // 2 // count
        #: Bytes of one message as it comes back, and of one cycle.
        self.back_size = len(server_frame(protocol.wrap_back(self._messages[0]))) if self.expected else 0
        self.cycle = self.back_size * count
        self.sent = self.came = self.kept = 0
        self.is_open = True
        self._refilled = self._next = 0
        self._stamps = [0.0] * count
        self._missing: set[int] = set()
        #: By number: 1 while the sender has no answer.
        self._unanswered = bytearray(count)
        receiver.incoming, sender.outgoing = self, self
        receiver.at = receiver.number = 0

    @property
    def is_done(self) -> bool:
        """Whether all that was sent has arrived and, where the server answers, was answered."""
        return min(self.came, self.kept if self.sender.protocol.answers else self.came) >= self.sent

    def send(self, count: int, due: float | None = None) -> None:
        """Send the next `count` messages; their latency counts from `due`, if given, else from now."""
        first = self._next
        begin = first * self._out_size
        stamp = clock() if due is None else due
        for number in range(first, first + count):
            self._stamps[number % self.count] = stamp
            self._unanswered[number % self.count] = 1
        self._next = (first + count) % self.count
        self.sent += count
        self.sender.send(self._out[begin : begin + count * self._out_size])

    def refill(self) -> None:
        """Send as many messages as are no longer in flight, while the window is open."""
        if not (self.window and self.is_open):
            return
        done = min(self.came, self.kept) if self.sender.protocol.answers else self.came
        if done > self._refilled:
            free, self._refilled = done - self._refilled, done
            self.send(free)

    def arrived(self, first: int, count: int) -> None:
        """Count messages that came in order."""
        meter = self.meter
        meter.count += count
        self.came += count
        if meter.is_recording:
            now = clock()
            meter.latencies += [now - self._stamps[n % self.count] for n in range(first, first + count)]

    def answered(self, number: int) -> None:
        """Count the answer to a message."""
        if number < self.count and self._unanswered[number]:
            self._unanswered[number] = 0
            self.kept += 1
        else:
            self.meter.faults["answered twice"] += 1

    def refused(self, content: bytes) -> None:
        """Count what the sender got that is no answer: an error."""
        self.meter.faults["refused"] += 1
        self.meter.stranger = self.meter.stranger or content[:200]

    def check(self, receiver: Client, content: bytes) -> None:
        """Tell what a message is that was taken apart: the next one, or one lost, doubled, swapped, damaged."""
        due = receiver.number
        if content == self._messages[due]:
            receiver.number = (due + 1) % self.count
            self.arrived(due, 1)
            return
        faults = self.meter.faults
        found = _NUMBER.search(content)
        number = int(found[1]) if found else self.count
        if number >= self.count or content != self._messages[number]:
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
        """Count as lost or unanswered what was sent and never came or was never answered."""
        if self.sent > self.came:
            self.meter.faults["lost"] += self.sent - self.came
        if self.sender.protocol.answers and self.sent > self.kept:
            self.meter.faults["unanswered"] += self.sent - self.kept
        self.receiver.incoming = self.sender.outgoing = None
