"""Every message arrives once and in order: at many sockets, at changing ones, and at those who come later."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import pika
import pytest
from websocket import ABNF

from tests.conftest import RelayFactory
from tests.support.brokers import amqp
from tests.support.browser import Browser, in_background, wait_until_ready
from tests.support.harness import RelayProcess, VirtualHost, eventually

MANY = 20_000
#: The content of the message that ends a stream of numbers.
LAST = "last"
_numbers = count(1)


@pytest.fixture
def user() -> str:
    """An id that no other test has used."""
    return f"recipient-{next(_numbers)}"


class NumberSender:
    """A browser that sends ascending numbers until it is told to end, and then `LAST`."""

    def __init__(self, host: RelayProcess, to: str) -> None:
        self._browser = Browser(host, f"sender-{next(_numbers)}")
        self._to = to
        self._ending = threading.Event()
        self._sent = threading.Condition()
        #: How many numbers were sent.
        self.count = 0
        self._done = in_background(self._run)

    def _run(self) -> None:
        with self._browser:
            while not self._ending.is_set():
                if self.count % 5:
                    self._browser.say(self._to, self.count)
                else:  # so that the readers, which share a processor with it, can keep up
                    self._browser.say(self._to, self.count, id=self.count)
                    self._browser.ack()
                with self._sent:
                    self.count += 1
                    self._sent.notify_all()
            self._browser.say(self._to, LAST, id=LAST)
            answer = self._browser.ack()
            assert answer["id"] == LAST, answer

    def go_on_for(self, more: int) -> None:
        """Wait until so many more numbers have been sent."""
        with self._sent:
            target = self.count + more
            assert self._sent.wait_for(lambda: self.count >= target, 30)

    def end(self) -> list[Any]:
        """End it; return all that it has sent, when the broker has confirmed the last."""
        self._ending.set()
        self._done.result(60)
        return [*range(self.count), LAST]


# -- many sockets of one user --------------------------------------------------------------------------------


def test_each_socket_of_a_user_gets_each_message_once(relay: RelayFactory, user: str) -> None:
    """Three sockets of one id on two relays, and senders on both: everybody gets everything, in order."""
    hosts = [relay(), relay()]
    for host in hosts:
        wait_until_ready(host)
    sockets = [Browser(hosts[number % 2], user) for number in range(3)]
    readers = [in_background(socket.contents_until, LAST) for socket in sockets]
    stream = NumberSender(hosts[1], user)
    stream.go_on_for(2000)
    sent = stream.end()
    for reader in readers:
        assert reader.result(60) == sent
    with Browser(hosts[0], f"{user}'s friend") as friend:
        text = friend.say(user, "and then")
        for socket in sockets:
            assert socket.receive() == text
            socket.close()


def test_two_senders_do_not_disturb_each_other(relay: RelayFactory, user: str) -> None:
    """Every socket gets the messages of each sender in that sender's order."""
    hosts = [relay(), relay()]
    for host in hosts:
        wait_until_ready(host)
    sockets = [Browser(hosts[number % 2], user) for number in range(2)]
    senders = [Browser(host, f"{user} from {number}") for number, host in enumerate(hosts)]

    def send(sender: Browser) -> None:
        for number in range(500):
            sender.say(user, number)

    sending = [in_background(send, sender) for sender in senders]
    for socket in sockets:
        messages = [socket.read() for _ in range(1000)]
        for sender in senders:
            assert [m["content"] for m in messages if m["from"]["id"] == sender.user] == list(range(500))
    for done in sending:
        done.result(30)
    for browser in (*sockets, *senders):
        browser.close()


def _close(browser: Browser, host: RelayProcess) -> None:
    browser.close()


def _cut(browser: Browser, host: RelayProcess) -> None:
    browser.cut()


def _kill(browser: Browser, host: RelayProcess) -> None:
    host.kill()


def _stop(browser: Browser, host: RelayProcess) -> None:
    assert host.stop() == 0


