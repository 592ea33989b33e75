"""A detour: what waits for one user until it is known whether that user's inbox is there."""

from __future__ import annotations

from collections import deque

from imrelay.broker.publication import Publication

__all__ = ["Detour"]


class Detour:
    """Messages to one user that wait until it is known where those under way have gone."""

    __slots__ = ("in_flight", "is_alone", "returned", "waiting")

    def __init__(self, in_flight: int, *, is_alone: bool = False) -> None:
        self.in_flight = in_flight
        #: Whether it began with the one message under way.
        self.is_alone = is_alone
        self.returned: list[Publication] = []
        self.waiting: deque[Publication] = deque()
