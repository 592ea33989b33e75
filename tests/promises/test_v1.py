"""imrelay.v1: the welcome, numbered messages, acknowledgements that count at the broker, and what comes again."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import pika
import pytest

from imrelay import __version__
from tests.conftest import RelayFactory
from tests.support.browser import ULID, Browser
from tests.support.harness import RelayProcess, VirtualHost, eventually, plain_environment
from tests.support.websocket_peer import Peer

V1 = ["imrelay.v1"]
#: Messages that the module's relay has under way to one browser unacknowledged.
PREFETCH = 5

Open = Callable[..., Browser]


@pytest.fixture(scope="module")
def host(broker: VirtualHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay for all tests that need none of their own."""
    options = {"broker-url": broker.url, "server-port": 0, "server-drain-timeout": 5, "broker-prefetch": PREFETCH}
    arguments = ["serve", *(f"--{name}={value}" for name, value in options.items())]
    process = RelayProcess(tmp_path_factory.mktemp("v1"), arguments, plain_environment())
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


@pytest.fixture
def sender(host: RelayProcess) -> Iterator[Browser]:
    """A plain browser that writes to the user of the test."""
    with Browser(host, f"s{secrets.token_hex(4)}") as browser:
        yield browser


@pytest.fixture
def come(host: RelayProcess) -> Iterator[Open]:
    """Open v1 sessions, `come(user)`, and read their welcome; all are closed in the end."""
    with ExitStack() as stack:

        def open_session(user: str, relay: RelayProcess = host) -> Browser:
            browser = stack.enter_context(Browser(relay, user, subprotocols=V1))
            assert set(browser.read()) == {"welcome"}
            return browser

        yield open_session


def tell(sender: Browser, to: str, *contents: Any) -> list[dict[str, Any]]:
    """Send messages and return their acks: they are in the recipient's inbox then."""
    for content in contents:
        sender.say(to, content, id=str(content))
    return [sender.ack() for _ in contents]


def numbered(browser: Browser, count: int) -> list[tuple[int, Any]]:
    """Return (seq, content) of the next messages."""
    return [(frame["seq"], frame["message"]["content"]) for frame in (browser.read() for _ in range(count))]


def pinged(browser: Browser) -> None:
    """Expect an answer to a ping, and nothing before it."""
    mark = secrets.token_hex(4)
    browser.send(json.dumps({"ping": mark}))
    assert browser.read() == {"pong": mark}


def counts(broker: VirtualHost, user: str) -> tuple[int, int]:
    """Return how many messages of a user's inbox wait, and how many are delivered and not acknowledged."""
    row = broker.queues()[f"inbox.{user}"]
    return row["messages_ready"], row["messages_unacknowledged"]


def wait_counts(broker: VirtualHost, user: str, ready: int, unacknowledged: int) -> None:
    """Wait until the inbox has so many messages that wait, and so many unacknowledged."""

    def look() -> bool:
        assert counts(broker, user) == (ready, unacknowledged)
        return True

    eventually(look)


