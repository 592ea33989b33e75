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
    """What a consumer gets from the broker on its present channel, and what it does with that."""

    DETACHED = auto()
    """It has no channel; the pool attaches it."""

    ATTACHING = auto()
    """It begins to consume from the inbox; the broker's answers say whether it is the active consumer."""

    BINDING = auto()
    """It may not be the active consumer, and its live queue is being declared, consumed from and bound."""

    PROMOTED = auto()
    """The inbox has begun to deliver while the live queue was being bound; the change over follows."""

    STANDING_BY = auto()
    """It gets copies from its live queue, and nothing from the inbox."""

    PROMOTING = auto()
    """The inbox has begun to deliver: its messages are set aside until the live queue is empty and deleted."""

    ACTIVE = auto()
    """It has no live queue, and what the inbox delivers goes straight to the mailbox if there is room."""

    OVERFLOWING = auto()
    """As ACTIVE, but some deliveries had no room: these are sent back, and come before anything newer."""

    CLOSED = auto()
    """Its owner has closed it; it is never attached again."""

    @property
    def is_attached(self) -> bool:
        """Whether the broker delivers all messages for the user, and the channel is free for other methods."""
        return self in (
            ConsumerState.STANDING_BY,
            ConsumerState.PROMOTING,
            ConsumerState.ACTIVE,
            ConsumerState.OVERFLOWING,
        )
