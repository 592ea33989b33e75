"""The states of a consumer.

    DETACHED -> ATTACHING -> ACTIVE <-> OVERFLOWING          it is the active consumer of the inbox
                    |          ^
                    v          +---------------+
                 BINDING -> STANDING_BY -> PROMOTING         it stands by, and is promoted
                    |                          ^
                    +-----> PROMOTED ----------+             it is promoted before its live queue is bound

From each of them to DETACHED, when the channel ends, and to CLOSED, which is the last one.
"""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["ConsumerState"]


class ConsumerState(Enum):
    """What the broker gives to a consumer on its present channel, and what becomes of that."""

    DETACHED = auto()
    """It has no channel; the pool attaches it."""

    ATTACHING = auto()
    """It asks to consume from the inbox; the first answers say whether it is the active consumer."""

    BINDING = auto()
    """It may not be the active consumer, and its live queue is being declared, consumed from and bound."""

    PROMOTED = auto()
    """The inbox has begun to deliver while the live queue was being bound; the change over follows."""

    STANDING_BY = auto()
    """It gets copies from its live queue, and nothing from the inbox."""

    PROMOTING = auto()
    """The inbox has begun to deliver: that is set aside until the live queue is empty and deleted."""

    ACTIVE = auto()
    """It has no live queue, and what the inbox delivers goes straight to the mailbox if there is room."""

    OVERFLOWING = auto()
    """The same, but there was no room for some of it: that is sent back, and awaited before anything newer."""

    CLOSED = auto()
    """Its owner has closed it; it is never attached again."""

    @property
    def is_attached(self) -> bool:
        """Whether the broker delivers all that it should, and others may use the channel."""
        return self in (
            ConsumerState.STANDING_BY,
            ConsumerState.PROMOTING,
            ConsumerState.ACTIVE,
            ConsumerState.OVERFLOWING,
        )
