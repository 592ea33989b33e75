"""Repeats: what a relay published is shown once, and what other programs publish is all shown."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import RelayFactory
from tests.promises.test_v1 import V1, publish, wait_counts
from tests.support.browser import Browser
from tests.support.gate import Gate
from tests.support.harness import RelayProcess, VirtualHost, eventually, plain_environment

#: Messages with one id in each of these tests; and what a browser has under way unacknowledged.
MANY = 10
#: Messages of each of four browsers that the relay publishes again: together more than any 512.
AGAIN = 248

PROTOCOLS = pytest.mark.parametrize("protocols", [None, V1], ids=["plain", "v1"])
BODIES = pytest.mark.parametrize("alike", [False, True], ids=["different", "identical"])


@pytest.fixture(scope="module")
def host(broker: VirtualHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay for all tests that need none of their own."""
    options = {"broker-url": broker.url, "server-port": 0, "server-drain-timeout": 5, "broker-prefetch": MANY}
    arguments = ["serve", *(f"--{name}={value}" for name, value in options.items())]
    process = RelayProcess(tmp_path_factory.mktemp("repeats"), arguments, plain_environment())
    try:
        process.wait_until_listening()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log, process.log
    finally:
        if process.process.poll() is None:
            process.kill()


@pytest.fixture
def user() -> str:
    """An id that nobody had before."""
    return f"u{secrets.token_hex(4)}"


def publish_many(broker: VirtualHost, user: str, *, alike: bool, first: int = 0, **properties: Any) -> list[Any]:
    """Publish `MANY` messages as another program does, all with one `message_id`; return their bodies' JSON."""
    numbers = [0 if alike else first + number for number in range(MANY)]
    for number in numbers:
        publish(broker, user, b"%d" % number, message_id="one for all", **properties)
    return numbers


def shown(browser: Browser, count: int) -> list[Any]:
    """Return the next messages, and acknowledge them where that is the protocol."""
    frames = [browser.read() for _ in range(count)]
    if browser.socket.subprotocol is None:
        return frames
    browser.send(json.dumps({"ack": frames[-1]["seq"]}))
    return [frame["message"] for frame in frames]


def nothing_more(browser: Browser) -> None:
    """Expect an answer to what is no message, and nothing before it."""
    browser.send("no JSON")
    assert browser.error()["code"] == "bad_json"


def open_as(host: RelayProcess, user: str, protocols: list[str] | None) -> Browser:
    """Open a socket, and read the welcome if there is one."""
    browser = Browser(host, user, subprotocols=protocols)
    if protocols:
        assert set(browser.read()) == {"welcome"}
    return browser


# -- messages of other programs ------------------------------------------------------------------------------


@PROTOCOLS
@BODIES
def test_one_id_of_another_program_for_many_messages(
    host: RelayProcess, broker: VirtualHost, user: str, protocols: list[str] | None, alike: bool
) -> None:
    """Messages of other programs are all shown, whatever their id: to the first tab, the second, and it alone."""
    first, second = open_as(host, user, protocols), open_as(host, user, protocols)
    with first, second:
        sent = publish_many(broker, user, alike=alike)
        assert shown(first, MANY) == shown(second, MANY) == sent
        wait_counts(broker, user, 0, 0)
        first.close()
        eventually(lambda: broker.queues()[f"inbox.{user}"]["consumers"] == 1)
        with Browser(host, f"{user}-friend") as friend:
            friend.say(user, "changes over")
            assert content(second) == "changes over"
        eventually(lambda: not any(queue["exclusive"] for queue in broker.user_queues().values()))
        sent = publish_many(broker, user, alike=alike, first=MANY)
        assert shown(second, MANY) == sent
        nothing_more(second)
        wait_counts(broker, user, 0, 0)


@PROTOCOLS
@BODIES
def test_one_id_of_another_program_for_many_that_come_again(
    host: RelayProcess, broker: VirtualHost, user: str, protocols: list[str] | None, alike: bool
) -> None:
    """Messages of other programs that nobody acknowledged are all shown to the next session, whatever their id."""
    with open_as(host, user, V1) as before:
        sent = publish_many(broker, user, alike=alike)
        assert [before.read()["message"] for _ in range(MANY)] == sent
    wait_counts(broker, user, MANY, 0)
    with open_as(host, user, protocols) as browser:
        assert shown(browser, MANY) == sent
        nothing_more(browser)
        wait_counts(broker, user, 0, 0)


