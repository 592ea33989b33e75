"""Two plain browsers talk: what arrives, how it is answered, and what a bad message does (nothing more)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from tests.conftest import RelayFactory
from tests.support.browser import ULID, Browser, wait_until_ready
from tests.support.harness import RelayProcess

_numbers = count(1)


@pytest.fixture
def somebody() -> Iterator[str]:
    """An id that no other test has used."""
    return (f"somebody-{number}" for number in _numbers)


def test_the_first_conversation(relay: RelayFactory) -> None:
    """/1 and /2 talk: each gets what the other one sent, byte for byte, text as text and binary as binary."""
    host = relay()
    with Browser(host, "1") as one, Browser(host, "2") as two:
        there = '{\n"from": {\n"id": "1"\n},\n"to": {\n"id": "2"\n},\n"content": "hello 尝试 \\u5c1d 1e400"\n}'
        back = b'{ "from":{"id":"2"},"to":{"id":"1"},"content":1e400, "more":[null,"\xe5\xb0\x9d"]}'
        one.send(there)
        assert two.receive() == there
        two.send(back)
        assert one.receive() == back
        assert one.rest() == two.rest() == []


@pytest.mark.parametrize("options", [{}, {"subprotocols": ["echo-protocol"]}], ids=["none", "echo-protocol"])
def test_plain_with_and_without_echo_protocol(
    relay: RelayFactory, somebody: Iterator[str], options: dict[str, Any]
) -> None:
    """The article's client works with its `echo-protocol` and without: messages and nothing else arrive."""
    host = relay(websocket_ping_interval=0.1)
    with Browser(host, next(somebody), **options) as one, Browser(host, next(somebody), **options) as two:
        sent = [one.say(two.user, number) for number in range(20)]
        assert [two.receive() for _ in sent] == sent
        assert one.rest() == two.rest() == []


@pytest.mark.parametrize(
    ("offered", "answered"),
    [
        (None, None),
        (["echo-protocol"], "echo-protocol"),
        (["chat", "echo-protocol", "soap"], "echo-protocol"),
        (["imrelay.token.abc", "echo-protocol"], "echo-protocol"),
        (["chat"], None),
        (["echo-protocol2", "xecho-protocol", "Echo-Protocol"], None),
    ],
)
def test_subprotocols(
    relay: RelayFactory, somebody: Iterator[str], offered: list[str] | None, answered: str | None
) -> None:
    """The relay picks a name that it knows exactly; without one it answers none and is plain all the same."""
    # websocket-client itself would give up a socket that answers none of those it offered
    header = {"Sec-WebSocket-Protocol": ", ".join(offered)} if offered else None
    with Browser(relay(), next(somebody), header=header) as browser:
        assert browser.socket.getheaders().get("sec-websocket-protocol") == answered
        text = browser.say(browser.user)
        assert browser.receive() == text


USERS = [
    "ann@example.org",
    "a.b.c",
    "...",
    "John  Smith",
    " ",
    "50% off",
    "%2F",
    "中文",
    "😀",
    "é",
    "e\u0301",
    "a+b&c=d;e",
    "what?#",
    '"quoted"',
    "back\\slash",
    "*",
    "#",
    "{}",
    "\u00a0\u2028",
    "a" * 128,
    "中" * 42,
]


