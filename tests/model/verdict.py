"""The verdict on a whole history, when all that was to come has come: every promise that was broken."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from tests.model.history import Arrival, History, Message, SessionRecord

__all__ = ["complaints"]


def complaints(history: History) -> list[str]:
    """Return what is wrong with a history that has ended: each user's last session has emptied the inbox."""
    found = []
    for message in history.messages:
        found += _of_message(history, message)
    for session in history.sessions:
        found += _of_session(history, session)
    for user in {message.to for message in history.messages}:
        found += _of_lost(history, user)
    return found


def _of_message(history: History, message: Message) -> Iterator[str]:
    seen_by = [session for session in history.sessions if session.has_seen(message)]
    if message.is_refused and seen_by:
        yield from _of_refused(history, message, seen_by)
    if message.ack is not None and message.attempts == 1:
        for session in seen_by:
            for arrival in session.arrivals:
                if arrival.message is message and session.v1 and arrival.mid != message.ack.mid:
                    yield f"{message} was acked as {message.ack.mid} and came to {session.name} as {arrival.mid}"


def _of_lost(history: History, user: str) -> Iterator[str]:
    """Complain of an accepted message that no session got, or that none of those that got it has taken.

    Only a plain socket that ended without being read to its end may take messages with it, and no more than the
    kernel held for it: "taken" means written to its TCP connection.
    """
    accepted = [m for m in history.messages if m.to == user and history.accepted_at(m) is not None]
    lost = [message for message in accepted if not _is_taken(history, message)]
    takers = [s for s in history.sessions if s.user == user and s.is_lossy and not s.v1]
    for message in lost:
        if not any(message.sent_at < (session.ended_at or 0) for session in takers):
            is_seen = any(session.has_seen(message) for session in history.sessions)
            end = "was taken by nobody, but is gone" if is_seen else "came to nobody"
            yield f"{message} was accepted and {end}"
    size, room = sum(len(message.body) for message in lost), sum(session.room for session in takers)
    if takers and size > room:
        names = ", ".join(str(message.number) for message in lost)
        yield f"messages {names} to {user} were accepted and are lost: {size} bytes, {room} may be lost"


def _is_taken(history: History, message: Message) -> bool:
    """Tell whether somebody took a message; of equal ones, it is not known which of them came."""
    has = SessionRecord.has_taken if history.is_unique(message) else SessionRecord.has_seen
    return any(has(session, message) for session in history.sessions)


def _of_refused(history: History, message: Message, seen_by: list[SessionRecord]) -> Iterator[str]:
    code = message.answers[0].code
    for session in seen_by:
        if code != "inbox_full":
            yield f"{message} got {code} for certain and came to {session.name}"
        elif _may_have_met_a_queue_that_ended(history, message):
            continue
        elif session.opened_at > message.answers[0].at or (
            history.was_only(session) and not history.begins_live  # else its live queue may have shown it
        ):
            yield f"{message} got inbox_full and was kept all the same: it came to {session.name}"


def _may_have_met_a_queue_that_ended(history: History, message: Message) -> bool:
    """Tell whether a socket of the recipient was ending when a message was sent, and with it a live queue.

    RabbitMQ refuses a message that it has routed to a queue which is gone in that moment, though the inbox has it.
    """
    answered = message.answers[0].at
    return any(
        session.user == message.to
        and session.ended_at is not None
        and session.ended_at < answered
        and not session.has_gone_by(message.sent_at)
        and not (history.was_only(session) and not history.begins_live)
        for session in history.sessions
    )


def _of_session(history: History, session: SessionRecord) -> Iterator[str]:
    firsts: dict[Message, Arrival] = {}
    for arrival in session.arrivals:
        firsts.setdefault(arrival.message, arrival)
    for later, earlier in combinations(firsts.values(), 2):
        # `earlier` came after `later` did: that is wrong if it was sent before
        if (
            _is_before(history, earlier.message, later.message)
            and not _is_copy(history, session, earlier)
            and _must_be_in_order(history, session, earlier, later)
        ):
            yield f"{earlier.message} came to {session.name} after {later.message}, which was sent later"


def _is_before(history: History, one: Message, other: Message) -> bool:
    """Tell whether a message was in the inbox, or on the same way there, before another one."""
    accepted = history.accepted_at(one)
    if not (history.is_unique(one) and history.is_unique(other)):
        return False
    if accepted is None or history.accepted_at(other) is None or one.attempts > 1 or other.attempts > 1:
        return False
    if one.sender is not None and one.sender is other.sender:
        return one.number < other.number
    return accepted < other.sent_at


def _is_copy(history: History, session: SessionRecord, arrival: Arrival) -> bool:
    """Tell whether a message may be a second copy: another session had it before, and a link was lost.

    What is published again stands behind what was published first, and the first one may have been taken.
    """
    return history.is_disturbed(arrival.message, session) and any(
        other is not session and any(a.message is arrival.message and a.at < arrival.at for a in other.arrivals)
        for other in history.sessions
    )


def _must_be_in_order(history: History, session: SessionRecord, one: Arrival, other: Arrival) -> bool:
    """Tell whether a session must get two messages in their order.

    Both were sent while it was attached without a break; or it was the only session of its user from its beginning
    on, so that all came from the inbox. (Else what waited from before it came may follow what is newer.)
    """
    sent, last = min(one.message.sent_at, other.message.sent_at), max(one.at, other.at)
    for epoch in session.epochs:
        if epoch.start <= sent and (epoch.end is None or last < epoch.end):
            return True
    if any(session.opened_at < at < last for at in history.disturbances[session.relay]):
        return False
    return all(
        another is session
        or another.user != session.user
        or another is session.resumes
        or another.has_gone_by(session.opened_at)
        or another.opened_at > last
        for another in history.sessions
    )
