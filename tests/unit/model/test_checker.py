"""The model's own checks: each kind of broken promise is complained of, and what may happen is not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.client import split_v1
from tests.model.history import History, Message, SessionRecord, Violation
from tests.model.soak import Figures
from tests.model.verdict import complaints

_MIDS = [f"01M86CPHEC42MXP89J1P897A{number:02}" for number in range(10, 90)]


class Play:
    """Makes histories by hand; users are `ann` and `bob`, relays `A` and `B`."""

    def __init__(self, max_length: int = 6) -> None:
        self.history = History(max_length=max_length, refusing=frozenset({"B"}))
        self._mids = iter(_MIDS)
        self.bob = self.open("bob", v1=False)

    def open(self, user: str, *, relay: str = "A", v1: bool = True) -> SessionRecord:
        """Open a socket, when those that ended are gone."""
        self.history.gone(user)
        return self.history.open(user, relay, v1=v1)

    def say(
        self,
        to: str = "ann",
        *,
        sender: SessionRecord | None = None,
        answer: dict[str, Any] | None = None,
        size: int = 0,
    ) -> Message:
        """Send a message, which is acked or gets the answer; it is padded to `size` bytes."""
        sender = self.bob if sender is None else sender
        number = len(self.history.messages)
        message = self.history.send(sender, to, (b'{"content":%d}' % number).ljust(size), id=number)
        self.history.answer(sender, self.ack(number) if answer is None else {"error": answer | {"id": number}})
        return message

    def ack(self, number: int) -> dict[str, Any]:
        """An ack with the next mid."""
        return {"ack": {"id": number, "mid": next(self._mids), "time": 1}}

    def see(self, session: SessionRecord, *messages: Message, take: bool = True, **facts: Any) -> None:
        """Let messages come to a session, which takes them."""
        for message in messages:
            if session.v1:
                mid = message.ack.mid if message.ack is not None else message.foreign_mid
                numbered = {"seq": len(session.arrivals) + 1, "mid": mid} | facts
            self.history.arrive(session, message, **(numbered if session.v1 else facts))
        if take and session.v1:
            self.history.ack(session, len(session.arrivals))

    @property
    def complaints(self) -> str:
        """All complaints in one text."""
        return "; ".join(complaints(self.history))


@pytest.fixture
def play() -> Play:
    """A history with nothing but bob's plain socket in it."""
    return Play()


def test_what_is_as_it_should_be_passes(play: Play) -> None:
    """Two tabs that see all in order, and one message that waits for the next session."""
    one, two = play.open("ann"), play.open("ann")
    messages = [play.say(), play.say()]
    play.see(one, *messages)
    play.see(two, *messages)
    assert not list(play.history.due(one))
    for session in (one, two):
        play.history.end(session, lossy=False)
    kept = play.say()
    play.see(play.open("ann"), kept)
    assert play.complaints == ""
    assert not list(play.history.unanswered())


def test_an_acked_message_that_nobody_sees_is_lost(play: Play) -> None:
    """A v1 socket that was cut is no excuse."""
    ann = play.open("ann")
    play.say()
    play.history.end(ann, lossy=True)
    assert "accepted and came to nobody" in play.complaints


def test_a_plain_socket_that_was_cut_may_take_what_the_kernel_held(play: Play) -> None:
    """But no more bytes than that, and nothing that was sent after its end."""
    ann = play.open("ann", v1=False)
    play.say()
    play.history.end(ann, lossy=True, room=100)
    assert play.complaints == ""
    ann.room = 10
    assert "bytes, 10 may be lost" in play.complaints
    ann.room = 100
    play.say()
    assert "message 2 (bob/1 to ann) was accepted and came to nobody" in play.complaints


def test_what_may_be_of_a_write_that_is_not_whole_may_come_again(play: Play) -> None:
    """The relay acknowledges a write as a whole: one of its messages was never seen by the plain socket."""
    ann = play.open("ann", v1=False)
    message = play.say()
    play.say()
    play.see(ann, message)
    play.history.end(ann, lossy=False)
    play.history.gone("ann")
    play.see(play.open("ann", v1=False), message)


