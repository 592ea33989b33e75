"""When the publisher has no room only senders wait, in turn, and each of their messages is handled."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from itertools import count, groupby

import pytest

from tests.conftest import RelayFactory
from tests.support.browser import PATIENCE, Browser, wait_until_ready
from tests.support.gate import Gate
from tests.support.harness import RelayProcess
from tests.support.websocket_peer import PONG

_numbers = count(1)
CONFIRM = (60, 80)
#: Messages that the relay has room for.
ROOM = 4


@pytest.fixture
def user() -> str:
    """An id that no other test has used."""
    return f"sink {next(_numbers)}"


@pytest.fixture
def process(relay: RelayFactory, gate: Gate) -> Iterator[RelayProcess]:
    """A relay with little room for messages, on a way to the broker whose confirms can be held up."""
    made = relay(broker_url=gate.url, broker_publish_queue=ROOM, broker_publish_timeout=600)
    wait_until_ready(made)
    yield made
    gate.let_pass()


def fill(gate: Gate, browser: Browser, user: str) -> None:
    """Have the relay give the broker as many messages as it may, of which none is confirmed."""
    browser.say(user, 0, id=0)
    browser.ack()  # the inbox is known
    gate.hold(CONFIRM)
    for _ in range(ROOM):
        browser.say(user, 0)
    assert gate.holds.wait(PATIENCE)
    wait_read(browser)


def wait_read(browser: Browser) -> None:
    """Wait until the relay has read all that was sent, or as much as it reads of a browser that has to wait."""
    browser.socket.ping()
    assert browser.socket.recv_data(control_frame=True)[0] == PONG


def skip_first(browser: Browser) -> None:
    """Read what the fixture has sent."""
    for _ in range(1 + ROOM):
        assert browser.read()["content"] == 0


def test_senders_get_room_in_turn_and_nobody_else_waits(process: RelayProcess, gate: Gate, user: str) -> None:
    """Two senders that flood share the room, each in order; meanwhile the relay answers pings and requests."""
    each = 150
    with (
        Browser(process, f"{user} a") as one,
        Browser(process, f"{user} b") as other,
        Browser(process, f"{user} c") as idle,
    ):
        fill(gate, idle, user)
        for browser in (one, other):
            for number in range(each):
                browser.say(user, number, id=number)
        for _ in range(3):
            wait_read(idle)
            with urllib.request.urlopen(f"{process.url}/healthz", timeout=PATIENCE) as answer:
                assert answer.status == 200
        gate.let_pass()
        for browser in (one, other):
            assert [browser.ack()["id"] for _ in range(each)] == list(range(each))
    with Browser(process, user) as sink:
        skip_first(sink)
        messages = [sink.read() for _ in range(2 * each)]
    senders = [message["from"]["id"] for message in messages]
    for sender in (one.user, other.user):
        assert [message["content"] for message in messages if message["from"]["id"] == sender] == list(range(each))
    longest = max(len(list(run)) for _, run in groupby(senders[:each]))
    assert longest <= 2 * ROOM, "one of them had far more than its share"


def test_who_closes_while_its_message_waits_loses_none(process: RelayProcess, gate: Gate, user: str) -> None:
    """A browser that sends and closes at once has its close answered in time, and all of it arrives later."""
    with Browser(process, f"{user} b") as other:
        browser = Browser(process, f"{user} a")
        fill(gate, other, user)
        for number in range(50):
            browser.say(user, number)
        browser.socket.send_close(1000)
        assert browser.close_code() == 1000
        gate.let_pass()
    with Browser(process, user) as sink:
        skip_first(sink)
        assert [sink.read()["content"] for _ in range(50)] == list(range(50))
        assert sink.rest() == []
    process.wait_for_log(f"session of '{user} a': closed with 1000 '' after [0-9.]+ s, 50 received")


def test_a_stop_answers_who_waits(process: RelayProcess, gate: Gate, user: str) -> None:
    """At a stop a message that waits for room is answered before 1012: it was not accepted, certainly."""
    with Browser(process, f"{user} b") as other, Browser(process, f"{user} a") as browser:
        fill(gate, other, user)
        browser.say(user, 1, id=1)
        wait_read(browser)
        process.process.terminate()
        answer = browser.error()
        assert (answer["id"], answer["code"], "uncertain" in answer) == (1, "broker_unavailable", False)
        assert browser.close_code() == 1012
    gate.let_pass()
    assert process.process.wait(PATIENCE) == 0
