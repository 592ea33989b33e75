"""A connection's keeper goes on whatever happens to it, and waits no longer than it has to."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest
from gevent.event import Event

from imrelay.broker import connection as module
from imrelay.broker.connection import Connection, State

#: Guard against hanging, in seconds; no measure of speed.
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """End a test that hangs."""
    with gevent.Timeout(3 * PATIENCE):
        yield


class States:
    """Takes a connection's states; fails at those that it is told to."""

    def __init__(self, *fails_at: State) -> None:
        self.seen: list[State] = []
        self.fails_at = set(fails_at)
        self.came = {state: Event() for state in State}

    def __call__(self, state: State) -> None:
        self.seen.append(state)
        self.came[state].set()
        if state in self.fails_at:
            raise RuntimeError("cannot take it")


def test_a_fault_in_finding_the_broker_does_not_end_the_keeper(
    broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`urls` raises what nobody expected: it is logged, the state says WAITING, and the next attempt opens."""
    failures = [KeyError("odd"), OSError("odder")]

    def urls() -> list[str]:
        if failures:
            raise failures.pop(0)
        return [broker_url]

    states = States()
    made = Connection(urls, name="test", heartbeat=60, on_state=states)
    made.start()
    assert made.wait_open(PATIENCE)
    made.close()
    assert states.seen == [State.WAITING, State.CONNECTING, State.OPEN, State.CLOSED]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError, OSError]


def test_who_fails_to_take_a_state_does_not_disturb_the_connection(broker_url: str) -> None:
    """`on_state` raises at each change, also in the event loop: the connection opens, and comes back."""
    states = States(*State)
    made = Connection(lambda: [broker_url], name="test", heartbeat=60, on_state=states)
    made.start()
    assert made.wait_open(PATIENCE)
    states.came[State.OPEN].clear()
    made._wire._terminate_stream(RuntimeError("lost"))
    assert states.came[State.OPEN].wait(PATIENCE)
    made.close()
    assert made.is_closed


def test_a_fault_while_it_is_open_leaves_no_second_connection(
    broker_url: str, broker_ctl: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper fails at the end of a connection, opens another one, and closes with nothing left."""
    failed = Event()

    def describe(reason: BaseException) -> str:
        if failed.is_set():
            return real(reason)
        failed.set()
        raise RuntimeError("odd")

    real = module.describe
    monkeypatch.setattr(module, "describe", describe)
    states = States()
    made = Connection(lambda: [broker_url], name="test", heartbeat=60, on_state=states)
    made.start()
    assert made.wait_open(PATIENCE)
    states.came[State.OPEN].clear()
    made._wire._terminate_stream(RuntimeError("lost"))
    assert states.came[State.OPEN].wait(PATIENCE)
    assert failed.is_set()
    assert states.seen[-3:] == [State.WAITING, State.CONNECTING, State.OPEN]
    made.close()


def test_no_url_at_all_is_waited_out(caplog: pytest.LogCaptureFixture) -> None:
    """Where no URL is known it pauses as after any failure, and says so, instead of asking without a pause."""
    asked = 0

    def urls() -> list[str]:
        nonlocal asked
        asked += 1
        assert asked < 1000, "it asks without a pause"
        return []

    made = Connection(urls, name="test", heartbeat=60)
    made.start()
    gevent.sleep(0.05)
    assert made.state is State.WAITING
    assert made.problem == "no URL of a broker is known"
    made.close()