ENDS = {"closed": _close, "cut": _cut, "its relay killed": _kill, "its relay stopped": _stop}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_the_end_of_the_active_socket_is_not_seen_by_the_others(
    relay: RelayFactory, user: str, end: Callable[[Browser, RelayProcess], None]
) -> None:
    """However the active socket ends under traffic, the others lose nothing and get nothing twice."""
    first_host, host = relay(clean=False), relay()
    for each in (first_host, host):
        wait_until_ready(each)
    active = Browser(first_host, user)
    others = [Browser(host, user) for _ in range(2)]
    readers = [in_background(socket.contents_until, LAST) for socket in others]
    stream = NumberSender(host, user)
    reading = in_background(active.contents_until, 500)
    assert reading.result(30) == list(range(501))
    end(active, first_host)
    stream.go_on_for(1000)
    sent = stream.end()
    for reader in readers:
        assert reader.result(60) == sent
    with Browser(host, f"{user}'s friend") as friend:
        text = friend.say(user, "and then")
        for socket in others:
            assert socket.receive() == text
            socket.close()


def test_one_socket_after_the_other_may_go(relay: RelayFactory, user: str, broker: VirtualHost) -> None:
    """Of five sockets the active one goes four times under traffic: the last gets all, and one queue is left."""
    host = relay()
    wait_until_ready(host)
    sockets = [Browser(host, user) for _ in range(5)]
    last = in_background(sockets[-1].contents_until, LAST)
    stream = NumberSender(host, user)
    for socket in sockets[:-1]:
        reader = in_background(socket.contents_until, LAST)
        stream.go_on_for(300)
        socket.cut()
        assert reader.exception(30) is not None
    stream.go_on_for(300)
    sent = stream.end()
    assert last.result(60) == sent
    eventually(lambda: [name for name in broker.queues() if user in name or "gen" in name] == [f"inbox.{user}"])
    sockets[-1].close()


# -- many messages -------------------------------------------------------------------------------------------


def _send_many(sender: Browser, to: str, milestone: threading.Event | None = None) -> None:
    """Send `MANY` numbered messages; the milestone is set when the broker has confirmed a quarter of them."""
    for number in range(MANY):
        if milestone is not None and number == MANY // 4:
            sender.say(to, number, id="quarter")
            sender.ack()
            milestone.set()
        else:
            sender.say(to, number)


def _only_inboxes_are_left(broker: VirtualHost) -> bool:
    names = broker.user_queues()
    consumers = sum(queue["consumers"] for queue in names.values())
    # two of the publisher (for inboxes and for messages), and two to talk to other relays
    return all(name.startswith("inbox.") for name in names) and not consumers and len(broker.channels()) == 4


def test_20_000_messages(relay: RelayFactory, user: str, broker: VirtualHost) -> None:
    """From one sender to one recipient: all there, in order; then no channel, no queue but inboxes is left."""
    host = relay()
    wait_until_ready(host)
    with Browser(host, f"{user}'s friend") as sender, Browser(host, user) as recipient:
        sending = in_background(_send_many, sender, user)
        assert recipient.contents_until(MANY - 1) == list(range(MANY))
        sending.result(30)
        assert recipient.rest() == sender.rest() == []
    eventually(lambda: _only_inboxes_are_left(broker))
    assert broker.queues()[f"inbox.{user}"]["messages"] == 0


def test_20_000_messages_to_one_who_was_never_here(relay: RelayFactory, user: str, broker: VirtualHost) -> None:
    """The recipient connects for the first time in the middle of them, and gets all, in order."""
    host = relay()
    wait_until_ready(host)
    with Browser(host, f"{user}'s friend") as sender:
        quarter = threading.Event()
        sending = in_background(_send_many, sender, user, quarter)
        assert quarter.wait(30)
        assert not sending.done()
        with Browser(host, user) as recipient:
            assert recipient.contents_until(MANY - 1) == list(range(MANY))
            sending.result(30)
            assert recipient.rest() == sender.rest() == []
    eventually(lambda: _only_inboxes_are_left(broker))


def test_20_000_messages_through_a_short_queue(relay: RelayFactory, user: str) -> None:
    """The same with one message under way at a time on either side of the broker."""
    host = relay(broker_prefetch=1, broker_publish_queue=1, broker_persistent=False)
    wait_until_ready(host)
    with Browser(host, f"{user}'s friend") as sender, Browser(host, user) as recipient:
        amount = MANY // 20
        sending = in_background(lambda: [sender.say(user, number, id=number) for number in range(amount)])
        assert recipient.contents_until(amount - 1) == list(range(amount))
        assert sorted(sender.ack()["id"] for _ in range(amount)) == list(range(amount))
        sending.result(30)


