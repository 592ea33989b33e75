"""A message that the broker refuses gets a final error, and delays others for a moment at most."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pika
import pytest

from imrelay.broker.codec import PublishTemplate
from imrelay.broker.refusals import Refusals
from imrelay.errors import BadMessage, ChannelLost, TooLarge
from tests.conftest import RelayFactory
from tests.support.brokers import amqp
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import VirtualHost
from tests.support.proxy import Proxy
from tests.support.publishing import running_publisher
from tests.support.tap import Method, MethodTap

LIMIT = 50_000


class _Openings(MethodTap):
    """Counts the channels that are opened, and the messages that are published."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = self.published = 0

    def on_method(self, connection: int, channel: int, method: Method, to_broker: bool) -> None:
        """Count what the relay asks for."""
        if to_broker:
            self.channels += method == (20, 10)
            self.published += method == (60, 40)


@pytest.fixture
def small_limit(broker: VirtualHost) -> Iterator[None]:
    """The node takes messages of up to `LIMIT` bytes, on channels that are opened from now on."""

    def limit(size: int) -> None:
        broker.evaluate(f"application:set_env(rabbit, max_message_size, {size})")
        broker.evaluate(f"persistent_term:put(max_message_size, {size})")  # where RabbitMQ 4 looks

    before = broker.evaluate("application:get_env(rabbit, max_message_size, 134217728)")
    limit(LIMIT)
    try:
        yield
    finally:
        limit(before)


def kept(broker: VirtualHost, user: str) -> list[bytes]:
    """Take all that is in a user's inbox."""
    found = []
    with amqp(broker.url) as channel:
        while True:
            method, _, body = channel.basic_get(f"inbox.{user}", auto_ack=True)
            if method is None:
                return found
            found.append(body)


@pytest.mark.usefixtures("small_limit")
def test_a_message_over_the_brokers_limit_stalls_nobody(relay: RelayFactory, broker: VirtualHost) -> None:
    """It is too_large, for good; all others arrive once and in order; one more channel is opened."""
    seen = _Openings()
    with Proxy(broker.url, tap=seen) as proxy:
        host = relay(broker_url=proxy.url, websocket_max_message_size=1 << 20)
        wait_until_ready(host)
        with Browser(host, "ann") as ann, Browser(host, "bob") as bob, Browser(host, "cid") as cid:
            for each in (ann, bob):
                each.say("cid", "first", id="first")
                each.ack()
                assert cid.read()["content"] == "first"
            channels = seen.channels
            large = "x" * LIMIT
            for number in range(100):
                ann.say("cid", ["ann", number], id=number)
                bob.say("cid", ["bob", number], id=number)
                if number == 50:
                    ann.say("cid", large, id="large")
            answers = [ann.read() for _ in range(101)]
            (error,) = [answer["error"] for answer in answers if "error" in answer]
            assert (error["code"], error["id"], error.get("temporary")) == ("too_large", "large", None)
            assert str(LIMIT) in error["message"]
            acked = [answer["ack"]["id"] for answer in answers if "ack" in answer]
            assert acked == list(range(100))
            assert sorted(bob.ack()["id"] for _ in range(100)) == list(range(100))
            arrived = [cid.read()["content"] for _ in range(200)]
            for sender in ("ann", "bob"):
                assert [number for name, number in arrived if name == sender] == list(range(100))
            assert cid.rest() == []
            assert seen.channels - channels <= 3, "the publisher's, one for checks, and one for the last browser"
            assert len(re.findall(" WARNING ", host.log)) == 1
            # and the next one costs nobody anything
            channels, published = seen.channels, seen.published
            bob.say("cid", large, id="large too")
            assert bob.error()["code"] == "too_large"
            assert (seen.channels, seen.published) == (channels, published)
            assert len(re.findall(" WARNING ", host.log)) == 1


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, str]:
    """What the broker refuses, by body: "channel" or "connection" is what it closes for that."""
    bodies: dict[bytes, str] = {}
    encode = PublishTemplate.encode_content

    def poisoned(self: PublishTemplate, mid: str, binary: bool, body: bytes) -> bytes:
        if body not in bodies:
            return encode(self, mid, binary, body)
        if bodies[body] == "connection":
            return encode(self, mid, binary, body)[:-1] + b"\0"  # where a frame has to end
        properties = pika.BasicProperties(expiration="never", message_id=mid)
        header = pika.frame.Header(self._channel, len(body), properties).marshal()
        return bytes(header + pika.frame.Body(self._channel, body).marshal())

    monkeypatch.setattr(PublishTemplate, "encode_content", poisoned)
    return bodies