def publish(broker: VirtualHost, user: str, body: bytes, **properties: Any) -> None:
    """Publish to a user as any other AMQP program can."""
    with closing(pika.BlockingConnection(pika.URLParameters(broker.url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish(
            "direct_message", user, body, properties=pika.BasicProperties(**properties), mandatory=True
        )


# -- the welcome, and who gets one ---------------------------------------------------------------------------


def test_the_welcome_is_the_first_frame(host: RelayProcess, sender: Browser, user: str) -> None:
    """The welcome comes first, with what a client needs, also where messages wait; each session has its own."""
    tell(sender, user, "waits")
    sessions = []
    for _ in range(2):
        with Browser(host, user, subprotocols=V1) as browser:
            welcome = browser.read()["welcome"]
            sessions.append(welcome.pop("session"))
            assert welcome == {
                "id": user,
                "ping_interval": 25,
                "max_message_size": 65536,
                "server": f"imrelay/{__version__}",
            }
            assert numbered(browser, 1) == [(1, "waits")]
    assert all(ULID.fullmatch(session) for session in sessions)
    assert sessions[0] != sessions[1]


def test_the_welcome_tells_the_settings_that_hold(relay: RelayFactory) -> None:
    """`ping_interval` and `max_message_size` are those of this relay, and the id is the decoded one."""
    process = relay(websocket_ping_interval=7, websocket_max_message_size=1234)
    with Browser(process, "Zoë & Ünal", subprotocols=V1) as browser:
        welcome = browser.read()["welcome"]
        found = welcome["ping_interval"], welcome["max_message_size"], welcome["id"]
        assert found == (7, 1234, "Zoë & Ünal")


@pytest.mark.parametrize(
    ("offered", "answered"),
    [
        ("imrelay.v1", "imrelay.v1"),
        ("echo-protocol", "echo-protocol"),
        ("echo-protocol, imrelay.v1", "imrelay.v1"),
        ("imrelay.v1,echo-protocol", "imrelay.v1"),
        ("chat ,\tsuperchat,  echo-protocol", "echo-protocol"),
        ("imrelay.token.imrelay.v1, imrelay.v1", "imrelay.v1"),
        ("imrelay.token.echo-protocol", None),
        ("imrelay.v1.1", None),
        ("ximrelay.v1", None),
        ("imrelay.v", None),
        ("imrelay", None),
        ("IMRELAY.V1", None),
        ("echo-protocol2", None),
        ("chat", None),
        (None, None),
    ],
)
def test_the_subprotocol_is_an_exact_name(
    host: RelayProcess, user: str, offered: str | None, answered: str | None
) -> None:
    """Of the names offered imrelay.v1 comes first, then echo-protocol; no part of a name counts as one."""
    with Peer(SimpleNamespace(port=host.port, certificate="")) as peer:
        peer.open(f"/{user}", Sec_WebSocket_Protocol=offered)
        assert peer.answer.headers.get("sec-websocket-protocol") == answered
        with Browser(host, f"{user}-friend") as friend:
            text = friend.say(user, "hello")
            first = peer.read_message()
            if answered == "imrelay.v1":
                assert set(json.loads(first)) == {"welcome"}
            else:
                assert first == text


# -- what a message looks like -------------------------------------------------------------------------------


def test_seq_counts_from_one_in_each_session(sender: Browser, come: Open, user: str) -> None:
    """`seq` is 1, 2, 3 … in one session, and begins at 1 again in the next."""
    browser = come(user)
    tell(sender, user, "a", "b", "c")
    assert numbered(browser, 3) == [(1, "a"), (2, "b"), (3, "c")]
    browser.send('{"ack":3}')
    tell(sender, user, "d")
    assert numbered(browser, 1) == [(4, "d")]
    browser.send('{"ack":4}')
    pinged(browser)
    browser.close()
    tell(sender, user, "e", "f")
    assert numbered(come(user), 2) == [(1, "e"), (2, "f")]


@pytest.mark.parametrize(
    "text",
    [
        '{"to":{"id":"%s"},"from":{"id":"%s"},"id":"c1","content":"hello"}',
        ' {\n "id" : "c1",\t"to" : { "id" : "%s", "more":[1, 2.50] } , "from":{"id":"%s"},"x":"\\u00fc\\/ü€𝄞"}\n',
        '{"id":"c1","content":{"seq":9},"to":{"id":"%s"},"from":{"id":"%s"},"mid":"mine","redelivered":true}',
    ],
)
def test_the_senders_own_bytes_stand_inside(sender: Browser, come: Open, user: str, text: str) -> None:
    """The message stands in the frame byte for byte, with the `mid` and `time` that its sender was told."""
    text %= (user, sender.user)
    browser = come(user)
    sender.send(text)
    ack = sender.ack()
    frame = browser.receive()
    assert isinstance(frame, str)
    assert frame == f'{{"seq":1,"mid":"{ack["mid"]}","time":{ack["time"]},"message":{text}}}'
    assert ack["id"] == "c1"
    assert ULID.fullmatch(ack["mid"])


def test_binary_stays_binary(sender: Browser, come: Open, user: str) -> None:
    """A binary message comes as a binary frame of the same shape, and takes its place in the numbers."""
    browser = come(user)
    body = json.dumps({"to": {"id": user}, "from": {"id": sender.user}, "content": "ünary"}, ensure_ascii=False)
    sender.send(body.encode())
    text = sender.say(user, "text", id="t")
    binary, plain = browser.receive(), browser.receive()
    assert isinstance(binary, bytes)
    assert isinstance(plain, str)
    assert b'"message":' + body.encode() in binary
    assert f'"message":{text}' in plain
    assert [json.loads(binary)["seq"], json.loads(plain)["seq"]] == [1, 2]


@pytest.mark.parametrize(
    ("body", "properties", "inner"),
    [
        (b"plain text", {}, '"message":"plain text"'),
        (b'{"no": "to",  "x":1}', {}, '"message":{"no": "to",  "x":1}'),
        (b"[1, 2]", {}, '"message":[1, 2]'),
        (b'"a string"', {}, '"message":"a string"'),
        (b"NaN", {}, '"message":"NaN"'),
        (b'{"half":', {}, '"message":"{\\"half\\":"'),
        (b'line\nbreak \x00 "quote"', {}, '"message":"line\\nbreak \\u0000 \\"quote\\""'),
        ("Grüße 𝄞".encode(), {"type": "text"}, '"message":"Grüße 𝄞"'),
        (b"", {}, '"message":""'),
        (b"\xff\x00\xfe", {}, '"message_base64":"' + base64.b64encode(b"\xff\x00\xfe").decode() + '"'),
        (b"utf8", {"type": "binary"}, '"message":"utf8"'),
        (b"\xff", {"type": "text"}, '"message_base64":"/w=="'),
    ],
)
def test_bodies_of_other_programs(
    broker: VirtualHost, come: Open, user: str, body: bytes, properties: dict[str, Any], inner: str
) -> None:
    """Any AMQP body makes a JSON frame: JSON as it is, other UTF-8 as a string, the rest as base 64."""
    browser = come(user)
    publish(broker, user, body, **properties)
    frame = browser.receive()
    is_binary = properties.get("type") == "binary" or "message_base64" in inner
    assert isinstance(frame, bytes) is is_binary
    text = frame.decode() if isinstance(frame, bytes) else frame
    assert text == f'{{"seq":1,{inner}}}'
    json.loads(text)
    browser.send('{"ack":1}')
    wait_counts(broker, user, 0, 0)


def test_what_other_programs_say_about_a_message(broker: VirtualHost, come: Open, user: str) -> None:
    """A foreign `message_id` is the `mid`, a `timestamp` the `time`; what is not given is left out."""
    browser = come(user)
    publish(broker, user, b"1", message_id='odd "id"', timestamp=1_700_000_000)
    publish(broker, user, b"2", message_id='odd "id"')
    publish(broker, user, b"3")
    publish(broker, user, b"3")
    assert [browser.read() for _ in range(4)] == [
        {"seq": 1, "mid": 'odd "id"', "time": 1_700_000_000_000, "message": 1},
        {"seq": 2, "mid": 'odd "id"', "message": 2},
        {"seq": 3, "message": 3},
        {"seq": 4, "message": 3},
    ]


# -- acknowledgements ----------------------------------------------------------------------------------------


def test_an_ack_is_cumulative_and_reaches_the_broker(
    broker: VirtualHost, sender: Browser, come: Open, user: str
) -> None:
    """What was acknowledged up to `seq`, and nothing else, leaves the inbox; not when it was merely written."""
    browser = come(user)
    tell(sender, user, *range(5))
    assert [seq for seq, _ in numbered(browser, 5)] == [1, 2, 3, 4, 5]
    pinged(browser)
    wait_counts(broker, user, 0, 5)
    browser.send('{"ack":3}')
    wait_counts(broker, user, 0, 2)
    browser.send('{"ack":1}')  # an old one once more
    browser.send('{"ack":3}')
    pinged(browser)
    assert counts(broker, user) == (0, 2)
    browser.send('{"ack":5}')
    wait_counts(broker, user, 0, 0)


def test_an_ack_may_come_in_a_binary_frame(broker: VirtualHost, sender: Browser, come: Open, user: str) -> None:
    """Relay frames of a client may be text or binary, with keys that nobody knows."""
    browser = come(user)
    tell(sender, user, "x")
    assert numbered(browser, 1) == [(1, "x")]
    browser.send(b'{"later":[1],"ack":1}')
    wait_counts(broker, user, 0, 0)


@pytest.mark.parametrize(
    "wrong", ["3", "-1", "99999999999999999999", "1.0", "1.5", '"1"', "true", "null", "[1]", '{"id":1}', "1e0"]
)
def test_a_wrong_ack_is_refused_and_acknowledges_nothing(
    broker: VirtualHost, sender: Browser, come: Open, user: str, wrong: str
) -> None:
    """Beyond what was sent, or not an integer: `bad_message`, nothing is taken, and the session goes on."""
    browser = come(user)
    tell(sender, user, "a", "b")
    numbered(browser, 2)
    browser.send(f'{{"ack":{wrong}}}')
    error = browser.error()
    assert error["code"] == "bad_message"
    assert "temporary" not in error
    pinged(browser)
    wait_counts(broker, user, 0, 2)
    browser.send('{"ack":2}')
    wait_counts(broker, user, 0, 0)
    tell(sender, user, "c")
    assert numbered(browser, 1) == [(3, "c")]


def test_an_ack_of_another_session_is_beyond_what_was_sent(sender: Browser, come: Open, user: str) -> None:
    """A `seq` counts in its own session: a second session cannot acknowledge what the first one got."""
    first = come(user)
    tell(sender, user, "a", "b")
    numbered(first, 2)
    second = come(user)
    second.send('{"ack":2}')
    assert second.error()["code"] == "bad_message"
    second.close()
    first.close()
    assert numbered(come(user), 2) == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("how", ["close", "cut"])
def test_what_was_not_acknowledged_comes_again(
    broker: VirtualHost, sender: Browser, come: Open, user: str, how: str
) -> None:
    """The next session gets what was not acknowledged, in order, with the same `mid`, flagged; nothing else."""
    first = come(user)
    mids = {ack["id"]: ack["mid"] for ack in tell(sender, user, *"abcde")}
    numbered(first, 5)
    first.send('{"ack":2}')
    wait_counts(broker, user, 0, 3)
    getattr(first, how)()
    wait_counts(broker, user, 3, 0)
    mids |= {ack["id"]: ack["mid"] for ack in tell(sender, user, "f")}
    frames = [(second := come(user)).read()]
    frames += [second.read() for _ in range(3)]
    found = [(f["seq"], f["message"]["content"], f["mid"], f.get("redelivered", False)) for f in frames]
    assert found == [
        (1, "c", mids["c"], True),
        (2, "d", mids["d"], True),
        (3, "e", mids["e"], True),
        (4, "f", mids["f"], False),
    ]
    second.send('{"ack":4}')
    wait_counts(broker, user, 0, 0)
    second.close()
    pinged(come(user))


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_visits_without_an_ack_lose_nothing(
    relay: RelayFactory, broker: VirtualHost, user: str, queue_type: str
) -> None:
    """A browser that fails on a message comes back 25 times: it gets all again each time, in order."""
    host = relay(inbox_queue_type=queue_type, broker_prefetch=PREFETCH)
    with Browser(host, f"{user}'s friend") as friend:
        tell(friend, user, *range(PREFETCH + 2))
    for visit in range(25):
        with Browser(host, user, subprotocols=V1) as browser:
            browser.read()  # the welcome
            frames = [browser.read() for _ in range(PREFETCH)]
            assert [frame["message"]["content"] for frame in frames] == list(range(PREFETCH)), visit
            assert all(frame.get("redelivered", False) is (visit > 0) for frame in frames)
        eventually(lambda: broker.queues()[f"inbox.{user}"]["messages_ready"] == PREFETCH + 2)
    with Browser(host, user, subprotocols=V1) as browser:
        browser.read()
        for number in range(PREFETCH + 2):
            assert browser.read()["message"]["content"] == number
            browser.send(json.dumps({"ack": number + 1}))
        eventually(lambda: broker.queues()[f"inbox.{user}"]["messages"] == 0)


def test_no_more_than_prefetch_are_under_way(broker: VirtualHost, sender: Browser, come: Open, user: str) -> None:
    """`prefetch` messages are sent without an acknowledgement, then as many more as were acknowledged."""
    tell(sender, user, *range(3 * PREFETCH))
    browser = come(user)
    assert [seq for seq, _ in numbered(browser, PREFETCH)] == list(range(1, PREFETCH + 1))
    wait_counts(broker, user, 2 * PREFETCH, PREFETCH)
    pinged(browser)
    browser.send('{"ack":2}')
    assert [seq for seq, _ in numbered(browser, 2)] == [PREFETCH + 1, PREFETCH + 2]
    wait_counts(broker, user, 2 * PREFETCH - 2, PREFETCH)
    pinged(browser)
    for seq in range(PREFETCH + 2, 3 * PREFETCH):
        browser.send(json.dumps({"ack": seq}))
        assert numbered(browser, 1) == [(seq + 1, seq)]


def test_who_never_acknowledges_is_ended(relay: RelayFactory, broker: VirtualHost, user: str) -> None:
    """A message unacknowledged over `ack_timeout` ends its session with 4408 and goes to the next one.

    Idle sessions, those that acknowledge in time, and plain ones, which never do, stay open.
    """
    process = relay(websocket_ack_timeout=1)
    with (
        Browser(process, user, subprotocols=V1) as silent,
        Browser(process, f"{user}-idle", subprotocols=V1) as idle,
        Browser(process, f"{user}-good", subprotocols=V1) as good,
        Browser(process, f"{user}-plain") as plain,
    ):
        for browser in (silent, idle, good):
            browser.read()
        tell(plain, f"{user}-good", "taken")
        numbered(good, 1)
        good.send('{"ack":1}')
        plain.say(f"{user}-plain", "to myself")
        plain.read()
        tell(plain, user, "a", "b", "c")
        numbered(silent, 3)
        silent.send('{"ack":1}')
        assert silent.close_code() == 4408
        with Browser(process, user, subprotocols=V1) as browser:
            browser.read()
            assert numbered(browser, 2) == [(1, "b"), (2, "c")]
            browser.send('{"ack":2}')
            wait_counts(broker, user, 0, 0)
            for each in (browser, idle, good):
                pinged(each)
        tell(plain, user, "still here")
    process.wait_for_log("ack_timeout")


# -- more than one socket of a user --------------------------------------------------------------------------


def test_two_sessions_of_a_user_count_for_themselves(
    broker: VirtualHost, sender: Browser, come: Open, user: str
) -> None:
    """Each session gets every message with its own numbers; what the second has got it does not get again.

    When the first goes without having acknowledged, the inbox still has its messages: those that the second has
    acknowledged leave it now, the others when it acknowledges them.
    """
    first = come(user)
    tell(sender, user, "a")
    assert numbered(first, 1) == [(1, "a")]
    second = come(user)
    tell(sender, user, "b", "c", "d")
    assert numbered(first, 3) == [(2, "b"), (3, "c"), (4, "d")]
    assert numbered(second, 3) == [(1, "b"), (2, "c"), (3, "d")]
    second.send('{"ack":2}')
    wait_counts(broker, user, 0, 4)
    first.close()
    frame = second.read()  # the one that only the first had got
    assert (frame["seq"], frame["message"]["content"], frame["redelivered"]) == (4, "a", True)
    wait_counts(broker, user, 0, 2)
    tell(sender, user, "e")
    assert numbered(second, 1) == [(5, "e")]
    second.send('{"ack":5}')
    wait_counts(broker, user, 0, 0)


def test_a_standing_by_session_loses_nothing_when_both_go(
    broker: VirtualHost, sender: Browser, come: Open, user: str
) -> None:
    """What neither of two sessions has acknowledged is there for the third, once."""
    first, second = come(user), come(user)
    tell(sender, user, "a", "b")
    assert numbered(first, 2) == numbered(second, 2) == [(1, "a"), (2, "b")]
    first.cut()
    pinged(second)
    second.cut()
    third = come(user)
    assert numbered(third, 2) == [(1, "a"), (2, "b")]
    third.send('{"ack":2}')
    wait_counts(broker, user, 0, 0)
    pinged(third)


# -- the rest of the protocol --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["null", "0", "-1.5e3", '"text \\" ü€𝄞"', "[1,{}]", '{"a":{"to":1}}', "12345678901234567890", "true"]
)
def test_ping_and_pong(come: Open, user: str, value: str) -> None:
    """A `ping` is answered with a `pong` of the same value."""
    browser = come(user)
    browser.send(f'{{"ping":{value}}}')
    assert browser.read() == {"pong": json.loads(value)}


def test_a_ping_that_no_pong_could_hold_is_a_bad_message(come: Open, user: str) -> None:
    """A number that is too large is not answered by what is no JSON, and the session goes on."""
    browser = come(user)
    browser.send('{"ping":1e400}')
    assert browser.error()["code"] == "bad_message"
    pinged(browser)


def test_what_plain_clients_may_do_holds_as_well(sender: Browser, come: Open, user: str) -> None:
    """Acks of what was sent, error frames with their `id`, and a `from` that is added, as for plain clients."""
    browser = come(user)
    browser.send(json.dumps({"id": 7, "to": {"id": sender.user}, "content": "hello"}))
    assert browser.ack()["id"] == 7
    assert sender.read() == {"id": 7, "from": {"id": user}, "to": {"id": sender.user}, "content": "hello"}
    browser.send('{"id":"x"}')
    assert (error := browser.error())["code"] == "bad_message"
    assert error["id"] == "x"
    browser.send(json.dumps({"id": "y", "from": {"id": "else"}, "to": {"id": user}}))
    assert (error := browser.error())["code"] == "from_mismatch"
    assert error["id"] == "y"
    browser.send("no JSON")
    assert browser.error()["code"] == "bad_json"
    pinged(browser)


def test_a_message_may_have_an_ack_or_a_ping_in_it(sender: Browser, come: Open, user: str) -> None:
    """What has a `to` is a message, whatever else is in it."""
    browser = come(user)
    text = sender.say(user, "x", ack=1, ping=2)
    frame = browser.receive()
    assert isinstance(frame, str)
    assert f'"message":{text}' in frame
    own = browser.say(user, "y", ack=99, ping=2)
    frame = browser.receive()
    assert isinstance(frame, str)
    assert f'"message":{own}' in frame


@pytest.mark.parametrize("subprotocols", [None, ["echo-protocol"]])
def test_plain_clients_have_no_acks_and_pings(
    host: RelayProcess, broker: VirtualHost, user: str, subprotocols: list[str] | None
) -> None:
    """To a plain client `ack` and `ping` are no frames: `bad_message`; it gets bare messages, and no welcome."""
    with Browser(host, user, subprotocols=subprotocols) as browser:
        text = browser.say(user, "first")
        assert browser.receive() == text
        for frame in ('{"ack":1}', '{"ack":"x"}', '{"ack":99}', '{"ping":1}'):
            browser.send(frame)
            assert browser.error()["code"] == "bad_message"
        wait_counts(broker, user, 0, 0)  # written is taken
        text = browser.say(user, "last")
        assert browser.receive() == text


def test_messages_to_plain_and_v1_sockets_of_one_user(
    host: RelayProcess, broker: VirtualHost, sender: Browser, come: Open, user: str
) -> None:
    """A plain socket and a v1 session of one user both get everything, whichever came first."""
    with Browser(host, user) as plain:
        session = come(user)
        text = sender.say(user, "a")
        assert plain.receive() == text
        assert numbered(session, 1) == [(1, "a")]
    wait_counts(broker, user, 0, 0)
    tell(sender, user, "b")
    assert numbered(session, 1) == [(2, "b")]
    session.send('{"ack":2}')
    wait_counts(broker, user, 0, 0)
    with Browser(host, user) as plain:
        text = sender.say(user, "c")
        assert plain.receive() == text
        assert numbered(session, 1) == [(3, "c")]
        session.close()
        wait_counts(broker, user, 0, 0)
        assert plain.rest() == []