# -- those who are away --------------------------------------------------------------------------------------


@pytest.mark.parametrize("was_here", [True, False], ids=["was here", "was never here"])
def test_what_came_meanwhile_is_delivered_first(relay: RelayFactory, user: str, was_here: bool) -> None:
    """Messages to one who is away are kept, and come at the next connect, in order, before anything newer."""
    host, other = relay(), relay()
    for each in (host, other):
        wait_until_ready(each)
    if was_here:
        Browser(host, user).close()
    with Browser(host, f"{user}'s friend") as sender:
        for number in range(300):
            sender.say(user, number, id=number)
        assert sorted(sender.ack()["id"] for _ in range(300)) == list(range(300))
        newer = in_background(lambda: [sender.say(user, number) for number in range(300, 600)])
        with Browser(other, user) as recipient:
            assert recipient.contents_until(599) == list(range(600))
            assert recipient.rest() == []
        newer.result(30)
    with Browser(host, user) as recipient:
        assert recipient.rest() == []


def test_what_was_accepted_survives_the_relay(relay: RelayFactory, user: str) -> None:
    """Messages wait on the broker: the relay that took them may be gone when they are delivered."""
    host = relay()
    with Browser(host, f"{user}'s friend") as sender:
        texts = [sender.say(user, number, id=number) for number in range(50)]
        for _ in texts:
            sender.ack()
    assert host.stop() == 0
    with Browser(relay(), user) as recipient:
        assert [recipient.receive() for _ in texts] == texts


def test_a_graceful_stop_loses_nothing(relay: RelayFactory, user: str) -> None:
    """A relay that is stopped under traffic answers what it reads and closes with 1012; what got an ack comes."""
    host, other = relay(), relay()
    for each in (host, other):
        wait_until_ready(each)
    with Browser(host, f"{user}'s friend") as sender, Browser(other, user) as recipient:
        for number in range(1000):
            sender.say(user, number, id=number)
        host.process.send_signal(signal.SIGTERM)
        confirmed, refused = [], []
        while (message := sender.socket.recv_data(control_frame=True))[0] != ABNF.OPCODE_CLOSE:
            if message[0] == ABNF.OPCODE_TEXT:
                answer = json.loads(message[1])
                if "ack" in answer:
                    confirmed.append(answer["ack"]["id"])
                else:
                    refused.append(answer["error"]["id"])
                    assert answer["error"]["code"] == "broker_unavailable"
        assert int.from_bytes(message[1][:2], "big") == 1012
        assert confirmed == list(range(len(confirmed)))
        assert refused == list(range(len(confirmed), len(confirmed) + len(refused)))
        assert host.process.wait(60) == 0
        assert [recipient.read()["content"] for _ in confirmed] == confirmed
        assert recipient.rest() == []


def test_quorum_inboxes_work_alike(relay: RelayFactory, user: str, broker: VirtualHost) -> None:
    """`queue_type = quorum`: kept while away, once and in order at two sockets, also when the active one goes."""
    host = relay(inbox_queue_type="quorum")
    wait_until_ready(host)
    with Browser(host, f"{user}'s friend") as sender:
        sender.say(user, 0, id="c1")
        sender.ack()
        assert broker.queues()[f"inbox.{user}"]["arguments"]["x-queue-type"] == "quorum"
        active = Browser(host, user)
        assert active.contents_until(0) == [0]
        with Browser(host, user) as other:
            for number in range(1, 101):
                sender.say(user, number)
            assert active.contents_until(100) == list(range(1, 101))
            active.cut()
            for number in range(101, 200):
                sender.say(user, number)
            assert other.contents_until(199) == list(range(1, 200))


# -- other programs on the same exchange ---------------------------------------------------------------------