def test_what_was_written_as_a_whole_does_not_come_again(play: Play) -> None:
    """Nothing else was under way to the plain socket, or more came behind it than fits into one write."""
    ann = play.open("ann", v1=False)
    first = play.say()
    play.see(ann, first, *(play.say(size=40_000) for _ in range(2)))
    play.say()
    play.history.end(ann, lossy=False)
    cid = play.open("cid", v1=False)
    alone = play.say(to="cid")
    play.see(cid, alone)
    play.history.end(cid, lossy=False)
    with pytest.raises(Violation, match=r"message 1 .* had been taken before ann/2 came"):
        play.see(play.open("ann", v1=False), first)
    with pytest.raises(Violation, match="had been taken before cid/2 came"):
        play.see(play.open("cid", v1=False), alone)


def test_an_attached_socket_must_see_each_message(play: Play) -> None:
    """What was sent while it was attached for sure is due; after a lost link only from when it got something."""
    one, two = play.open("ann"), play.open("ann", relay="B")
    play.history.disturb("B")
    message = play.say()
    assert list(play.history.due(one)) == [message]
    assert not list(play.history.due(two))
    play.see(two, message)
    later = play.say()
    assert list(play.history.due(two)) == [later]
    two.is_abandoned = True
    assert not list(play.history.due(two))


def test_no_own_message_comes_twice_to_a_socket(play: Play) -> None:
    """Whatever failed meanwhile; one of another program may."""
    ann = play.open("ann")
    message = play.say()
    foreign = play.history.send(None, "ann", b"foreign")
    play.see(ann, message, foreign, foreign)
    play.history.disturb("A")
    with pytest.raises(Violation, match=r"message 1 .* came twice to ann/1"):
        play.see(ann, message)


def test_what_was_taken_does_not_come_again(play: Play) -> None:
    """Neither to the next session, whatever kind it is."""
    ann = play.open("ann")
    message = play.say()
    play.see(ann, message)
    play.history.end(ann, lossy=True)
    with pytest.raises(Violation, match="had been taken before ann/2 came"):
        play.see(play.open("ann", v1=False), message)


def test_what_was_not_taken_comes_again_and_says_so(play: Play) -> None:
    """Unacknowledged by its v1 browser: `redelivered` is true then, and only then."""
    ann = play.open("ann")
    message, fresh = play.say(), play.say()
    play.see(ann, message, take=False)
    with pytest.raises(Violation, match="as redelivered, but nobody had it"):
        play.see(ann, fresh, redelivered=True)
    play.history.end(ann, lossy=True)
    again = play.open("ann")
    with pytest.raises(Violation, match="again without redelivered"):
        play.see(again, message)
    play.see(again, message, redelivered=True)


def test_what_was_not_taken_must_come_again(play: Play) -> None:
    """Seen by a v1 session that did not acknowledge it, and by nobody after that."""
    ann = play.open("ann")
    first, second = play.say(), play.say()
    play.see(ann, first, second, take=False)
    play.history.ack(ann, 1)
    play.history.end(ann, lossy=True)
    assert play.complaints == "message 2 (bob/1 to ann) was accepted and was taken by nobody, but is gone"
    play.see(play.open("ann"), second, redelivered=True)
    assert play.complaints == ""


def test_after_a_kill_even_what_was_taken_may_come_again(play: Play) -> None:
    """The relay may have died before the broker heard of it."""
    ann = play.open("ann")
    message = play.say()
    play.see(ann, message)
    play.history.disturb("A")
    play.history.end(ann, lossy=False)
    play.see(play.open("ann"), message, redelivered=True)
    assert play.complaints == ""


