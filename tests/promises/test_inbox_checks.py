"""An acknowledged message is in the recipient's inbox, whatever else is bound for the same user."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import gevent
import pika
import pytest

from imrelay.broker import inbox_check, known_inboxes, routes
from imrelay.broker.channel import Channel
from imrelay.broker.connection import ConnectionState
from imrelay.broker.inbox_check import InboxCheck
from imrelay.broker.route import Route
from imrelay.errors import BrokerUnavailable, RecipientUnknown
from imrelay.settings.values import InboxConfig
from tests.conftest import RelayFactory
from tests.support.brokers import amqp
from tests.support.browser import Browser
from tests.support.harness import VirtualHost, eventually
from tests.support.publishing import PATIENCE, Clock, running_publisher


@pytest.fixture(autouse=True)
def clean(broker: VirtualHost) -> None:
    """Each test begins with an empty virtual host."""
    broker.delete()
    broker.create()


@contextmanager
def suspended_queue(broker: VirtualHost, name: str) -> Iterator[None]:
    """Suspend the process of a queue: it takes what is published to it and confirms nothing."""
    lookup = f"{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r({broker._vhost}, queue, <<{json.dumps(name)}>>)), "
    find = lookup + "P = amqqueue:get_pid(Q), Pid = case P of {Name, _} -> whereis(Name); _ -> P end, "
    broker.evaluate(find + "sys:suspend(Pid), ok")
    try:
        yield
    finally:
        broker.evaluate(find + "sys:resume(Pid), ok")


@pytest.fixture(params=["audit", "exclusive"])
def other(broker: VirtualHost, request: pytest.FixtureRequest) -> Iterator[pika.channel.Channel]:
    """Another program's queue that gets all messages to `away`: of an audit, or of the article's own server."""
    with amqp(broker.url) as channel:
        channel.exchange_declare("direct_message", "direct", durable=True)
        if request.param == "audit":
            channel.queue_declare("other", durable=True)
        else:
            channel.queue_declare("other", exclusive=True)
        channel.queue_bind("other", "direct_message", "away")
        yield channel


def depth(broker: VirtualHost, user: str) -> int:
    """Return how many messages are in a user's inbox; -1 where there is none."""
    return int(broker.queues().get(f"inbox.{user}", {"messages": -1})["messages"])


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_what_is_acked_is_in_the_inbox(
    relay: RelayFactory, broker: VirtualHost, other: pika.channel.Channel, queue_type: str
) -> None:
    """Somebody else's queue for the user keeps no message from the inbox, which is made for the first one."""
    host = relay(inbox_queue_type=queue_type)
    with Browser(host, "ann") as ann:
        for number in range(3):
            ann.say("away", number, id=number)
        assert sorted(ann.ack()["id"] for _ in range(3)) == [0, 1, 2]
        with Browser(host, "away") as away:
            assert away.contents_until(2) == [0, 1, 2]
    assert other.queue_declare("other", passive=True).method.message_count == 3


def test_nobody_is_reached_by_another_programs_queue(
    relay: RelayFactory, broker: VirtualHost, other: pika.channel.Channel
) -> None:
    """Where unknown recipients are refused, one is refused whose messages somebody else would get."""
    host = relay(inbox_unknown_recipient="refuse")
    with Browser(host, "ann") as ann:
        for number in range(2):
            ann.say("away", number, id=number)
            assert ann.error()["code"] == "recipient_unknown"
        assert depth(broker, "away") == -1
        Browser(host, "away").close()
        ann.say("away", "known", id="known")
        assert ann.ack()["id"] == "known"
        with Browser(host, "away") as away:
            assert away.read()["content"] == "known"
    assert other.queue_declare("other", passive=True).method.message_count == 1


@pytest.mark.parametrize("unknown_recipient", ["create", "refuse"])
def test_an_inbox_that_has_expired_is_noticed(
    relay: RelayFactory, broker: VirtualHost, other: pika.channel.Channel, unknown_recipient: str
) -> None:
    """What the broker may have expired meanwhile counts as unknown."""
    host = relay(inbox_expires=1, inbox_unknown_recipient=unknown_recipient)
    with Browser(host, "ann") as ann:
        Browser(host, "away").close()
        ann.say("away", "first", id=1)
        assert ann.ack()["id"] == 1
        eventually(lambda: depth(broker, "away") == -1, 20)
        ann.say("away", "second", id=2)
        if unknown_recipient == "refuse":
            assert ann.error()["code"] == "recipient_unknown"
        else:
            assert ann.ack()["id"] == 2
            with Browser(host, "away") as away:
                assert away.read()["content"] == "second"