@BODIES
def test_a_message_of_another_program_comes_again_in_the_session(
    host: RelayProcess, broker: VirtualHost, user: str, alike: bool
) -> None:
    """imrelay.v1: what was not acknowledged when the broker went is sent again, with new numbers of its own.

    Acknowledging the numbers of before takes nothing, and nothing of before stands in the way of what follows.
    """
    with open_as(host, user, V1) as browser:
        sent = publish_many(broker, user, alike=alike)
        assert [browser.read()["message"] for _ in range(MANY)] == sent
        broker.close_connections()
        again = [browser.read() for _ in range(MANY)]
        found = [(frame["seq"], frame["message"], frame.get("redelivered")) for frame in again]
        assert found == [(MANY + 1 + number, body, True) for number, body in enumerate(sent)]
        browser.send(json.dumps({"ack": MANY}))
        nothing_more(browser)
        wait_counts(broker, user, 0, MANY)
        browser.send(json.dumps({"ack": 2 * MANY}))
        wait_counts(broker, user, 0, 0)
        sent = publish_many(broker, user, alike=alike, first=MANY)
        assert shown(browser, MANY) == sent
        nothing_more(browser)


@PROTOCOLS
@pytest.mark.parametrize(
    ("mid", "times"),
    [("", 2), ("x", 2), ("0123456789", 2), ("0123456789ABCDEF", 2), ("é" * 26, 1), ("{" * 26, 1), ("m" * 255, 2)],
)
def test_an_id_by_which_another_program_says_it_were_a_relay(
    host: RelayProcess, broker: VirtualHost, user: str, protocols: list[str] | None, mid: str, times: int
) -> None:
    """With `app_id` `imrelay` an id as long as a relay's counts as one; with any other, all is shown."""
    with open_as(host, user, protocols) as browser:
        for _ in range(2):
            publish(broker, user, b"[0]", message_id=mid, app_id="imrelay")
        publish(broker, user, b"[1]", app_id="imrelay")
        publish(broker, user, b"[2]")
        assert shown(browser, times + 2) == [[0]] * times + [[1], [2]]
        nothing_more(browser)
        wait_counts(broker, user, 0, 0)


# -- messages of relays --------------------------------------------------------------------------------------


@PROTOCOLS
def test_what_a_relay_publishes_again_is_shown_once(
    relay: RelayFactory, broker: VirtualHost, user: str, protocols: list[str] | None
) -> None:
    """All that a relay publishes again after it lost its connection is shown once, in order: over 512 messages."""
    far = relay()
    with Gate(broker.url) as gate:
        near = relay(broker_url=gate.url, broker_publish_timeout=60)
        with Browser(far, f"{user}-before") as before, open_as(far, user, protocols) as browser:
            for number in range(300):  # the memory is not empty
                before.say(user, number)
            assert [content(browser) for _ in range(300)] == list(range(300))
            senders = [Browser(near, f"{user}-{number}") for number in range(4)]
            eventually(lambda: near.log.count("connecting -> open") >= 2)
            senders[0].say(user, "this relay knows its way", id="first")
            assert senders[0].ack()["id"] == "first"
            assert content(browser) == "this relay knows its way"
            gate.hold((60, 80))
            for number in range(AGAIN):
                for sender in senders:
                    sender.say(user, [sender.user, number])
            found = [content(browser) for _ in range(4 * AGAIN)]
            gate.reset()
            gate.let_pass()
            near.wait_for_log(r"publishing (9\d\d) messages again")
            for sender in senders:
                sender.say(user, [sender.user, AGAIN], id="last")
                assert sender.ack()["id"] == "last"
                sender.close()
            found += [content(browser) for _ in range(4)]
            nothing_more(browser)
    for sender in senders:
        assert [number for name, number in found if name == sender.user] == list(range(AGAIN + 1))


def content(browser: Browser) -> Any:
    """Return the `content` of the next message, acknowledged where that is the protocol."""
    (message,) = shown(browser, 1)
    return message["content"]
