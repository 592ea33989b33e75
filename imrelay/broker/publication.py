"""A message on its way to the broker, and who is told when it got there."""

from __future__ import annotations

from collections.abc import Callable

from imrelay.errors import AnswerableError

__all__ = ["OnDone", "Publication"]

#: Called once for each publication, in any greenlet or the hub: with None when it was confirmed.
OnDone = Callable[["Publication", AnswerableError | None], None]


class Publication:
    """A message on its way to the broker."""

    __slots__ = (
        "binary",
        "body",
        "deadline",
        "done",
        "message_id",
        "mid",
        "on_done",
        "returned",
        "time_ms",
        "user",
    )

    def __init__(
        self,
        user: str,
        body: bytes,
        binary: bool,
        mid: str,
        time_ms: int,
        message_id: str | int | None,
        on_done: OnDone,
    ) -> None:
        self.user = user
        self.body = body
        self.binary = binary
        self.mid = mid
        #: Milliseconds since 1970.
        self.time_ms = time_ms
        #: The sender's own id of it, for the answer.
        self.message_id = message_id
        self.on_done = on_done
        self.done = False
        #: Whether the broker sent it back (`basic.return`): there is no inbox.
        self.returned = False
        #: By the clock of `time.monotonic`; set when it is queued.
        self.deadline = 0.0
