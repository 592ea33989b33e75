"""The outbox alone: what may wait, for how long, and in which order it leaves."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from imrelay.websocket.outbox import Outbox


def outbox(**changes):
    return Outbox(**{"max_bytes": 100, "timeout": 10.0, "started": False, **changes})


def test_the_write_under_way_does_not_count():
    """Behind the first write as many bytes may wait as allowed, and not one more."""
    box = outbox()
    assert box.has_room(100)
    box.add(b"x" * 90, 0.0)
    box.add(b"x" * 60, 0.0)
    assert box.has_room(40)
    assert not box.has_room(41)
    box.took(90, 0.0)
    assert box.has_room(100)


def test_one_large_write_is_let_in_wherever_it_stands():
    """A write over the limit may wait behind a small one, and small ones behind it; a second large one may not."""
    box = outbox()
    box.add(b"pong", 0.0)
    assert box.has_room(1000)
    box.add(b"x" * 1000, 0.0)
    assert not box.has_room(1000)
    assert box.has_room(100)
    box.add(b"x" * 100, 0.0)
    assert not box.has_room(1)
    box.took(1004, 0.0)
    assert box.has_room(1000)


def test_a_write_has_its_time_whatever_is_taken_of_it():
    """Progress does not put off the deadline of a write that is not large."""
    box = outbox()
    box.add(b"x" * 100, 5.0)
    assert box.due == 15.0
    box.took(99, 14.0)
    assert box.due == 15.0


def test_a_large_write_has_more_time_but_must_move():
    """A large write gets the time once for each allowance of bytes, and something must be taken in each."""
    box = outbox()
    box.add(b"x" * 250, 0.0)
    assert box.due == 10.0
    box.took(1, 9.0)
    assert box.due == 19.0
    box.took(1, 18.0)
    box.took(1, 27.0)
    assert box.due == 30.0


def test_what_waits_behind_a_large_write_waits_as_long():
    """A small write is not late because of a large one before it."""
    box = outbox()
    box.add(b"x" * 250, 0.0)
    box.add(b"y", 1.0)
    box.took(250, 9.0)
    assert box.due == 19.0  # nothing was taken for ten seconds then
    box.took(0, 25.0)
    assert box.due == 30.0


def test_only_the_latest_pong_waits():
    """A pong replaces one that still waits, but not one that was given to the kernel."""
    box = outbox()
    box.add(b"first ", 0.0)
    box.add_pong(b"pong 1", 0.0)
    box.add_pong(b"pong 22", 0.0)
    assert bytes(box.next_bytes()) == b"first pong 22"
    box.add_pong(b"pong 3", 0.0)
    assert bytes(box.next_bytes()) == b"first pong 22pong 3"
    assert len(box.took(19, 0.0)) == 3
    assert not box


def test_a_frame_may_only_be_sent_between_writes():
    """Inside a write that was begun there is no place for a close frame."""
    assert not outbox(started=True).is_at_frame
    box = outbox()
    box.add(b"xy", 0.0)
    box.add(b"z", 0.0)
    assert box.is_at_frame
    box.took(1, 0.0)
    assert not box.is_at_frame
    box.took(1, 0.0)
    assert box.is_at_frame


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=100_000), st.integers(1, 200_000)), min_size=1, max_size=12)
)
def test_everything_leaves_in_order(steps):
    """However the kernel takes it, what leaves is what was added, and each write is reported once."""
    box = outbox(max_bytes=10)
    added, left, done = b"", b"", []
    writes = []
    for data, takes in steps:
        writes.append(box.add(data, 0.0))
        added += data
        offered = bytes(box.next_bytes())
        taken = min(takes, len(offered))
        left += offered[:taken]
        done += box.took(taken, 0.0)
    while box:
        offered = bytes(box.next_bytes())
        again = bytes(box.next_bytes())
        assert again == offered
        left += offered
        done += box.took(len(offered), 0.0)
    assert left == added
    assert done == writes
    assert all(write.taken for write in writes)
