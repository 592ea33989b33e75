"""The publisher's bounds while there is no broker, without one."""

from __future__ import annotations

from typing import Any, cast

import gevent
import pytest
from gevent.event import Event

from imrelay.broker.connection import Connection, ConnectionState
from imrelay.broker.publication import OnDone, Publication
from imrelay.broker.publisher import Publisher
from imrelay.broker.topology import Topology
from imrelay.errors import AnswerableError, BrokerUnavailable
from imrelay.settings.values import InboxConfig


class NoConnection:
    """A connection that never opens."""

    state = ConnectionState.WAITING
    is_open = False
    reason = "refused"

    def start(self) -> None:
        """Begin, in vain."""

    def close(self) -> None:
        """End."""

    def wait_open(self, timeout: float) -> bool:
        """Wait, in vain."""
        gevent.sleep(timeout)
        return False


def message(mid: str, on_done: OnDone) -> Publication:
    """Return a message to somebody."""
    return Publication("ben", b"{}", binary=False, mid=mid, time_ms=0, message_id=None, on_done=on_done)


@pytest.fixture
def publisher() -> Any:
    """A publisher of room for five messages, which gives each half a second."""
    topology = Topology("direct_message", InboxConfig())
    made = Publisher(
        lambda name, on_state: cast(Connection, NoConnection()),
        topology,
        queue_size=5,
        timeout=0.5,
        persistent=True,
        create_unknown=True,
    )
    made.start()
    yield made
    made.stop()


def test_what_was_answered_does_not_pile_up(publisher: Publisher) -> None:
    """While the broker is away each message is answered in time, once, and then nothing of it is kept."""
    for batch in range(3):
        answers: list[AnswerableError | None] = []
        over = Event()

        def answered(
            publication: Publication,
            error: AnswerableError | None,
            answers: list[AnswerableError | None] = answers,
            over: Event = over,
        ) -> None:
            answers.append(error)
            if len(answers) == 5:
                over.set()

        for number in range(5):
            publisher.publish(message(f"m{batch}{number}", answered), lambda: None)
        assert over.wait(30)
        assert all(isinstance(error, BrokerUnavailable) for error in answers)
    gevent.sleep(0)
    assert not publisher._ledger
    assert not publisher._queue


def test_no_room_in_time_is_an_error(publisher: Publisher) -> None:
    """A message for which there is no room within the time limit is refused, not kept, and its sender goes on."""
    answers: list[AnswerableError | None] = []
    goes_on = Event()
    with gevent.Timeout(30):
        for number in range(5):
            assert publisher.publish(message(f"m{number}", lambda publication, error: None), raise_fault)
        publisher._ledger._timeout = 0.0
        assert not publisher.publish(
            message("x", lambda publication, error: answers.append(error)), lambda: goes_on.set()
        )
        assert goes_on.wait(30)
    assert isinstance(answers[0], BrokerUnavailable)
    assert "too many messages" in str(answers[0])
    assert "x" not in {publication.mid for publication in publisher._ledger}
    assert "x" not in {publication.mid for publication in publisher._queue}


def raise_fault() -> None:
    """Nobody has to be told of room that was there."""
    raise AssertionError


def test_the_deadlines_outlive_a_fault(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at the deadlines that fails keeps no message from being answered in time by the next look."""
    real = publisher._ledger.expire
    failed, answered = Event(), Event()

    def expire(ledger: Any) -> bool:
        if failed.is_set():
            return real()
        failed.set()
        raise RuntimeError("odd")

    monkeypatch.setattr(type(publisher._ledger), "expire", expire)
    publisher.publish(message("m", lambda publication, error: answered.set()), lambda: None)
    assert failed.wait(30)
    assert answered.wait(30)


def test_the_publisher_outlives_a_fault_of_its_recovery(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on after an exception, also where tidying up after that raises another one."""
    left, opened = Event(), Event()

    def leave() -> None:
        left.set()
        raise RuntimeError("odder")

    def open_channel() -> None:
        if left.is_set():
            opened.set()
            return gevent.sleep(0.01)
        raise RuntimeError("odd")

    monkeypatch.setattr(publisher, "_leave", leave)
    monkeypatch.setattr(publisher, "_open", open_channel)
    assert left.wait(30)
    assert opened.wait(30)
