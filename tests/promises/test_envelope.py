"""`envelope = node`: users of the article's Node.js server and of the relay talk on one broker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count

import pika
import pytest

from tests.conftest import RelayFactory
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import RelayProcess, VirtualHost, eventually

_numbers = count(1)

#: A message, and the body that the article's server makes of it: `JSON.stringify` of what its library hands out.
TEXT = '{\n"from": {\n"id": "1"\n},\n"to": {\n"id": "2"\n},\n"content": "尝试 \\"RabbitMQ\\" /\u007f\u2028"\n}'
TEXT_BODY = (
    '{"type":"utf8","utf8Data":'
    '"{\\n\\"from\\": {\\n\\"id\\": \\"1\\"\\n},\\n\\"to\\": {\\n\\"id\\": \\"2\\"\\n},\\n'
    '\\"content\\": \\"尝试 \\\\\\"RabbitMQ\\\\\\" /\u007f\u2028\\"\\n}"}'
).encode()
BINARY = b'{"to":{"id":"2"}}'
BINARY_BODY = (
    b'{"type":"binary","binaryData":{"type":"Buffer","data":'
    b"[123,34,116,111,34,58,123,34,105,100,34,58,34,50,34,125,125]}}"
)


class ArticleServer:
    """The article's server as the broker sees it: its `assertExchange`, its publish, its exclusive queues."""

    def __init__(self, url: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        self._channel.exchange_declare("direct_message", "direct", durable=True)

    def push(self, user: str, body: bytes) -> None:
        """`pushToMQ`: publish with `{persistent: true}` and no other property."""
        self._channel.basic_publish("direct_message", user, body, pika.BasicProperties(delivery_mode=2))

    def consume(self, user: str) -> Iterator[bytes]:
        """`consumeToClient`: an exclusive queue bound to the exchange; the bodies that come through it."""
        queue = self._channel.queue_declare("", exclusive=True).method.queue
        self._channel.queue_bind(queue, "direct_message", user)
        deliveries = self._channel.consume(queue, auto_ack=True, inactivity_timeout=30)
        return (body for _, _, body in deliveries)

    def close(self) -> None:
        """End it."""
        self._connection.close()


@pytest.fixture
def article(broker: VirtualHost) -> Iterator[ArticleServer]:
    """An article's server on the module's virtual host, which was there before any relay."""
    server = ArticleServer(broker.url)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def host(article: ArticleServer, relay: RelayFactory) -> RelayProcess:
    """A relay that speaks as the article's server does."""
    process = relay(broker_envelope="node")
    wait_until_ready(process)
    return process


@pytest.fixture
def user() -> str:
    """An id that no other test has used."""
    return f"node-{next(_numbers)}"


def test_messages_of_the_article_server_arrive_unwrapped(
    host: RelayProcess, article: ArticleServer, user: str
) -> None:
    """What the article's server publishes arrives as its user sent it: text as text, binary as binary."""
    with Browser(host, user) as browser:
        article.push(user, TEXT_BODY)
        article.push(user, BINARY_BODY)
        assert browser.receive() == TEXT
        assert browser.receive() == BINARY
        assert browser.rest() == []


def test_they_wait_for_one_who_is_away(host: RelayProcess, article: ArticleServer, user: str) -> None:
    """A relay's user who is away finds them at the next connect."""
    Browser(host, user).close()
    article.push(user, TEXT_BODY)
    article.push(user, BINARY_BODY)
    with Browser(host, user) as browser:
        assert [browser.receive(), browser.receive()] == [TEXT, BINARY]


def test_bodies_are_wrapped_as_the_article_does(host: RelayProcess, article: ArticleServer, user: str) -> None:
    """What a relay's user sends has, to the byte, the form that the article's server parses."""
    bodies = article.consume("2")
    with Browser(host, "1") as browser:
        browser.send(TEXT)
        assert next(bodies) == TEXT_BODY
        browser.send(TEXT.encode())
        body = next(bodies)
        assert (
            body
            == json.dumps(
                {"type": "binary", "binaryData": {"type": "Buffer", "data": list(TEXT.encode())}},
                separators=(",", ":"),
            ).encode()
        )
        assert browser.rest() == []


def test_a_user_of_the_article_counts_as_known(article: ArticleServer, relay: RelayFactory, user: str) -> None:
    """Somebody at the article's server alone is reached, also where unknown recipients are refused."""
    host = relay(broker_envelope="node", inbox_unknown_recipient="refuse")
    bodies = article.consume(user)
    with Browser(host, f"{user}'s friend") as browser:
        text = browser.say(user, id="c1")
        assert browser.ack()["id"] == "c1"
        assert json.loads(next(bodies)) == {"type": "utf8", "utf8Data": text}
        browser.say("somebody else", id="c2")
        error = browser.error()
        assert (error["code"], error["id"]) == ("recipient_unknown", "c2")
        for number in range(20):
            browser.say(user, number, id=number)
        assert sorted(browser.ack()["id"] for _ in range(20)) == list(range(20))
        assert [json.loads(json.loads(next(bodies))["utf8Data"])["content"] for _ in range(20)] == list(range(20))


def test_one_user_at_both_servers(host: RelayProcess, article: ArticleServer, user: str) -> None:
    """A user with a socket at each server gets every message at both."""
    bodies = article.consume(user)
    with Browser(host, user) as browser:
        text = browser.say(user)
        assert browser.receive() == text
        assert json.loads(next(bodies))["utf8Data"] == text
        article.push(user, TEXT_BODY)
        assert browser.receive() == TEXT
        assert next(bodies) == TEXT_BODY


def test_two_relays_talk_through_the_envelope(host: RelayProcess, relay: RelayFactory, user: str) -> None:
    """Between two relays it is not seen: bytes arrive as they were, also those with an added `from`."""
    other = relay(broker_envelope="node")
    with Browser(host, user) as one, Browser(other, f"{user}'s friend") as two:
        text = one.say(two.user, "中\u0000\ud83d\ude00")
        one.send(text.encode())
        one.send(f'{{"to":{{"id":"{two.user}"}},"content":"\\ud800"}}')
        assert two.receive() == text
        assert two.receive() == text.encode()
        assert two.receive() == f'{{"from":{{"id":"{user}"}},"to":{{"id":"{two.user}"}},"content":"\\ud800"}}'


def test_what_is_not_wrapped_passes_as_it_is(host: RelayProcess, article: ArticleServer, user: str) -> None:
    """Other programs on the same broker need not know the envelope."""
    bodies = {b'{"to":{"id":"x"}}': '{"to":{"id":"x"}}', b'{"type":"utf8"}': '{"type":"utf8"}', b"\xff": b"\xff"}
    with Browser(host, user) as browser:
        for body, expected in bodies.items():
            article.push(user, body)
            assert browser.receive() == expected
        assert browser.rest() == []


def test_a_raw_relay_does_not_unwrap(
    relay: RelayFactory, article: ArticleServer, broker: VirtualHost, user: str
) -> None:
    """By default bodies are the messages themselves, in both directions."""
    host = relay()
    with Browser(host, user) as browser:
        eventually(lambda: f"inbox.{user}" in broker.queues())
        article.push(user, TEXT_BODY)
        assert browser.receive() == TEXT_BODY.decode()
        bodies = article.consume(f"{user}'s friend")
        text = browser.say(f"{user}'s friend")
        assert next(bodies) == text.encode()