@pytest.mark.parametrize("what", ["channel", "connection"])
def test_whatever_the_broker_refuses_is_found(broker: VirtualHost, poison: dict[bytes, str], what: str) -> None:
    """The one message is answered with what the broker said, all others arrive in order, in a few attempts."""
    poison[b"poison"] = what
    seen = _Openings()
    with Proxy(broker.url, tap=seen) as proxy, running_publisher(proxy.url) as sender:
        sender.send("don", "first", b"first")
        sender.wait()
        channels, connections = seen.channels, proxy.taken
        for number in range(60):
            sender.send("don", f"{what}{number:02}", b"poison" if number == 30 else b"%d" % number)
        answers = sender.wait()
        error = answers.pop(f"{what}30")
        assert isinstance(error, BadMessage)
        assert ("PRECONDITION_FAILED" if what == "channel" else "FRAME_ERROR") in str(error)
        assert set(answers.values()) == {None}
        # the first refusal, and those while the culprit was alone; each with a channel for checks
        assert seen.channels - channels <= (4 if what == "channel" else 6)
        assert proxy.taken - connections <= (0 if what == "channel" else 3)
        assert not sender.publisher._refusals.suspects
    bodies = [body for body in dict.fromkeys(kept(broker, "don")) if body != b"first"]
    assert bodies == [b"%d" % number for number in range(60) if number != 30]


def test_refusals_that_follow_each_other_are_answered_with_longer_pauses() -> None:
    """The pause doubles up to its bound, and begins anew after a time without refusals."""
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    pauses = []
    for _ in range(10):
        refusals.judge(ChannelLost("403 ACCESS_REFUSED - no", 403), [], [])
        pauses.append(refusals.pause)
        now[0] += refusals.pause
    assert pauses[:3] == [0.1, 0.2, 0.4]
    assert pauses[-1] == pauses[-2] == 5.0
    now[0] += 60
    refusals.judge(ChannelLost("403 ACCESS_REFUSED - no", 403), [], [])
    assert refusals.pause == 0.1


def test_another_reason_for_a_close_answers_no_message(broker: VirtualHost) -> None:
    """An exchange that is deleted, or a connection that an operator closes, costs no message its life."""
    with running_publisher(broker.url) as sender:
        for number in range(6):
            with amqp(broker.url) as channel:
                channel.exchange_delete("direct_message")
            sender.send("eve", f"e{number}", b"%d" % number)
            assert sender.wait()[f"e{number}"] is None
            broker.close_connections()
    assert list(dict.fromkeys(kept(broker, "eve"))) == [b"%d" % number for number in range(6)]


@pytest.mark.usefixtures("small_limit")
def test_a_limit_is_forgotten_with_its_connection(broker: VirtualHost) -> None:
    """After another connection, to a broker that may take more, a large message is tried once more."""
    with running_publisher(broker.url) as sender:
        sender.send("fay", "large", b"x" * (LIMIT + 1))
        assert isinstance(sender.wait()["large"], TooLarge)
        with pytest.raises(TooLarge):
            sender.send("fay", "again", b"x" * (LIMIT + 1))
        broker.evaluate("application:set_env(rabbit, max_message_size, 1000000)")
        broker.evaluate("persistent_term:put(max_message_size, 1000000)")
        broker.close_connections()
        sender.send("fay", "small", b"small")
        assert sender.wait()["small"] is None
        sender.send("fay", "at last", b"x" * (LIMIT + 1))
        assert sender.wait()["at last"] is None