def test_order(play: Play) -> None:
    """A socket that is there all the while sees one sender's messages in order, alone or with others."""
    one, two = play.open("ann"), play.open("ann")
    first, second = play.say(), play.say()
    play.see(one, first, second)
    play.see(two, second, first)
    assert (
        play.complaints
        == "message 1 (bob/1 to ann) came to ann/2 after message 2 (bob/1 to ann), which was sent later"
    )


@pytest.mark.parametrize("is_lost", [True, False])
def test_what_was_published_again_may_come_after_what_is_newer(play: Play, is_lost: bool) -> None:
    """The next session gets the second copy of what was taken; but only where a link was lost."""
    ann = play.open("ann")
    first, second = play.say(), play.say()
    if is_lost:
        play.history.disturb("A")
    play.see(ann, first, take=is_lost)
    play.history.end(ann, lossy=False)
    play.see(play.open("ann"), second, first, redelivered=True)
    assert ("after message 2" in play.complaints) is not is_lost


def test_a_further_socket_may_see_what_waited_after_what_is_newer(play: Play) -> None:
    """What was sent before it came stands in the inbox, which another one holds; the only socket has no excuse."""
    holder = play.open("ann")
    old = play.say()
    beside = play.open("ann")
    new = play.say()
    play.see(beside, new, old)
    assert play.complaints == ""
    for session in (holder, beside):
        play.history.end(session, lossy=True)
    waiting = [play.say(), play.say()]
    play.see(play.open("ann"), *reversed(waiting))
    assert "message 3 (bob/1 to ann) came to ann/3 after message 4" in play.complaints


def test_who_resumes_has_the_order_of_who_is_alone(play: Play) -> None:
    """Its predecessor was ended before it was attached."""
    half_open = play.open("ann")
    old = play.say()
    back = play.open("ann")
    back.resumes = half_open
    new = play.say()
    play.see(back, new, old, redelivered=False)
    assert "message 1 (bob/1 to ann) came to ann/2 after message 2" in play.complaints


def test_nobody_gets_what_is_for_somebody_else(play: Play) -> None:
    """Not even as an empty body that others are sent as well."""
    message = play.say()
    with pytest.raises(Violation, match=r"message 1 \(bob/1 to ann\) came to bob/1"):
        play.see(play.bob, message)


def test_each_id_is_answered_once_and_no_other(play: Play) -> None:
    """An ack after an ack, an error after an ack, an id that nobody gave, an error out of nothing."""
    play.say()
    for frame in (play.ack(0), {"error": {"code": "inbox_full", "id": 0}}):
        with pytest.raises(Violation, match="was answered"):
            play.history.answer(play.bob, frame)
    with pytest.raises(Violation, match="an id that it never gave"):
        play.history.answer(play.bob, play.ack(99))
    with pytest.raises(Violation, match="an error that nothing asked for"):
        play.history.answer(play.bob, {"error": {"code": "bad_json"}})


def test_bad_input_is_answered_without_an_id(play: Play) -> None:
    """As often as there was any."""
    play.bob.bad_inputs = 1
    play.history.answer(play.bob, {"error": {"code": "bad_json"}})
    with pytest.raises(Violation, match="nothing asked for"):
        play.history.answer(play.bob, {"error": {"code": "bad_json"}})


def test_an_error_is_the_truth(play: Play) -> None:
    """Delivered though it was refused for certain: complained of; where it was uncertain: not."""
    play.history.excused.add("A")
    ann = play.open("ann")
    refused = play.say(answer={"code": "broker_unavailable"})
    unsure = play.say(answer={"code": "broker_unavailable", "uncertain": True})
    play.see(ann, unsure)
    assert play.complaints == ""
    play.see(ann, refused)
    assert play.complaints == "message 1 (bob/1 to ann) got broker_unavailable for certain and came to ann/1"


