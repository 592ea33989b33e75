"""Messages that may have arrived although their sender got an error: sent again, they keep their message id."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

__all__ = ["Resends"]

#: Messages that are remembered per session, about 300 bytes each: the default `publish_queue`.
_REMEMBERED = 1_000


class Resends:
    """The message ids of what was answered as uncertain, by the `id` that the sender gave it; the last 1,000.

    Sent again with identical bytes, it is the same message: with the same message id its recipient sees it once.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: OrderedDict[str | int, tuple[bytes, str, int]] = OrderedDict()

    def remember(self, message_id: str | int, sent: bytes, binary: bool, mid: str, time_ms: int) -> None:
        """Note a message that may have arrived; `sent` is the bytes from its sender."""
        self._known[message_id] = (_digest(sent, binary), mid, time_ms)
        self._known.move_to_end(message_id)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def find(self, message_id: str | int, sent: bytes, binary: bool) -> tuple[str, int] | None:
        """Return message id and time of the same message, sent before; None for a new one."""
        known = self._known.get(message_id)
        if known is None or known[0] != _digest(sent, binary):
            return None
        return known[1:]

    def forget(self, message_id: str | int) -> None:
        """Forget the message with this id: it was confirmed, and the next with this id is another one."""
        self._known.pop(message_id, None)


def _digest(sent: bytes, binary: bool) -> bytes:
    return hashlib.blake2b(sent, digest_size=16, person=b"binary" if binary else b"text").digest()