def test_an_inbox_that_was_made_with_a_shorter_life_is_noticed_when_it_expires(
    relay: RelayFactory, broker: VirtualHost, other: pika.channel.Channel
) -> None:
    """How long what is known holds depends on the inbox as it is, not on the settings of today."""
    old, new = relay(inbox_expires=1), relay(inbox_expires=1000)
    Browser(old, "away").close()
    with Browser(new, "ann") as ann:
        ann.say("away", "first", id=1)
        assert ann.ack()["id"] == 1
        eventually(lambda: depth(broker, "away") == -1, 20)
        ann.say("away", "second", id=2)
        assert ann.ack()["id"] == 2
        with Browser(new, "away") as away:
            assert away.read()["content"] == "second"


@pytest.mark.parametrize("what", ["inbox", "binding"])
@pytest.mark.parametrize("create", [True, False], ids=["create", "refuse"])
def test_what_an_operator_deletes_is_noticed_in_time(
    broker: VirtualHost, other: pika.channel.Channel, what: str, create: bool
) -> None:
    """At the latest a minute after it was made sure of, an inbox is there again; so are its bindings."""
    clock = Clock()
    with running_publisher(broker.url, create_unknown=True) as maker:
        maker.send("away", "m0")
        maker.wait()
    with running_publisher(broker.url, create_unknown=create, clock=clock) as sender:
        sender.send("away", "m1")
        assert sender.wait()["m1"] is None
        assert depth(broker, "away") == 2
        if what == "inbox":
            other.queue_delete("inbox.away")
        else:
            other.exchange_unbind("user.away", "direct_message", "away")
        clock.now += 59
        sender.send("away", "m2")
        assert sender.wait()["m2"] is None  # nobody could know
        clock.now += 2
        sender.send("away", "m3")
        sender.send("away", "m4")
        answers = sender.wait()
        if what == "inbox" and not create:
            assert isinstance(answers["m3"], RecipientUnknown)
            assert isinstance(answers["m4"], RecipientUnknown)
            assert depth(broker, "away") == -1
        else:
            assert answers["m3"] is answers["m4"] is None
            assert depth(broker, "away") == (2 if what == "inbox" else 4)


@pytest.mark.parametrize("create", [True, False], ids=["create", "refuse"])
def test_some_that_are_refused_keep_no_others_from_theirs(broker: VirtualHost, create: bool) -> None:
    """Among many first messages at once, inboxes of other settings or unknown ids cost nobody else the message."""
    odd = [f"user {number}" for number in range(0, 150, 37)]
    with amqp(broker.url) as channel:
        for user in odd:
            if create:
                channel.queue_declare(f"inbox.{user}", durable=True)
    users = [f"user {number}" for number in range(150)]
    if not create:
        with running_publisher(broker.url) as maker:
            for user in users:
                if user not in odd:
                    maker.send(user, user)
            maker.wait()
    with running_publisher(broker.url, create_unknown=create) as sender:
        for number in range(2):
            for user in users:
                sender.send(user, f"{user} {number}")
        answers = sender.wait()
    for user in users:
        for number in range(2):
            answer = answers[f"{user} {number}"]
            assert isinstance(answer, RecipientUnknown) if user in odd and not create else answer is None, user


def test_many_unknown_ids_are_refused(broker: VirtualHost) -> None:
    """First messages to more unknown ids than go out at once are all answered; somebody known is reached."""
    with running_publisher(broker.url) as maker:
        maker.send("known", "m")
        maker.wait()
    with running_publisher(broker.url, create_unknown=False) as sender:
        for number in range(400):
            sender.send("known" if number % 100 == 50 else f"unknown {number}", f"m{number}")
        answers = sender.wait()
        for number in range(400):
            answer = answers[f"m{number}"]
            assert answer is None if number % 100 == 50 else isinstance(answer, RecipientUnknown)
    assert set(broker.queues()) == {"inbox.known"}


