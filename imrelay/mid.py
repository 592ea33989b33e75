"""The relay's own ids of messages: ULIDs, which carry the time and sort by it (PROTOCOL section 3)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

__all__ = ["MessageIds", "mid_time_ms"]

_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [high + low for high in _BASE32 for low in _BASE32]


def _base32(number: int, pairs: int) -> str:
    return "".join(_PAIRS[number >> shift & 1023] for shift in range(10 * pairs - 10, -1, -10))


def mid_time_ms(mid: str | None) -> int | None:
    """Return the milliseconds since 1970 in a message id of a relay; None where it is none."""
    if mid is None or len(mid) != 26:
        return None
    try:
        digits = [_BASE32.index(character) for character in mid[:10]]
    except ValueError:
        return None
    return sum(digit << 5 * place for place, digit in enumerate(reversed(digits)))


class MessageIds:
    """Makes the relay's own ids of messages: ULIDs, which are unique, and in order within this process.

    26 characters of Crockford's base 32: 48 bits of milliseconds since 1970, then 80 that begin at random in
    each millisecond and count up within it. `clock` returns seconds since 1970.
    """

    __slots__ = ("_clock", "_count", "_head", "_random", "_time_ms")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._random = random.Random(os.urandom(32))
        self._time_ms = 0
        self._head = ""
        self._count = 0

    def next(self) -> tuple[str, int]:
        """Return a new id and its time in milliseconds since 1970; a clock set back does not undo the order."""
        now = int(self._clock() * 1000)
        if now > self._time_ms:
            self._time_ms = now
            self._head = _base32(now, 5) + _base32(self._random.getrandbits(50), 5)
            self._count = self._random.getrandbits(29)
        else:
            self._count += 1
        count = self._count
        mid = self._head + _PAIRS[count >> 20 & 1023] + _PAIRS[count >> 10 & 1023] + _PAIRS[count & 1023]
        return mid, self._time_ms