def test_an_error_without_a_cause(play: Play) -> None:
    """The broker could be reached, the recipient is known, the inbox is not full."""
    play.open("ann")
    with pytest.raises(Violation, match="and the broker could be reached"):
        play.say(answer={"code": "broker_unavailable"})
    with pytest.raises(Violation, match="opens inboxes for unknown users"):
        play.say(answer={"code": "recipient_unknown"})
    with pytest.raises(Violation, match="ann has an inbox"):
        play.say(sender=play.open("bob", relay="B"), answer={"code": "recipient_unknown"})
    with pytest.raises(Violation, match="at most 0 messages waited"):
        play.say(answer={"code": "inbox_full"})


def test_a_full_inbox_keeps_nothing(play: Play) -> None:
    """Sockets that stand by may have shown it; no later one may, and none that was alone."""
    play.history.max_length = 1
    one, two = play.open("ann"), play.open("ann")
    play.say()
    full = play.say(answer={"code": "inbox_full"})
    play.see(two, full, mid=None)
    assert "got inbox_full" not in play.complaints
    for session in (one, two):
        play.history.end(session, lossy=False)
    play.see(play.open("ann"), full, mid=None)
    assert "message 2 (bob/1 to ann) got inbox_full and was kept all the same" in play.complaints


def test_numbers_and_mids_of_v1(play: Play) -> None:
    """`seq` counts from 1, and the mid is that of the ack; a mid stands for one message, and mids sort by time."""
    ann = play.open("ann")
    message = play.say()
    with pytest.raises(Violation, match="with seq 2 in place of 1"):
        play.see(ann, message, seq=2)
    play.see(ann, message, mid=_MIDS[-1])
    assert "and came to ann/1 as" in play.complaints
    play.history.send(play.bob, "ann", b"x", id="x")
    with pytest.raises(Violation, match="the same mid"):
        play.history.answer(play.bob, {"ack": {"id": "x", "mid": _MIDS[0], "time": 1}})
    play.history.send(play.bob, "ann", b"y", id="y")
    with pytest.raises(Violation, match="not in the order of sending"):
        play.history.answer(play.bob, {"ack": {"id": "y", "mid": "00" + _MIDS[0][2:], "time": 1}})


def test_a_text_stays_a_text(play: Play) -> None:
    """And a binary message is one."""
    with pytest.raises(Violation, match="as a binary frame"):
        play.see(play.open("ann", v1=False), play.say(), binary=True)


def test_without_an_id_a_later_ack_tells(play: Play) -> None:
    """A message without an id is accepted when a later one to the same user is acked, without an error between."""
    silent = play.history.send(play.bob, "ann", b"silent")
    assert play.history.accepted_at(silent) is None
    play.see(play.open("ann"), play.say())
    assert "message 1 (bob/1 to ann) was accepted and came to nobody" in play.complaints
    play.history.answer(play.bob, {"error": {"code": "inbox_full"}})
    assert play.complaints == ""


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (b'{"seq":1,"mid":"M","time":5,"message":{"a":"}"}}', (1, "M", [b'{"a":"}"}'], False)),
        (b'{"seq":2,"message":"text","redelivered":true}', (2, None, [b"text", b'"text"'], True)),
        (b'{"seq":3,"message_base64":"/w=="}', (3, None, [b"\xff"], False)),
    ],
)
def test_numbered_frames_are_taken_apart(frame: bytes, expected: tuple[Any, ...]) -> None:
    """The message's own bytes stand inside."""
    found = split_v1(frame)
    assert found is not None
    assert (found["seq"], found["mid"], found["bodies"], found["redelivered"]) == expected
    assert split_v1(b'{"ack":{"id":1}}') is None


def test_growth_is_told_from_noise() -> None:
    """Steady growth is a leak, also of one descriptor in ten minutes; a figure that goes up and down is none."""
    figures = Figures()
    for minute in range(60):
        row = {"A descriptors": 20.0 + minute // 10, "A MiB": 50.0 + minute % 3, "queues on the broker": 0.0}
        figures.add(60.0 * minute, row)
    assert [leak.partition(":")[0] for leak in figures.leaks()] == ["A descriptors"]
    assert figures.growth()["A MiB"] == pytest.approx(0, abs=0.5)
