"""When an inbox that did not answer is asked for again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from imrelay.broker import hanging_inboxes
from imrelay.broker.hanging_inboxes import HangingInboxes
from imrelay.errors import ChannelLost


@pytest.fixture
def connection() -> Any:
    """A connection of which two channels of eight are in use."""
    return SimpleNamespace(channels=2, channel_max=8)


def test_an_inbox_is_asked_for_when_its_channel_has_ended(connection: Any) -> None:
    """While the channel hangs it is not asked for; others are."""
    hanging, channel = HangingInboxes(connection), SimpleNamespace(lost=None)
    hanging.check("ann")
    hanging.add("ann", channel)  # type: ignore[arg-type]
    assert "ann" in hanging
    with pytest.raises(ChannelLost, match="still hangs"):
        hanging.check("ann")
    hanging.check("ben")
    channel.lost = ChannelLost("closed")
    assert "ann" not in hanging
    hanging.check("ann")


def test_a_channel_that_hangs_for_long_does_not_keep_an_inbox_from_being_asked_for(
    connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a minute it is asked for anew, as long as that leaves half of the channels to others."""
    monkeypatch.setattr(hanging_inboxes, "_AGAIN", 0.0)
    hanging = HangingInboxes(connection)
    hanging.add("ann", SimpleNamespace(lost=None))  # type: ignore[arg-type]
    hanging.check("ann")
    connection.channels = 5
    with pytest.raises(ChannelLost):
        hanging.check("ann")
    hanging.check("ben")


def test_what_has_ended_is_forgotten(connection: Any) -> None:
    """Nothing is kept of channels that hang no more."""
    hanging = HangingInboxes(connection)
    for number in range(10):
        hanging.add(f"user {number}", SimpleNamespace(lost=ChannelLost("closed")))  # type: ignore[arg-type]
    assert len(hanging._channels) == 1