def test_ids_of_all_kinds(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """Whatever is an id can be connected as, percent-encoded, and written to and from."""
    host = relay()
    with Browser(host, next(somebody)) as other:
        for user in USERS:
            with Browser(host, user) as browser:
                text = other.say(user, id="c1")
                assert browser.receive() == text, user
                assert other.ack()["id"] == "c1", user
                text = browser.say(other.user)
                assert other.receive() == text, user
                assert browser.rest() == [], user
        assert other.rest() == []


def test_ids_that_look_alike_are_different(relay: RelayFactory) -> None:
    """`a`, `A`, `a ` and both spellings of `é` are five users; nobody gets another one's message."""
    host = relay()
    users = ["a", "A", "a ", "é", "e\u0301", "a*", "1", "01"]
    browsers = [Browser(host, user) for user in users]
    for sender in browsers:
        for user in users:
            sender.say(user, sender.user)
    for browser in browsers:
        assert sorted(browser.read()["content"] for _ in users) == sorted(users)
    for browser in browsers:
        assert browser.rest() == []
        browser.close()


def test_numbers_as_ids(relay: RelayFactory) -> None:
    """An integer in JSON is the user of that decimal string."""
    host = relay()
    with Browser(host, "71") as one, Browser(host, "-72") as two:
        text = '{"from":{"id":71},"to":{"id":-72},"content":1}'
        one.send(text)
        assert two.receive() == text
        text = '{"from":{"id":"-72"},"to":{"id":71},"content":2}'
        two.send(text)
        assert one.receive() == text


def test_a_message_to_oneself_arrives_once(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """A message to oneself arrives once."""
    with Browser(relay(), next(somebody)) as browser:
        text = browser.say(browser.user)
        assert browser.receive() == text
        assert browser.rest() == []


def test_a_missing_from_is_added(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """The relay adds a missing `from`; the other bytes stay as they are."""
    host = relay()
    with Browser(host, 'q"uo\\te 中') as one, Browser(host, next(somebody)) as two:
        rest = f' "to": {{"id":"{two.user}"}} ,\t"content":1.10}}'
        one.send("{" + rest)
        one.send(("{" + rest).encode())
        text, binary = two.receive(), two.receive()
        assert isinstance(text, str)
        assert text.endswith(rest)
        assert binary == text.encode()
        assert json.loads(text)["from"] == {"id": one.user}


def test_a_message_with_an_id_gets_an_ack(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """A message with an `id` is answered once, with that `id`, a rising ULID and the time."""
    host = relay()
    before = time.time() * 1000
    with Browser(host, next(somebody)) as one, Browser(host, next(somebody)) as two:
        mids = []
        for message_id in ("c1", 7, "7", -1, "中" * 21, "a" * 64, "c1", int("7" * 64)):
            one.say(two.user, id=message_id)
            ack = one.ack()
            assert ack["id"] == message_id
            assert type(ack["id"]) is type(message_id)
            assert ULID.fullmatch(ack["mid"])
            assert before - 1 <= ack["time"] <= time.time() * 1000 + 1
            mids.append(ack["mid"])
            assert two.read()["id"] == message_id
        assert mids == sorted(set(mids))
        assert one.rest() == two.rest() == []


def test_a_message_without_an_id_gets_no_ack(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """Without an `id`, nothing comes back but what went wrong."""
    with Browser(relay(), next(somebody)) as browser:
        for _ in range(10):
            browser.say("somebody else")
        browser.say("no/body")
        rest = [json.loads(message) for message in browser.rest()]
        assert [list(message) for message in rest] == [["error"]]
        assert "id" not in rest[0]["error"]


def test_acks_come_for_many_messages_at_once(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """Each of 500 messages to 50 people, sent without waiting, is answered exactly once."""
    with Browser(relay(), next(somebody)) as browser:
        for number in range(500):
            browser.say(f"one of 50: {number % 50}", id=number)
        assert sorted(browser.ack()["id"] for _ in range(500)) == list(range(500))
        assert browser.rest() == []


DEEP = 100_000
TO = '"to":{"id":"1"}'
BAD_JSON: dict[str, str | bytes] = {
    "not JSON": "hello",
    "nothing": "",
    "not JSON, binary": b"hello",
    "not UTF-8": b'{"to":{"id":"\xff"}}',
    "a list": "[1]",
    "a string": '"hello"',
    "NaN": f'{{{TO},"content":NaN}}',
    "100,000 levels": f'{{{TO},"content":{"[" * DEEP}{"]" * DEEP}}}',
    "100,000 brackets": "[" * DEEP,
    "33 levels": f'{{{TO},"content":{"[" * 32}{"]" * 32}}}',
}
BAD_MESSAGE: dict[str, str | bytes] = {
    "no to": '{"content":"hello"}',
    "no to, binary": b"{}",
    "to is a string": '{"to":"1"}',
    "to.id is null": '{"to":{"id":null}}',
    "to.id is true": '{"to":{"id":true}}',
    "to.id is 1e400": '{"to":{"id":1e400}}',
    "to.id is an integer of 5,000 digits": f'{{"to":{{"id":{"7" * 5000}}}}}',
    "to.id is empty": '{"to":{"id":""}}',
    "to.id has 129 bytes": f'{{"to":{{"id":"{"a" * 129}"}}}}',
    "to.id has a control character": '{"to":{"id":"a\\u0000b"}}',
    "to.id has a slash": '{"to":{"id":"a/b"}}',
    "to.id is half of a surrogate pair": '{"to":{"id":"\\ud800"}}',
    "to.id is two dots": '{"to":{"id":".."}}',
    "to twice": f'{{{TO},"to":{{"id":"2"}}}}',
    "to twice, once escaped": f'{{{TO},"t\\u006f":{{"id":"2"}}}}',
    "from is a string": f'{{"from":"1",{TO}}}',
    "id is half of a surrogate pair": f'{{"id":"\\udfff",{TO}}}',
    "id is too long": f'{{"id":"{"a" * 65}",{TO}}}',
    "an answer that only another protocol has": '{"ack":1}',
    "a question that only another protocol has": '{"ping":1}',
}
MISMATCH: dict[str, str | bytes] = {
    "from somebody else": f'{{"from":{{"id":"2"}},{TO}}}',
    "from somebody else, binary": f'{{"from":{{"id":"2"}},{TO}}}'.encode(),
}


def _each_bad_input() -> Iterator[tuple[str, str | bytes, str]]:
    for code, inputs in (("bad_json", BAD_JSON), ("bad_message", BAD_MESSAGE), ("from_mismatch", MISMATCH)):
        for what, data in inputs.items():
            yield what, data, code


def test_bad_input_is_answered_and_the_socket_goes_on(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """After each bad input comes one error with its code, and then the same socket works as before."""
    host = relay(websocket_max_message_size=1_000_000)
    with Browser(host, next(somebody)) as browser, Browser(host, "1") as recipient:
        for what, data, code in _each_bad_input():
            browser.send(data)
            answer = browser.error()
            assert answer["code"] == code, what
            assert set(answer) == {"code", "message"}, what
            assert answer["message"].isprintable(), what
            assert answer["message"], what
            text = browser.say(browser.user, what)
            assert browser.receive() == text, what
        assert browser.rest() == recipient.rest() == []


def test_bad_input_in_one_go(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """All bad inputs and good messages in turn, without waiting: every one is answered, no good one is lost."""
    with Browser(relay(websocket_max_message_size=1_000_000), next(somebody)) as browser:
        inputs = list(_each_bad_input())
        for number, (_, data, _) in enumerate(inputs):
            browser.send(data)
            browser.say(browser.user, number)
        answers = [browser.read() for _ in range(2 * len(inputs))]
        assert [a["error"]["code"] for a in answers if "error" in a] == [code for _, _, code in inputs]
        assert [a["content"] for a in answers if "error" not in a] == list(range(len(inputs)))
        assert browser.rest() == []


def test_what_is_odd_but_allowed_arrives(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """1e400, 5,000 digits, half a surrogate pair, other keys twice, 32 levels: that is the recipient's matter."""
    with Browser(relay(), next(somebody)) as browser:
        to = f'"to":{{"id":"{browser.user}"}},"from":{{"id":"{browser.user}"}}'
        for content in ("1e400", "7" * 5000, '"\\ud800"', '1,"content":2', "[" * 31 + "]" * 31, '"\\u0000"'):
            text = f'{{{to},"content":{content}}}'
            browser.send(text)
            assert browser.receive() == text


def test_an_error_carries_the_id_of_its_message(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """With the `id` the sender knows which message it was; there is no ack for it."""
    with Browser(relay(), next(somebody)) as browser:
        browser.send('{"id":"c1","to":{"id":""}}')
        browser.send('{"id":2,"to":{"id":"x"},"from":{"id":"x"}}')
        assert [browser.error()["id"] for _ in range(2)] == ["c1", 2]
        assert browser.rest() == []


def test_an_unknown_recipient_is_refused_where_the_settings_say_so(
    relay: RelayFactory, somebody: Iterator[str]
) -> None:
    """`unknown_recipient = refuse`: an id that was never here is an error, one that is away or here is not."""
    host = relay(inbox_unknown_recipient="refuse")
    wait_until_ready(host)
    away, unknown = next(somebody), next(somebody)
    with Browser(host, next(somebody)) as browser:
        Browser(host, away).close()
        browser.say(unknown, id="c1")
        answer = browser.error()
        assert (answer["code"], answer["id"]) == ("recipient_unknown", "c1")
        assert "temporary" not in answer
        browser.say(unknown)
        assert browser.error().keys() == {"code", "message"}
        browser.say(away, id="c2")
        assert browser.ack()["id"] == "c2"
        with Browser(host, unknown) as known:
            assert known.rest() == []
            text = browser.say(unknown, id="c3")
            assert browser.ack()["id"] == "c3"
            assert known.receive() == text
        assert browser.rest() == []


def test_refused_and_accepted_messages_do_not_mix(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """Of messages sent in one go to someone unknown and someone known, each gets its own answer."""
    host = relay(inbox_unknown_recipient="refuse")
    unknown = next(somebody)
    with Browser(host, next(somebody)) as browser, Browser(host, next(somebody)) as known:
        for number in range(200):
            browser.say(unknown if number % 2 else known.user, number, id=number)
        answers = [browser.read() for _ in range(200)]
        refused = [answer["error"]["id"] for answer in answers if "error" in answer]
        accepted = [answer["ack"]["id"] for answer in answers if "ack" in answer]
        assert refused == list(range(1, 200, 2))
        assert sorted(accepted) == list(range(0, 200, 2))  # the broker confirms in the order that it likes
        assert known.contents_until(198) == list(range(0, 200, 2))


def test_an_unknown_recipient_gets_an_inbox_by_default(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """By default a message to an id that was never here waits for it."""
    host = relay()
    with Browser(host, next(somebody)) as browser:
        text = browser.say(unknown := next(somebody), id="c1")
        assert browser.ack()["id"] == "c1"
        with Browser(host, unknown) as known:
            assert known.receive() == text


def test_the_sender_is_told_of_a_full_inbox(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """Over `[inbox] max_length` the sender gets `inbox_full`, for now; what was accepted is all there is."""
    host = relay(inbox_max_length=3)
    away = next(somebody)
    with Browser(host, next(somebody)) as browser:
        texts = [browser.say(away, number, id=number) for number in range(5)]
        answers = [browser.read() for _ in texts]
        accepted = [answer["ack"]["id"] for answer in answers if "ack" in answer]
        refused = {answer["error"]["id"]: answer["error"] for answer in answers if "error" in answer}
        assert accepted == [0, 1, 2]
        assert list(refused) == [3, 4]
        for error in refused.values():
            assert (error["code"], error["temporary"]) == ("inbox_full", True)
        browser.say(browser.user, "others go on", id="c1")
        assert {browser.read().get("content"), browser.read().get("content")} == {"others go on", None}
        with Browser(host, away) as recipient:
            assert [recipient.receive() for _ in accepted] == texts[:3]
            assert recipient.rest() == []
            text = browser.say(away, id="c2")
            assert browser.ack()["id"] == "c2"
            assert recipient.receive() == text
        assert browser.rest() == []


def test_two_relays_carry_one_conversation(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """Whoever shares the RabbitMQ shares the users."""
    hosts: list[RelayProcess] = [relay(), relay()]
    with Browser(hosts[0], next(somebody)) as one, Browser(hosts[1], next(somebody)) as two:
        for number in range(20):
            text = one.say(two.user, number)
            assert two.receive() == text
            text = two.say(one.user, number)
            assert one.receive() == text
        assert one.rest() == two.rest() == []
