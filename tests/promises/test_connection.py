"""The keeper of a connection survives each exception, and pauses no longer than it has to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gevent
import pytest
from gevent.event import Event

from imrelay.broker import connection as module
from imrelay.broker.connection import Connection, ConnectionState
from imrelay.errors import SetupError
from imrelay.server import Relay
from imrelay.settings.reading import load
from tests.support.harness import eventually

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """End a test that hangs."""
    with gevent.Timeout(3 * PATIENCE):
        yield


class States:
    """Takes a connection's states; fails at those that it is told to."""

    def __init__(self, *fails_at: ConnectionState) -> None:
        self.seen: list[ConnectionState] = []
        self.fails_at = set(fails_at)
        self.came = {state: Event() for state in ConnectionState}

    def __call__(self, state: ConnectionState) -> None:
        self.seen.append(state)
        self.came[state].set()
        if state in self.fails_at:
            raise RuntimeError("cannot take it")


def test_a_fault_in_finding_the_broker_does_not_end_the_keeper(
    broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`urls` raises an unexpected exception: it is logged, the state is WAITING, and the next attempt opens."""
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
    assert states.seen == [
        ConnectionState.WAITING,
        ConnectionState.CONNECTING,
        ConnectionState.OPEN,
        ConnectionState.CLOSED,
    ]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError, OSError]


def test_a_failing_state_callback_does_not_disturb_the_connection(broker_url: str) -> None:
    """`on_state` raises at each change, also in the event loop: the connection opens, and comes back."""
    states = States(*ConnectionState)
    made = Connection(lambda: [broker_url], name="test", heartbeat=60, on_state=states)
    made.start()
    assert made.wait_open(PATIENCE)
    states.came[ConnectionState.OPEN].clear()
    made._adapter.abort(RuntimeError("lost"))
    assert states.came[ConnectionState.OPEN].wait(PATIENCE)
    made.close()
    assert made.is_closed


def test_a_fault_while_it_is_open_leaves_no_second_connection(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
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
    states.came[ConnectionState.OPEN].clear()
    made._adapter.abort(RuntimeError("lost"))
    assert states.came[ConnectionState.OPEN].wait(PATIENCE)
    assert failed.is_set()
    assert states.seen[-3:] == [ConnectionState.WAITING, ConnectionState.CONNECTING, ConnectionState.OPEN]
    made.close()


def test_without_any_url_it_pauses_and_tries_again(caplog: pytest.LogCaptureFixture) -> None:
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
    assert made.state is ConnectionState.WAITING
    assert made.problem == "no URL of a broker is known"
    made.close()


class Away:
    """The way to a broker that may be away, as `urls`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_away = False
        self.asked = 0

    def __call__(self) -> list[str]:
        self.asked += 1
        if self.is_away:
            raise SetupError("away")
        return [self.url]


def wait_for(look: Callable[[], object]) -> None:
    """Wait until the answer is true, while greenlets go on."""
    eventually(look, PATIENCE, sleep=gevent.sleep)


def test_when_one_connection_opens_the_others_of_the_relay_try_at_once(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publisher and consumers are in a long pause; when one of them has opened, the other tries at once."""
    way = Away(broker_url)
    relay = Relay(load(None, {"IMRELAY_BROKER_URL": broker_url}), way)
    relay.start()
    publish, consume = relay._publisher._connection, relay._consumers._connections[0]
    wait_for(lambda: publish.is_open and consume.is_open)
    monkeypatch.setattr(module, "_pause", lambda tries: PATIENCE * 100)
    way.is_away = True
    for made in (publish, consume):
        made._adapter.abort(RuntimeError("lost"))
    wait_for(lambda: publish._is_backing_off and consume._is_backing_off)
    way.is_away = False
    gevent.sleep(0.05)
    assert publish.state is consume.state is ConnectionState.WAITING, "nobody has said that the broker is back"
    consume.hurry()
    wait_for(lambda: publish.is_open and consume.is_open)
    relay.stop(1)


def test_hurry_ends_only_the_pause_after_a_failed_attempt(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open connection stays, a closed one too, and the random pause after a loss is not cut short."""
    way = Away(broker_url)
    made = Connection(way, name="test", heartbeat=60)
    made.start()
    assert made.wait_open(PATIENCE)
    made.hurry()
    gevent.sleep(0.01)
    assert made.is_open
    monkeypatch.setattr(module.random, "uniform", lambda least, most: PATIENCE * 100)
    made._adapter.abort(RuntimeError("lost"))
    wait_for(lambda: made.state is ConnectionState.WAITING)
    for _ in range(10):
        made.hurry()
        gevent.sleep(0.01)
    assert (made.state, way.asked) == (ConnectionState.WAITING, 1)
    made.close()
    made.hurry()
    assert made.is_closed


def test_each_hurry_makes_one_attempt(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hurried attempt that fails is followed by a pause again, the first of a new row."""
    tries: list[int] = []

    def pause(number: int) -> float:
        tries.append(number)
        return PATIENCE * 100 if len(tries) > 3 else 0.0

    monkeypatch.setattr(module, "_pause", pause)
    way = Away(broker_url)
    way.is_away = True
    made = Connection(way, name="test", heartbeat=60)
    made.start()
    wait_for(lambda: len(tries) == 4)
    made.hurry()
    wait_for(lambda: len(tries) == 5)
    gevent.sleep(0.05)
    assert tries == [0, 1, 2, 3, 0]
    assert way.asked == 5
    made.close()
