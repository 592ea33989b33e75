"""Every message takes the codec's path, and messages share their reads and writes; counted, not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.counted import FrameCountingRelay

#: Messages that a test relays, and how many of them are under way at once.
MESSAGES, WINDOW = 2_000, 64


@pytest.fixture
def counted(broker_url: str, tmp_path: Path) -> FrameCountingRelay:
    """A relay that counts."""
    return FrameCountingRelay(tmp_path, broker_url)


def converse(relay: FrameCountingRelay, window: int, kind: str = "text") -> None:
    """Have one user send to another, with so many messages under way at once."""
    receiver, sender = relay.connect("ben"), relay.connect("anna")
    body = json.dumps({"to": {"id": "ben"}, "content": "x" * 60})
    send = sender.send if kind == "text" else sender.send_binary
    for _ in range(window):
        send(body)
    for count in range(MESSAGES):
        receiver.recv()
        if count < MESSAGES - window:
            send(body)
    receiver.close()
    sender.close()


@pytest.mark.parametrize("kind", ["text", "binary"])
def test_pika_decodes_no_frame_of_a_message(counted: FrameCountingRelay, kind: str) -> None:
    """pika decodes what opens and closes a connection or a channel, and no frame of any message."""
    converse(counted, WINDOW, kind)
    assert counted.stop()["decoded by pika"] < 100


def test_messages_under_way_share_reads_and_writes(counted: FrameCountingRelay) -> None:
    """With 64 messages under way there are at most two reads and writes a message; one by one it is six."""
    converse(counted, WINDOW)
    counts = counted.stop()
    del counts["decoded by pika"]
    assert sum(counts.values()) < 2 * MESSAGES, counts


def test_a_single_message_costs_no_more_than_it_must(counted: FrameCountingRelay) -> None:
    """One message under way takes a read and a write on its way in and on its way out, and little beside them.

    What nobody waits for shares its reads and writes: the confirm of one without an id, and the acknowledgement.
    """
    converse(counted, 1)
    counts = counted.stop()
    del counts["decoded by pika"]
    # browser -> relay -> broker -> relay -> browser
    assert sum(counts.values()) < 5 * MESSAGES, counts
