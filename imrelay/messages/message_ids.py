"""The relay's own ids of messages: ULIDs, which carry the time and sort by it (PROTOCOL section 3)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

__all__ = ["MessageIds", "mid_time_ms"]

_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
#: The number after the last one of the counter, which has 30 bits.
_COUNT_END = 1 << 30
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

    26 characters of Crockford's base 32: 48 bits of milliseconds since 1970, 50 random bits that this process has
    drawn at its start, and a counter of 30 bits that begins at random. `clock` returns seconds since 1970.
    """

    __slots__ = ("_clock", "_count", "_epoch", "_epoch_digits", "_head", "_own", "_time_ms")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        drawn = random.Random(os.urandom(32))
        self._own = _base32(drawn.getrandbits(50), 5)
        self._count = drawn.getrandbits(29)
        self._time_ms = 0
        self._head = ""
        #: The upper part of the time, which changes every quarter of an hour, and its digits.
        self._epoch, self._epoch_digits = -1, ""

    @property
    def incarnation(self) -> str:
        """The random part of this process: the ten characters after the time in each of its ids."""
        return self._own

    def next(self) -> tuple[str, int]:
        """Return a new id and its time in milliseconds since 1970; a clock set back does not undo the order."""
        now = int(self._clock() * 1000)
        if now > self._time_ms:
            self._time_ms = now
            if now >> 20 != self._epoch:
                self._epoch = now >> 20
                self._epoch_digits = _base32(self._epoch, 3)
            self._head = self._epoch_digits + _PAIRS[now >> 10 & 1023] + _PAIRS[now & 1023] + self._own
        self._count = count = self._count + 1
        if count == _COUNT_END:
            self._begin_anew()
            count = 0
        return self._head + _PAIRS[count >> 20] + _PAIRS[count >> 10 & 1023] + _PAIRS[count & 1023], self._time_ms

    def _begin_anew(self) -> None:
        """After a thousand million ids, go on in the next millisecond, so that they stay in order."""
        self._count = 0
        self._time_ms += 1
        self._epoch = self._time_ms >> 20
        self._epoch_digits = _base32(self._epoch, 3)
        self._head = _base32(self._time_ms, 5) + self._own
