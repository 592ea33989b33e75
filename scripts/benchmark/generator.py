"""The load generator: connects browsers, sends in a closed loop (so many in flight) or an open one (a rate)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from benchmark.client_frames import frame
from benchmark.clients import PATIENCE, Client, LoadError, Loop, clock
from benchmark.pairs import Pair
from benchmark.protocols import PlainProtocol, message

__all__ = ["closed_loop", "connect", "open_loop", "probe"]

#: Seconds for what is in flight at the end to arrive.
_DRAIN = 5.0
#: Seconds between two probes of a receiver that has not got one yet.
_PROBE_EVERY = 0.2


def connect(
    loop: Loop, protocol: PlainProtocol, address: tuple[str, int], users: Sequence[str], at_once: int = 64
) -> list[Client]:
    """Connect all users, `at_once` at a time, and return them when each is logged in."""
    clients: list[Client] = []
    waiting: list[Client] = []
    progress = clock()
    for user in users:
        clients.append(Client(loop, protocol, address, user))
        waiting.append(clients[-1])
        while len(waiting) >= at_once:
            loop.turn(0.05)
            left = [client for client in waiting if not client.is_ready]
            if len(left) < len(waiting):
                waiting, progress = left, clock()
            elif clock() - progress > PATIENCE:
                raise LoadError(f"{waiting[0].user}: no answer within {PATIENCE:g} s")
    if not loop.run(clock() + PATIENCE, lambda: all(client.is_ready for client in waiting)):
        raise LoadError(f"no answer to the last connects within {PATIENCE:g} s")
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

    until = clock() + PATIENCE
    while waiting:
        if clock() > until:
            raise LoadError(f"nothing reaches {waiting[0][1].user}")
        for sender, receiver, text in waiting:
            protocol = sender.protocol
            sender.send(memoryview(frame(protocol.wrap(text, receiver.user), protocol.opcode)))
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
    loop.run(clock() + drain, lambda: all(pair.is_done for pair in pairs))
    # A message that comes twice may come a little later than the first time.
    loop.run(clock() + 0.05)
    for pair in pairs:
        pair.finish()