def test_an_inbox_stays_in_use_while_it_is_renewed(broker: VirtualHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traffic that goes on over the end of what is known loses nothing and stays in order."""
    monkeypatch.setattr(inbox_check, "_KNOWN_FOR", 0.05)
    with running_publisher(broker.url) as sender:
        for number in range(600):
            sender.send("ben", f"m{number}", b"%d" % number)
            if number % 20 == 0:
                gevent.sleep(0.01)
        assert set(sender.wait().values()) == {None}
    with amqp(broker.url) as channel:
        bodies = [channel.basic_get("inbox.ben", auto_ack=True)[2] for _ in range(600)]
    assert bodies == [b"%d" % number for number in range(600)]


@pytest.mark.parametrize("failures", [1, 3])
def test_a_fault_leaves_nobody_unreachable(
    broker: VirtualHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    """Whatever goes wrong while an inbox is made sure of: it is tried again, and said."""
    left = [failures]
    check_batch = InboxCheck._check_batch

    def fail(self: InboxCheck, *arguments: object) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("something new")
        check_batch(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(InboxCheck, "_check_batch", fail)
    with running_publisher(broker.url) as sender:
        sender.send("ben", "m1")
        sender.send("ben", "m2")
        assert sender.wait() == {"m1": None, "m2": None}
        assert not sender.publisher._routes.by_user
    assert "something new" in caplog.text


def test_a_message_that_comes_back_again_and_again_is_no_tight_loop(
    relay: RelayFactory, broker: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an inbox cannot be made, its sender is told in time, and the relay rests in between."""
    asked = 0
    ask = InboxCheck.ask

    def count(self: InboxCheck, route: object) -> None:
        nonlocal asked
        asked += 1
        ask(self, route)  # type: ignore[arg-type]

    monkeypatch.setattr(InboxCheck, "ask", count)

    def find(self: InboxCheck, route: Route) -> None:
        self._on_checked(route, self._known_inbox(self._clock(), inbox_check.AS_IT_STANDS[0], None))

    monkeypatch.setattr(InboxCheck, "_check_batch", lambda self, channel, batch: find(self, batch[0]))
    monkeypatch.setattr(InboxCheck, "_check_one", find)
    with running_publisher(broker.url, timeout=1.5) as sender:
        sender.send("ben", "m1")
        error = sender.wait()["m1"]
        assert error is not None
        assert error.code == "broker_unavailable"
        assert not error.uncertain, "it came back"
        assert 2 <= asked <= 5
        eventually(lambda: not sender.publisher._routes.by_user, PATIENCE, sleep=gevent.sleep)


@pytest.mark.parametrize(
    ("queue_type", "states"), [("classic", ["ASKED", "FOUND"]), ("quorum", ["ASKED", "FOUND", "ALONE"])]
)
def test_each_state_of_a_route_is_logged(
    broker: VirtualHost, queue_type: str, states: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The first messages to a user wait for the inbox; to a quorum queue the first of them goes alone."""
    with (
        caplog.at_level(logging.DEBUG, logger="imrelay.broker.route"),
        running_publisher(broker.url, inbox=InboxConfig(queue_type=queue_type)) as sender,
    ):
        for number in range(3):
            sender.send("ben", f"m{number}")
        assert sender.wait() == {f"m{number}": None for number in range(3)}
        assert not sender.publisher._routes.by_user
    changes = [record.args for record in caplog.records if record.name == "imrelay.broker.route"]
    assert [change[1] for change in changes if isinstance(change, tuple)] == states


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_message_that_expires_before_it_is_handed_over_is_in_nobodys_way(
    broker: VirtualHost, queue_type: str
) -> None:
    """Where the broker raises an alarm when the inbox was just made sure of, the next message goes after it."""
    with running_publisher(broker.url, inbox=InboxConfig(queue_type=queue_type), timeout=1) as sender:
        publisher = sender.publisher
        checked = publisher._routes.checked

        def block(route: Route, outcome: inbox_check.Outcome) -> None:
            publisher._connection._set_state(ConnectionState.BLOCKED, "an alarm")
            checked(route, outcome)

        publisher._routes.checked = block  # type: ignore[method-assign]
        sender.send("ben", "m1")
        error = sender.wait()["m1"]
        assert isinstance(error, BrokerUnavailable)
        assert not error.uncertain
        publisher._routes.checked = checked  # type: ignore[method-assign]
        publisher._connection._set_state(ConnectionState.OPEN)
        sender.send("ben", "m2")
        assert sender.wait()["m2"] is None
        assert not publisher._routes.by_user


def test_one_inbox_that_does_not_answer_holds_up_nobody_else(
    broker: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the broker does not answer for one user, the others of that round trip go on."""
    monkeypatch.setattr(inbox_check, "_BATCH_TIMEOUT", 0.3)
    call = Channel.call

    def hang(self: Channel, *methods: object) -> object:
        if any(getattr(method, "queue", "") == "inbox.stuck" for method in methods):
            gevent.sleep(PATIENCE)
        return call(self, *methods)  # type: ignore[arg-type]

    monkeypatch.setattr(Channel, "call", hang)
    with running_publisher(broker.url, timeout=5) as sender:
        for number in range(40):
            sender.send("stuck" if number == 20 else f"user {number}", f"m{number}")
        answers = sender.wait(39)
        assert "m20" not in answers
        assert set(answers.values()) == {None}
        error = sender.wait(40)["m20"]
        assert error is not None
        assert error.code == "broker_unavailable"


def test_an_inbox_that_did_not_answer_is_asked_for_alone(
    broker: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for again beside others, it does not hold up these; nor do more such than are asked at a time."""
    monkeypatch.setattr(inbox_check, "_BATCH_TIMEOUT", 0.1)
    call = Channel.call
    is_stuck = True

    def hang(self: Channel, *methods: object) -> object:
        while is_stuck and any(str(getattr(method, "queue", "")).startswith("inbox.stuck") for method in methods):
            gevent.sleep(0.02)
        return call(self, *methods)  # type: ignore[arg-type]

    monkeypatch.setattr(Channel, "call", hang)
    with running_publisher(broker.url) as sender:
        for number in range(20):
            sender.send(f"stuck {number}", f"s{number}")
        routes = sender.publisher._routes.by_user
        failed = lambda: sum(route.failures > 0 for route in routes.values())  # noqa: E731
        eventually(lambda: failed() == 20, PATIENCE, sleep=gevent.sleep)
        monkeypatch.setattr(inbox_check, "_BATCH_TIMEOUT", 3 * PATIENCE)
        for route in list(routes.values()):
            sender.publisher._check.ask(route)
        for number in range(10):
            sender.send(f"user {number}", f"m{number}")
        assert sender.wait(10) == {f"m{number}": None for number in range(10)}
        is_stuck = False
        assert set(sender.wait(30).values()) == {None}


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_an_inbox_that_confirms_nothing_holds_up_nobody_else(broker: VirtualHost, queue_type: str) -> None:
    """As many messages to it as may be under way are answered as uncertain, and then all others go out again."""
    inbox = InboxConfig(queue_type=queue_type)
    with running_publisher(broker.url, inbox=inbox, queue_size=20, timeout=1) as sender:
        for user in ("stuck", "well"):
            sender.send(user, f"first {user}")
        assert set(sender.wait().values()) == {None}
        with suspended_queue(broker, "inbox.stuck"):
            for number in range(20):
                sender.send("stuck", f"s{number}")
            answers = sender.wait(22)
            errors = [answers[f"s{number}"] for number in range(20)]
            assert all(isinstance(error, BrokerUnavailable) and error.uncertain for error in errors)
            eventually(lambda: sender.publisher.is_ready, PATIENCE, sleep=gevent.sleep)
            for number in range(5):
                sender.send("well", f"w{number}")
            assert set(list(sender.wait(27).values())[-5:]) == {None}


def test_a_user_who_was_forgotten_while_messages_were_under_way_is_reached_again(
    broker: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an inbox confirms late, after so many others were written to, keeps no later message from it."""
    monkeypatch.setattr(known_inboxes, "_REMEMBERED", 2)
    with running_publisher(broker.url, timeout=3) as sender:
        sender.send("slow", "first")
        assert sender.wait() == {"first": None}
        with suspended_queue(broker, "inbox.slow"):
            sender.send("slow", "under way")
            for number in range(4):
                sender.send(f"other {number}", f"m{number}")
            sender.wait(5)
            assert sender.publisher._known.find("slow") is None
            sender.send("slow", "waits")
            eventually(lambda: "slow" in sender.publisher._routes.by_user, PATIENCE, sleep=gevent.sleep)
        sender.wait()
        sender.send("slow", "last")
        assert sender.wait()["last"] is None
        assert not sender.publisher._routes.by_user


@pytest.mark.parametrize("is_alone", [True, False])
def test_an_inbox_that_does_not_answer_takes_few_channels(
    broker: VirtualHost, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    """However often it is asked for, its channels, which the broker does not end, leave those that others need."""
    monkeypatch.setattr(inbox_check, "_BATCH_TIMEOUT", 0.3)
    monkeypatch.setattr(routes, "_LONGEST_PAUSE", 0.05)
    clock, asked = Clock(), []
    ask = InboxCheck.ask
    monkeypatch.setattr(InboxCheck, "ask", lambda self, route: (asked.append(route.user), ask(self, route)))
    with running_publisher(broker.url, clock=clock, timeout=4 if is_alone else 1) as sender:
        sender.send("stuck", "first")
        sender.wait()
        with suspended_queue(broker, "inbox.stuck"):
            clock.now += 100  # what is known is out of date
            number = 0
            while asked.count("stuck") < 8:
                number += 1
                sender.send("stuck", f"s{number}")
                if not is_alone:
                    sender.send(f"user {number}", f"u{number}")
                sender.wait()
            assert sender.publisher.connection.channels < 8
        eventually(lambda: sender.publisher.connection.channels <= 2, PATIENCE, sleep=gevent.sleep)
        sender.send("stuck", "last")
        assert sender.wait()["last"] is None