FOREIGN: dict[str, tuple[bytes, dict[str, Any], str | bytes]] = {
    "without properties": (b"hello \xe5\xb0\x9d", {}, "hello 尝"),
    "type text": (b"hello", {"type": "text"}, "hello"),
    "type binary": (b"hello", {"type": "binary"}, b"hello"),
    "a type of its own": (b"hello", {"type": "order.created"}, "hello"),
    "not UTF-8": (b"\xff\x00", {}, b"\xff\x00"),
    "not UTF-8, though it says text": (b"\xff\x00", {"type": "text"}, b"\xff\x00"),
    "with a message_id": (b"hello", {"message_id": "m1"}, "hello"),
    "the same message_id again": (b"hello again", {"message_id": "m1"}, "hello again"),
    "an odd message_id": (b"hello", {"message_id": 'x"\n'}, "hello"),
    "nothing in it": (b"", {}, ""),
    "no JSON": (b"{", {"content_type": "application/json", "app_id": "shop", "headers": {"a": [1]}}, "{"),
    "an old time and a low priority": (b"hello", {"timestamp": 0, "priority": 0, "delivery_mode": 1}, "hello"),
    "large": (b"x" * 300_000, {}, "x" * 300_000),
}


@pytest.mark.parametrize("here", [True, False], ids=["here", "away"])
def test_an_ordinary_program_reaches_a_user(
    relay: RelayFactory, user: str, broker: VirtualHost, here: bool
) -> None:
    """What any AMQP program publishes to `direct_message` arrives as it is, at one who is here or away."""
    host = relay()
    wait_until_ready(host)
    browser = Browser(host, user)
    if not here:
        browser.close()
    with amqp(broker.url) as channel:
        for body, properties, _ in FOREIGN.values():
            channel.basic_publish("direct_message", user, body, pika.BasicProperties(**properties), mandatory=True)
    if not here:
        browser = Browser(host, user)
    for what, (_, _, expected) in FOREIGN.items():
        assert browser.receive() == expected, what
    assert browser.rest() == []
    browser.close()


def test_an_ordinary_program_sees_what_the_relay_publishes(
    relay: RelayFactory, user: str, broker: VirtualHost
) -> None:
    """Body, `content_type`, `delivery_mode`, `message_id`, `type` and `app_id` are those of the AMQP contract."""
    with amqp(broker.url) as channel:
        for persistent, mode in ((True, 2), (False, 1)):
            host = relay(broker_persistent=persistent)
            wait_until_ready(host)
            queue = channel.queue_declare("", exclusive=True).method.queue
            channel.queue_bind(queue, "direct_message", user)
            with Browser(host, f"{user}'s friend") as sender:
                text = sender.say(user, id="c1")
                mids = [sender.ack()["mid"]]
                sender.send(text.encode())
                mids.append(sender.ack()["mid"])
            for mid, kind in zip(mids, ("text", "binary"), strict=True):
                method, properties, body = channel.basic_get(queue, auto_ack=True)
                assert (method.exchange, method.routing_key, body) == ("direct_message", user, text.encode())
                assert properties.content_type == "application/json"
                assert (properties.delivery_mode, properties.message_id) == (mode, mid)
                assert (properties.type, properties.app_id) == (kind, "imrelay")


def test_objects_on_the_broker(relay: RelayFactory, user: str, broker: VirtualHost) -> None:
    """The exchange of all, an auto-delete topic exchange per user, a durable inbox, and two bindings."""
    host = relay(inbox_ttl=60, inbox_expires=3600, inbox_max_length=7, inbox_max_bytes=9000)
    wait_until_ready(host)
    Browser(host, user).close()
    exchanges = broker.exchanges()
    both = {name: (e["type"], e["durable"], e["auto_delete"]) for name, e in exchanges.items()}
    assert both["direct_message"] == ("direct", True, False)
    assert both[f"user.{user}"] == ("topic", True, True)
    inbox = broker.queues()[f"inbox.{user}"]
    assert (inbox["durable"], inbox["auto_delete"], inbox["exclusive"]) == (True, False, False)
    assert inbox["arguments"] == {
        "x-queue-type": "classic",
        "x-single-active-consumer": True,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "imrelay.dead",
        "x-message-ttl": 60_000,
        "x-expires": 3_600_000,
        "x-max-length": 7,
        "x-max-length-bytes": 9000,
    }
    bindings = {
        (b["source_name"], b["destination_kind"], b["destination_name"], b["routing_key"])
        for b in broker.bindings()
        if user in (b["routing_key"], b["source_name"].removeprefix("user."))
    }
    assert bindings == {
        ("direct_message", "exchange", f"user.{user}", user),
        (f"user.{user}", "queue", f"inbox.{user}", "#"),
    }


