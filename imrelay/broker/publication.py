"""A message on its way to the broker, and the callback for its answer."""

from __future__ import annotations

from collections.abc import Callable

from imrelay.errors import AnswerableError

__all__ = ["OnDone", "Publication"]

#: Called once for each publication, in any greenlet or in the event loop: with None when it was confirmed.
OnDone = Callable[["Publication", AnswerableError | None], None]


class Publication:
    """A message on its way to the broker. `sent` is the bytes from its sender; by default the same as `body`."""

    __slots__ = (
        "binary",
        "body",
        "deadline",
        "done",
        "handed_over",
        "is_doubtful",
        "message_id",
        "mid",
        "on_done",
        "refusals",
        "returned",
        "returns",
        "sent",
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
        sent: bytes | None = None,
    ) -> None:
        self.user = user
        #: Empty once it is done.
        self.body = body
        self.sent = body if sent is None else sent
        self.binary = binary
        self.mid = mid
        #: Milliseconds since 1970.
        self.time_ms = time_ms
        #: The `id` that its sender gave it, for the answer.
        self.message_id = message_id
        self.on_done = on_done
        self.done = False
        #: Whether it may have left this process, over this connection or one before, and may arrive.
        self.handed_over = False
        #: Whether a copy of it may have been taken: a channel ended before the broker's answer.
        self.is_doubtful = False
        #: Whether the broker has returned it (`basic.return`), since there is no inbox; and how often.
        self.returned = False
        self.returns = 0
        #: How often the broker closed a connection while it was the only one under way.
        self.refusals = 0
        #: By the clock of `time.monotonic`; set when it is queued.
        self.deadline = 0.0
