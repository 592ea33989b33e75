"""What happened in one example, as browsers and other programs saw it: plain records, without any I/O.

Times are numbers that count up with each event (`History.tick`); the checks on the whole stand in `verdict`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Arrival", "Epoch", "History", "Message", "SessionRecord", "Violation"]

_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
#: Codes of errors about what a browser sent; nothing else of the example depends on them.
_BAD_INPUT = frozenset({"bad_json", "bad_message", "from_mismatch"})
#: Bytes of messages that the relay writes to a browser at once; one may be larger by itself.
_WRITE = 65_536
#: Codes that may answer a message in good form.
_REFUSALS = frozenset({"inbox_full", "recipient_unknown", "broker_unavailable"})


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(eq=False)
class Answer:
    """One answer to a message that had an `id`: an ack, or an error with its code."""

    at: int
    code: str | None = None
    uncertain: bool = False
    mid: str | None = None

    @property
    def is_final_error(self) -> bool:
        """Whether the message was refused for good: it may be shown to nobody, or is kept for nobody."""
        return self.code is not None and not self.uncertain


@dataclass(eq=False)
class Message:
    """A message to one user, by a browser (`sender`) or by another program."""

    number: int
    to: str
    body: bytes
    sent_at: int
    binary: bool = False
    sender: SessionRecord | None = None
    #: The client's own id of it; None where it asked for no answer.
    id: str | int | None = None
    #: What another program gave as `message_id`.
    foreign_mid: str | None = None
    #: When the broker confirmed it to another program.
    confirmed_at: int | None = None
    #: Whether the broker returned it to another program, or refused it.
    is_returned: bool = False
    #: How often its sender sent it.
    attempts: int = 1
    answers: list[Answer] = field(default_factory=list)

    @property
    def is_own(self) -> bool:
        """Whether it went through a relay."""
        return self.sender is not None

    @property
    def ack(self) -> Answer | None:
        """The first ack."""
        return next((answer for answer in self.answers if answer.code is None), None)

    @property
    def is_refused(self) -> bool:
        """Whether its sender was told for certain that it will not arrive."""
        return bool(self.answers) and all(answer.is_final_error for answer in self.answers)

    def __str__(self) -> str:
        whose = self.sender.name if self.sender is not None else "another program"
        return f"message {self.number} ({whose} to {self.to})"


@dataclass(eq=False)
class Arrival:
    """A message that a session got."""

    at: int
    message: Message
    seq: int | None = None
    mid: str | None = None
    redelivered: bool = False


@dataclass
class Epoch:
    """A time in which a session was attached for sure; `end` is None while it lasts."""

    start: int
    end: int | None = None


@dataclass(eq=False)
class SessionRecord:
    """One browser socket of one user on one relay."""

    name: str
    user: str
    relay: str
    v1: bool
    opened_at: int
    epochs: list[Epoch] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    #: When it had surely taken a message.
    taken: dict[Message, int] = field(default_factory=dict)
    #: When the browser sent its close frame.
    closing_at: int | None = None
    ended_at: int | None = None
    #: Whether bytes that the relay wrote may have been lost with it.
    is_lossy: bool = False
    #: At most so many bytes of messages.
    room: int = 0
    #: When its consumer was seen to be gone from the broker.
    gone_at: int | None = None
    #: Half-open: its browser neither reads nor closes.
    is_abandoned: bool = False
    #: The session that it ended by `imrelay.resume`.
    resumes: SessionRecord | None = None
    #: Errors without an id that were no fault of its own.
    loose_errors: int = 0
    #: Pieces of bad input that are not yet answered.
    bad_inputs: int = 0

    @property
    def is_open(self) -> bool:
        """Whether its browser still holds it."""
        return self.ended_at is None

    def has_seen(self, message: Message) -> bool:
        """Tell whether it got a message."""
        return any(arrival.message is message for arrival in self.arrivals)

    @property
    def is_attached(self) -> bool:
        """Whether it is attached for sure."""
        return bool(self.epochs) and self.epochs[-1].end is None

    def has_taken(self, message: Message) -> bool:
        """Tell whether it got a message, and acknowledged it if it speaks `imrelay.v1`."""
        return message in self.taken if self.v1 else self.has_seen(message)

    def has_gone_by(self, at: int) -> bool:
        """Tell whether its consumer was surely gone at that time."""
        return self.gone_at is not None and self.gone_at <= at


class History:
    """All of one example. `max_length` is the least that an inbox holds; `refusing` are relays that may refuse.

    `begins_live`: a relay may not know who stands by (quorum queues, inboxes of other settings), so that a socket
    that is alone begins with a live queue. What it takes from that may come again to the user's next socket if it
    closes before it was promoted.
    """

    def __init__(
        self, *, max_length: int, refusing: frozenset[str] = frozenset(), begins_live: bool = False
    ) -> None:
        self.max_length = max_length
        self.begins_live = begins_live
        self.refusing = refusing
        self.now = 0
        self.sessions: list[SessionRecord] = []
        #: User -> when the inbox was deleted.
        self._inbox_lost: dict[str, int] = {}
        self.messages: list[Message] = []
        #: When the link between a relay and the broker was lost, or the relay killed, or the broker.
        self.disturbances: dict[str, list[int]] = defaultdict(list)
        #: Relays that may not be back yet, or whose former connections the broker may hold for alive.
        self._disturbed: set[str] = set()
        #: Relays that may answer `broker_unavailable` from then on.
        self.excused: set[str] = set()
        self._by_body: dict[bytes, list[Message]] = defaultdict(list)
        self._by_id: dict[tuple[SessionRecord, str | int], Message] = {}

    def tick(self) -> int:
        """Return the time of a new event."""
        self.now += 1
        return self.now

    # -- what browsers and programs do ---------------------------------------------------------------------------

    def open(self, user: str, relay: str, *, v1: bool, is_attached: bool = True) -> SessionRecord:
        """Note a socket that was upgraded; `is_attached`: and the relay could reach the broker."""
        count = sum(session.user == user for session in self.sessions) + 1
        session = SessionRecord(f"{user}/{count}", user, relay, v1, self.tick())
        if is_attached:
            session.epochs.append(Epoch(session.opened_at))
        self.sessions.append(session)
        return session

    def send(
        self,
        sender: SessionRecord | None,
        to: str,
        body: bytes,
        *,
        binary: bool = False,
        id: str | int | None = None,
    ) -> Message:
        """Note a message that is being sent; `body` is what its recipient is to get."""
        message = Message(len(self.messages) + 1, to, body, self.tick(), binary, sender, id)
        self.messages.append(message)
        self._by_body[body].append(message)
        if sender is not None and id is not None:
            self._by_id[sender, id] = message
        return message

    def send_again(self, message: Message) -> None:
        """Note that a message that was answered `uncertain` is sent again, with the same id and bytes."""
        self.tick()
        message.attempts += 1

    def end(self, session: SessionRecord, *, lossy: bool, room: int = 0) -> None:
        """Note the end of a socket. `lossy`: what the relay had written may be lost, up to `room` bytes."""
        if session.ended_at is None:
            session.ended_at = self.tick()
            session.is_lossy = lossy
            session.room = room
            self._end_epoch(session)

    def gone(self, user: str) -> None:
        """Note that the broker has no consumers of a user's ended sessions any more."""
        at = self.tick()
        for session in self.sessions:
            if session.user == user and session.gone_at is None and not session.is_open:
                session.gone_at = at

    def disturb(self, relay: str) -> None:
        """Note that a relay's link to the broker is lost, or the relay itself."""
        self.disturbances[relay].append(self.tick())
        self._disturbed.add(relay)
        for session in self.sessions:
            if session.relay == relay:
                self._end_epoch(session)

    def recover(self, relay: str) -> None:
        """Note that a relay is back: what was sent meanwhile may have gone into the connection that was lost."""
        self.disturbances[relay].append(self.tick())
        self._disturbed.discard(relay)

    def _end_epoch(self, session: SessionRecord) -> None:
        if session.is_attached:
            session.epochs[-1].end = self.now

    # -- what they get -------------------------------------------------------------------------------------------

    def answer(self, session: SessionRecord, frame: dict[str, Any]) -> None:
        """Take an `ack` or `error` frame; raises `Violation` for one that may not come."""
        at = self.tick()
        kind, fields = next(iter(frame.items()))
        code = fields.get("code") if kind == "error" else None
        if "id" not in fields:
            self._take_loose_error(session, code, frame)
            return
        message = self._by_id.get((session, fields["id"]))
        if message is None:
            raise Violation(f"{session.name} was answered for an id that it never gave: {frame}")
        answer = Answer(at, code, bool(fields.get("uncertain")), fields.get("mid"))
        message.answers.append(answer)
        if len(message.answers) > message.attempts:
            raise Violation(f"{message} was answered {len(message.answers)} times: {frame}")
        if code is None:
            self._check_ack(session, message, answer, frame)
        else:
            self._check_refusal(session, message, answer, frame)

    def _take_loose_error(self, session: SessionRecord, code: str | None, frame: dict[str, Any]) -> None:
        if code in _BAD_INPUT and session.bad_inputs:
            session.bad_inputs -= 1
        elif code in _REFUSALS and any(m.sender is session and m.id is None for m in self.messages):
            session.loose_errors += 1
        else:
            raise Violation(f"{session.name} got an error that nothing asked for: {frame}")

    def _check_ack(self, session: SessionRecord, message: Message, answer: Answer, frame: dict[str, Any]) -> None:
        if not _ULID.fullmatch(answer.mid or "") or not isinstance(frame["ack"].get("time"), int):
            raise Violation(f"the ack of {message} has no mid or time: {frame}")
        for other in self.messages:
            if other is message or other.ack is None or message.attempts > 1 or other.attempts > 1:
                continue
            if other.ack.mid == answer.mid:
                raise Violation(f"{message} and {other} have the same mid {answer.mid}")
            if other.sender is session and (other.number < message.number) != (
                (other.ack.mid or "") < (answer.mid or "")
            ):
                raise Violation(f"the mids of {other} and {message} are not in the order of sending")

    def _check_refusal(
        self, session: SessionRecord, message: Message, answer: Answer, frame: dict[str, Any]
    ) -> None:
        code = answer.code
        if code not in _REFUSALS:
            raise Violation(f"{message} is in good form and got {frame}")
        if answer.uncertain and code != "broker_unavailable":
            raise Violation(f"{message}: only broker_unavailable may be uncertain: {frame}")
        if code == "recipient_unknown":
            if session.relay not in self.refusing:
                raise Violation(f"{message}: {session.relay} opens inboxes for unknown users, and refused it")
            if self.had_inbox(message):
                raise Violation(f"{message} got recipient_unknown, but {message.to} has an inbox")
        elif code == "inbox_full":
            waiting = self.most_waiting(message)
            if waiting < self.max_length:
                raise Violation(f"{message} got inbox_full, but at most {waiting} messages waited")
        elif session.relay not in self.excused and not (
            # published before the link was lost, and refused when it was published again
            answer.uncertain and self.disturbances[session.relay]
        ):
            raise Violation(f"{message} got {frame}, and the broker could be reached")

    def lose_inbox(self, user: str) -> None:
        """Note that a user's inbox was deleted, while it was empty and no socket was there."""
        self._inbox_lost[user] = self.tick()

    def had_inbox(self, message: Message) -> bool:
        lost = self._inbox_lost.get(message.to, 0)
        return any(
            s.user == message.to and s.epochs and lost <= s.opened_at < message.sent_at for s in self.sessions
        ) or any(
            other.to == message.to and (at := self.accepted_at(other)) is not None and lost <= at < message.sent_at
            for other in self.messages
        )

    def most_waiting(self, message: Message) -> int:
        """Return how many messages may wait in the inbox of its recipient beside it, at most."""
        if any(self.disturbances.values()):
            return len(self.messages) + self.max_length  # what was published again may stand there twice
        return sum(
            other.to == message.to
            and other is not message
            and not other.is_refused
            and not other.is_returned
            and ((taken := self.taken_at(other)) is None or taken > message.sent_at)
            for other in self.messages
        )

    def find(self, session: SessionRecord, body: bytes) -> Message | None:
        """Return the message of these bytes that a session got; where there are several, one that is new to it."""
        known = self._by_body.get(body, [])
        new = [message for message in known if message.to == session.user and not session.has_seen(message)]
        new.sort(key=lambda message: not message.is_own and message.confirmed_at is None)  # may be nowhere
        fresh = [m for m in new if session.epochs and m.sent_at >= session.epochs[-1].start]
        unseen = [m for m in new if not any(other.has_seen(m) for other in self.sessions)]
        mine = [message for message in known if message.to == session.user]
        return next(iter([*fresh, *unseen, *new, *mine[-1:], *known[-1:]]), None)

    def is_unique(self, message: Message) -> bool:
        """Tell whether no other message has the same bytes, so that an arrival is known to be this one's."""
        return len(self._by_body[message.body]) == 1

    def arrive(
        self,
        session: SessionRecord,
        message: Message,
        *,
        binary: bool = False,
        seq: int | None = None,
        mid: str | None = None,
        redelivered: bool = False,
    ) -> None:
        """Take a message that a session got; raises `Violation` where it may not."""
        arrival = Arrival(self.tick(), message, seq, mid, redelivered)
        if message.to != session.user:
            raise Violation(f"{message} came to {session.name}")
        if message.is_own and session.has_seen(message):
            raise Violation(f"{message} came twice to {session.name}")
        if binary != message.binary:
            raise Violation(f"{message} came to {session.name} as a {'binary' if binary else 'text'} frame")
        if session.v1:
            self._check_v1(session, arrival)
        # one of another program may come again while a socket takes over from another; and what was sent again is
        # in the inbox twice, of which only one may have been taken
        is_single = message.is_own and message.attempts == 1 and self.is_unique(message)
        taken_at = self.taken_at(message) if is_single else None
        if taken_at is not None and taken_at < session.opened_at:
            raise Violation(f"{message} had been taken before {session.name} came, which got it again")
        session.arrivals.append(arrival)
        if not session.v1 and session.closing_at is None:
            session.taken.setdefault(message, arrival.at)
        lost = max(self.disturbances[session.relay], default=0)
        if session.is_open and message.sent_at > lost and not session.is_attached:
            session.epochs.append(Epoch(arrival.at))

    def _check_v1(self, session: SessionRecord, arrival: Arrival) -> None:
        message = arrival.message
        expected = len(session.arrivals) + 1
        if arrival.seq != expected:
            raise Violation(f"{message} came to {session.name} with seq {arrival.seq} in place of {expected}")
        if not message.is_own and arrival.mid != message.foreign_mid:
            raise Violation(f"{message} came to {session.name} with mid {arrival.mid}")
        others = [other for other in self.sessions if other.user == session.user and other is not session]
        if self.is_disturbed(message, session) or not self.is_unique(message):
            return
        if message.attempts > 1:  # each copy comes for the first time
            return
        if arrival.redelivered:
            if all(other.has_gone_by(message.sent_at) for other in others):
                raise Violation(f"{message} came to {session.name} as redelivered, but nobody had it before")
        elif (
            not self.begins_live
            and self.was_only(session)
            and any(other.v1 and other.has_seen(message) and self.was_only(other) for other in others)
        ):
            raise Violation(f"{message} came to {session.name} again without redelivered")

    def was_only(self, session: SessionRecord) -> bool:
        """Tell whether a session has never met another one of its user."""
        return all(
            other is session
            or other.user != session.user
            or other.has_gone_by(session.opened_at)
            or session.has_gone_by(other.opened_at)
            for other in self.sessions
        )

    def ack(self, session: SessionRecord, seq: int) -> None:
        """Note that the relay has processed a browser's acknowledgement of everything up to `seq`."""
        at = self.tick()
        for arrival in session.arrivals[:seq]:
            session.taken.setdefault(arrival.message, at)

    # -- what follows from it ------------------------------------------------------------------------------------

    def accepted_at(self, message: Message) -> int | None:
        """Return when a message was known to be in its recipient's inbox.

        One without an id counts as accepted when its sender got the ack of a later one to the same user, and no
        error that may have been about it.
        """
        if not message.is_own:
            return message.confirmed_at
        if message.id is not None:
            return None if message.ack is None else message.ack.at
        sender = message.sender
        if sender is None or sender.loose_errors:
            return None
        return min(
            (
                other.ack.at
                for other in self.messages
                if other.sender is sender
                and other.to == message.to
                and other.number > message.number
                and other.ack
            ),
            default=None,
        )

    def is_disturbed(self, message: Message, session: SessionRecord) -> bool:
        """Tell whether a link was lost between a message's sending and now, its sender's or that of a session."""
        relays = {session.relay} | ({message.sender.relay} if message.sender is not None else set())
        if relays & self._disturbed:
            return True
        return any(at > message.sent_at for relay in relays for at in self.disturbances[relay])

    def taken_at(self, message: Message) -> int | None:
        """Return when a message had surely left its recipient's inbox; None where that is not sure.

        Everyone who might have had it from the inbox must have taken it, without a failure meanwhile.
        """
        at: int | None = None
        if self.begins_live:
            return None
        for session in self.sessions:
            if session.user != message.to or session.has_gone_by(message.sent_at):
                continue
            if at is not None and session.opened_at > at:
                break
            took = session.taken.get(message)
            if took is None or self.is_disturbed(message, session) or (session.is_lossy and not session.v1):
                return None
            if not session.v1 and self.may_be_half_written(session, message):
                return None
            at = max(at or 0, took)
        return at

    def may_be_half_written(self, session: SessionRecord, message: Message) -> bool:
        """Tell whether a message may be of the last write to a plain session, and another of that not yet written.

        A write is acknowledged to the broker as a whole.
        """
        place = next(at for at, arrival in enumerate(session.arrivals) if arrival.message is message)
        if sum(len(arrival.message.body) for arrival in session.arrivals[place:]) > _WRITE:
            return False
        end = session.ended_at or self.now
        return any(
            other.sent_at < end
            and (
                (other.to == session.user and not session.has_seen(other))
                or (other.sender is session and len(other.answers) < other.attempts)
            )
            for other in self.messages
        )

    def due(self, session: SessionRecord) -> Iterator[Message]:
        """Yield what a session must still see: accepted, and sent while it was attached for sure."""
        if not session.is_open or session.is_abandoned:
            return
        for message in self.messages:
            if message.to != session.user or session.has_seen(message) or self.accepted_at(message) is None:
                continue
            if any(epoch.end is None and epoch.start <= message.sent_at for epoch in session.epochs):
                yield message

    def unanswered(self) -> Iterator[Message]:
        """Yield what must still be answered: it had an id, and its sender's socket is there."""
        for message in self.messages:
            sender = message.sender
            if sender is None or message.id is None or not sender.is_open or sender.is_abandoned:
                continue
            if len(message.answers) < message.attempts:
                yield message