def test_nothing_but_the_users_own_queues_is_bound_to_its_exchange(
    relay: RelayFactory, user: str, broker: VirtualHost
) -> None:
    """With three sockets, a sender and an id that never came; else an expired inbox leaves exchanges alive."""
    host = relay()
    wait_until_ready(host)
    with Browser(host, user) as first, Browser(host, user) as second, Browser(host, user) as third:
        first.say(f"{user}'s friend", id="c1")
        first.ack()
        text = second.say(user)
        assert first.receive() == second.receive() == third.receive() == text
        queues = broker.queues()
        bound = [row for row in broker.bindings() if row["source_name"].startswith(f"user.{user}")]
        inboxes = [row for row in bound if row["destination_name"].startswith("inbox.")]
        live = [row for row in bound if row not in inboxes]
        assert {row["source_name"].replace("user.", "inbox.") for row in inboxes} == {
            row["destination_name"] for row in inboxes
        }
        assert len(inboxes) == len(live) == 2
        for row in bound:
            assert (row["destination_kind"], row["routing_key"]) == ("queue", "#")
        for row in live:
            queue = queues[row["destination_name"]]
            assert row["source_name"] == f"user.{user}"
            assert (queue["exclusive"], queue["auto_delete"]) == (True, True)


@pytest.mark.parametrize("odd", ["a.b", "*", "#", "a.#.b", "..."])
def test_ids_of_any_look_are_routed(relay: RelayFactory, odd: str) -> None:
    """The routing key is an id, and what means something in a topic's binding means nothing in it."""
    host = relay()
    wait_until_ready(host)
    with Browser(host, odd) as browser, Browser(host, odd) as another:
        text = browser.say(odd)
        assert browser.receive() == another.receive() == text


# -- settings that have changed ------------------------------------------------------------------------------


def test_an_inbox_of_other_settings_is_used_as_it_is(relay: RelayFactory, user: str) -> None:
    """Inboxes of other settings are used as they are; the relay says so once, whoever it was."""
    users = [user, f"{user}b", f"{user}c"]
    host = relay()
    with Browser(host, f"{user}'s friend") as sender:
        for each in users[:2]:
            sender.say(each, "kept", id="c1")
            sender.ack()
        Browser(host, users[2]).close()
    host.stop()
    changed = relay(inbox_max_length=7, inbox_expires=3600, inbox_ttl=100)
    wait_until_ready(changed)
    recipients = [Browser(changed, each) for each in users]
    with Browser(changed, f"{user}'s friend") as sender:
        for recipient in recipients[:2]:
            assert recipient.read()["content"] == "kept"
        for recipient in recipients:
            text = sender.say(recipient.user, "new", id="c2")
            assert recipient.receive() == text
            assert sender.ack()["id"] == "c2"
    for recipient in recipients:
        assert recipient.rest() == []
        recipient.close()
    assert changed.log.count("other [inbox] settings") == 1


def test_changed_settings_do_not_stop_further_sockets(relay: RelayFactory, user: str) -> None:
    """Also on an inbox of other settings, a second socket gets every message, and is promoted."""
    host = relay()
    wait_until_ready(host)
    Browser(host, user).close()
    host.stop()
    changed = relay(inbox_max_length=7)
    wait_until_ready(changed)
    with Browser(changed, f"{user}'s friend") as sender, Browser(changed, user) as second:
        first = Browser(changed, user)
        text = sender.say(user, 1)
        assert first.receive() == second.receive() == text
        second.cut()
        text = sender.say(user, 2)
        assert first.receive() == text
        assert first.rest() == []
        first.close()


@pytest.mark.parametrize("has_inbox", [True, False], ids=["with an inbox", "without"])
def test_a_user_exchange_made_by_another_program_is_used(
    relay: RelayFactory, user: str, broker: VirtualHost, has_inbox: bool
) -> None:
    """Where another program has made `user.<id>` in its own way, the relay takes it as it is."""
    with amqp(broker.url) as channel:
        channel.exchange_declare(f"user.{user}", "fanout", durable=True, auto_delete=False)
        if has_inbox:
            channel.queue_declare(f"inbox.{user}", durable=True)
    host = relay(broker_publish_timeout=2)
    wait_until_ready(host)
    with Browser(host, user) as browser:
        text = browser.say(user)
        assert browser.receive() == text
