"""A browser that comes back names its former session: that is ended first, on whichever relay it is."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import gevent
import pika
import pytest

from imrelay.broker import relay_queue, reminders
from imrelay.broker.connection import Connection
from imrelay.broker.relay_queue import RelayQueue
from imrelay.messages.message_ids import MessageIds
from imrelay.sessions.subprotocols import resumed_session
from tests.conftest import RelayFactory
from tests.promises.test_v1 import V1, pinged, tell, wait_counts
from tests.support.brokers import frozen
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import RelayProcess, VirtualHost, eventually, plain_environment
from tests.support.proxy import Proxy

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0
SESSION = "01M86BASS104VVZHPGE9D087FJ"

Return = Callable[..., "Visit"]


class Visit(Browser):
    """A v1 session, whose welcome has been read."""

    def __init__(
        self, host: RelayProcess, user: str, *, resumes: str = "", protocols: tuple[str, ...] = ()
    ) -> None:
        offered = [*V1, *protocols] + ([f"imrelay.resume.{resumes}"] if resumes else [])
        super().__init__(host, user, subprotocols=offered)
        assert self.socket.subprotocol == "imrelay.v1"
        #: The session that its welcome named.
        self.session: str = self.read()["welcome"]["session"]

    def contents(self, count: int) -> list[object]:
        """Return the contents of the next messages, which are not acknowledged."""
        return [self.read()["message"]["content"] for _ in range(count)]


@pytest.fixture(scope="module")
def hosts(broker: VirtualHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RelayProcess]]:
    """Two relays for all tests that need none of their own."""
    options = {"broker-url": broker.url, "server-port": 0, "server-drain-timeout": 5}
    arguments = ["serve", *(f"--{name}={value}" for name, value in options.items())]
    started = [RelayProcess(tmp_path_factory.mktemp("resume"), arguments, plain_environment()) for _ in range(2)]
    try:
        for process in started:
            process.wait_until_listening()
            wait_until_ready(process)
        eventually(lambda: len(relay_queues(broker)) == 2)
        yield started
        for process in started:
            assert process.stop() == 0
            assert "Traceback" not in process.log, process.log
    finally:
        for process in started:
            if process.process.poll() is None:
                process.kill()


@pytest.fixture
def user() -> str:
    """An id that nobody had before."""
    return f"u{secrets.token_hex(4)}"


@pytest.fixture
def sender(hosts: list[RelayProcess]) -> Iterator[Browser]:
    """A plain browser that writes to the user of the test."""
    with Browser(hosts[0], f"s{secrets.token_hex(4)}") as browser:
        yield browser


@pytest.fixture
def come(hosts: list[RelayProcess]) -> Iterator[Return]:
    """Open v1 sessions, `come(user, relay, resumes=session)`; all are closed in the end."""
    with ExitStack() as stack:

        def open_session(user: str, relay: RelayProcess = hosts[0], **more: object) -> Visit:
            return stack.enter_context(Visit(relay, user, **more))  # type: ignore[arg-type]

        yield open_session


def relay_queues(broker: VirtualHost) -> list[str]:
    """Return the names of the queues of relays that are consumed."""
    return [name for name, row in broker.queues().items() if name.startswith("relay.") and row["consumers"]]


@pytest.mark.parametrize("far", [0, 1], ids=["same relay", "other relay"])
def test_who_comes_back_gets_everything_in_order(
    broker: VirtualHost, hosts: list[RelayProcess], sender: Browser, come: Return, user: str, far: int
) -> None:
    """What the half-open session has not acknowledged comes before anything newer, and that session is ended."""
    old = come(user)
    tell(sender, user, 1, 2, 3)
    assert old.contents(3) == [1, 2, 3]
    new = come(user, hosts[far], resumes=old.session)
    tell(sender, user, 4, 5, 6)
    assert new.contents(6) == [1, 2, 3, 4, 5, 6]
    new.send('{"ack":6}')
    wait_counts(broker, user, 0, 0)
    assert old.close_code() == 4409
    tell(sender, user, 7)
    assert new.contents(1) == [7]
    assert new.session != old.session


@pytest.mark.parametrize("far", [0, 1], ids=["same relay", "other relay"])
def test_a_session_that_has_just_ended_is_waited_for(
    hosts: list[RelayProcess], sender: Browser, come: Return, user: str, far: int
) -> None:
    """A browser that was cut off and is back at once is not taken for a second tab."""
    visit = come(user)
    for first in range(0, 60, 6):
        tell(sender, user, first, first + 1, first + 2)
        assert visit.contents(3) == [first, first + 1, first + 2]
        visit.cut()
        visit = come(user, hosts[far * (first // 6 + 1) % 2], resumes=visit.session)
        tell(sender, user, first + 3, first + 4, first + 5)
        assert visit.contents(6) == list(range(first, first + 6))
        visit.send('{"ack":6}')
        pinged(visit)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_who_does_not_read_any_more_is_not_waited_for(
    relay: RelayFactory, broker: VirtualHost, user: str, queue_type: str
) -> None:
    """The old connection takes nothing, its buffers are full, and its close frame is never answered."""
    host, other = (relay(inbox_queue_type=queue_type, websocket_send_timeout=600) for _ in range(2))
    for process in (host, other):
        wait_until_ready(process)
    eventually(lambda: len(relay_queues(broker)) >= 2)
    with Browser(host, f"{user}-sender") as sender, Visit(host, user) as old:
        for number in range(100):
            sender.say(user, [number, "x" * 60_000], id=number)
        for _ in range(100):
            sender.ack()
        with Visit(other, user, resumes=old.session) as new:
            found = []
            for _ in range(100):
                frame = new.read()
                new.send(json.dumps({"ack": frame["seq"]}))
                found.append(frame["message"]["content"][0])
            assert found == list(range(100))
            pinged(new)
        old.cut()


def test_without_resume_it_is_as_before(broker: VirtualHost, sender: Browser, come: Return, user: str) -> None:
    """A second session that resumes nothing is a second tab: the first one stays, and both get what is new."""
    first = come(user)
    tell(sender, user, 1)
    assert first.contents(1) == [1]
    second = come(user)
    tell(sender, user, 2)
    assert first.contents(1) == second.contents(1) == [2]
    pinged(first)
    pinged(second)


@pytest.mark.parametrize("far", [0, 1], ids=["same relay", "other relay"])
def test_nobody_ends_the_session_of_another_user(
    hosts: list[RelayProcess], sender: Browser, come: Return, user: str, far: int
) -> None:
    """A browser that names the session of another user gets a new session, and the named one goes on."""
    victim = come(user)
    with Visit(hosts[far], f"{user}-other", resumes=victim.session) as other:
        pinged(other)
        tell(sender, user, 1)
        assert victim.contents(1) == [1]
        pinged(victim)


def test_two_sockets_may_resume_the_same_session(
    hosts: list[RelayProcess], sender: Browser, come: Return, user: str
) -> None:
    """The session is ended once, and both that resume it live on as two tabs."""
    old = come(user, hosts[1])
    tell(sender, user, 1)
    assert old.contents(1) == [1]
    first = come(user, resumes=old.session)
    assert first.contents(1) == [1]
    second = come(user, hosts[1], resumes=old.session)
    tell(sender, user, 2)
    assert first.contents(1) == second.contents(1) == [2]
    pinged(first)


def test_resuming_while_the_broker_is_away(
    broker: VirtualHost, hosts: list[RelayProcess], sender: Browser, come: Return, user: str
) -> None:
    """Where nothing can be said to the other relay the handshake does not wait, and nothing is lost."""
    olds = [come(f"{user}-{number}", hosts[number]) for number in (0, 1)]
    for old in olds:
        tell(sender, old.user, 1, 2, 3)
        assert old.contents(3) == [1, 2, 3]
    broker.close_connections()
    news = [come(old.user, resumes=old.session) for old in olds]
    for new in news:
        tell(sender, new.user, 4, 5, 6)
    assert news[0].contents(6) == [1, 2, 3, 4, 5, 6]
    olds[1].close()
    assert sorted(map(str, news[1].contents(6))) == list("123456")
    eventually(lambda: len(relay_queues(broker)) == 2)  # they come back by themselves
    newest = come(user, hosts[1])
    tell(sender, user, 1)
    assert newest.contents(1) == [1]
    assert come(user, resumes=newest.session).contents(1) == [1]


def test_the_relay_of_the_session_is_gone(
    relay: RelayFactory, broker: VirtualHost, hosts: list[RelayProcess], sender: Browser, come: Return, user: str
) -> None:
    """After its relay was killed a session is resumed elsewhere: everything comes, in order."""
    doomed = relay(clean=False)
    wait_until_ready(doomed)
    old = Visit(doomed, user)
    tell(sender, user, 1, 2, 3)
    assert old.contents(3) == [1, 2, 3]
    doomed.kill()
    wait_counts(broker, user, 3, 0)
    new = come(user, resumes=old.session)
    tell(sender, user, 4, 5, 6)
    assert new.contents(6) == [1, 2, 3, 4, 5, 6]


def test_the_relay_of_the_session_does_not_answer(
    relay: RelayFactory, broker: VirtualHost, sender: Browser, come: Return, user: str
) -> None:
    """The handshake waits a moment for a relay that is paused; then the session opens."""
    silent = relay()
    wait_until_ready(silent)
    eventually(lambda: len(relay_queues(broker)) == 3)
    with Visit(silent, user) as old:
        with frozen(silent.pid):
            new = come(user, resumes=old.session)
            tell(sender, user, 1)
            assert new.contents(1) == [1]
        assert old.close_code() == 4409  # what was asked is done in the end
        tell(sender, user, 2)
        assert new.contents(1) == [2]


@pytest.mark.parametrize(
    "resumed", ["", "x", SESSION, SESSION.lower(), SESSION + "0", "é" * 26, "8" + SESSION[1:], f"{SESSION} x"]
)
def test_what_cannot_be_resumed_does_no_harm(
    hosts: list[RelayProcess], sender: Browser, user: str, resumed: str
) -> None:
    """A session that is unknown, gone or malformed is not waited for, and the handshake succeeds."""
    header = [f"Sec-WebSocket-Protocol: imrelay.v1, imrelay.resume.{resumed}".encode().decode("latin-1")]
    with Browser(hosts[0], user, header=header) as browser:
        assert set(browser.read()) == {"welcome"}
        pinged(browser)


@pytest.mark.parametrize("offered", ["echo-protocol", None])
def test_a_plain_socket_resumes_nothing(
    hosts: list[RelayProcess], sender: Browser, come: Return, user: str, offered: str | None
) -> None:
    """Without imrelay.v1 beside it, what is to be resumed is left alone, and never answered in the handshake."""
    old = come(user)
    names = ", ".join(filter(None, [offered, f"imrelay.resume.{old.session}"]))
    with Browser(hosts[0], user, header=[f"Sec-WebSocket-Protocol: {names}"]) as plain:
        assert plain.socket.getheaders().get("sec-websocket-protocol") == offered
        text = sender.say(user, 1)
        assert plain.receive() == text
        assert old.contents(1) == [1]
        pinged(old)


@pytest.mark.parametrize(
    ("offered", "resumed"),
    [
        (f"imrelay.v1, imrelay.resume.{SESSION}", SESSION),
        (f"imrelay.resume.{SESSION},\timrelay.v1", SESSION),
        (f"imrelay.v1, imrelay.resume.{SESSION}, imrelay.resume.{SESSION[:-1]}0", SESSION),
        (f"imrelay.v1, imrelay.resume.x, imrelay.resume.{SESSION}", None),
        (f"imrelay.resume.{SESSION}", None),
        (f"echo-protocol, imrelay.resume.{SESSION}", None),
        (f"imrelay.v1, ximrelay.resume.{SESSION}", None),
        (f"imrelay.v1, IMRELAY.RESUME.{SESSION}", None),
        ("imrelay.v1", None),
        ("", None),
    ],
)
def test_one_session_is_resumed_at_most(offered: str, resumed: str | None) -> None:
    """The first that is offered counts, beside imrelay.v1 alone."""
    assert resumed_session(offered) == resumed


# -- the relay queue -----------------------------------------------------------------------------------------


def test_the_relay_queue_on_the_broker(
    broker: VirtualHost, hosts: list[RelayProcess], come: Return, user: str
) -> None:
    """Each process has an exclusive, bounded queue, named by what its sessions' ids have in common."""
    names = {f"relay.{come(user, host).session[10:20]}" for host in hosts}
    assert set(relay_queues(broker)) == names
    for name in names:
        row = broker.queues()[name]
        assert (row["exclusive"], row["auto_delete"]) == (True, True)
        assert {key: row["arguments"][key] for key in ("x-max-length", "x-message-ttl", "x-overflow")} == {
            "x-max-length": 10_000,
            "x-message-ttl": 60_000,
            "x-overflow": "drop-head",
        }
        (binding,) = (binding for binding in broker.bindings() if binding["destination_name"] == name)
        assert binding["source_name"] == "imrelay.relays"
    exchange = broker.exchanges()["imrelay.relays"]
    assert (exchange["type"], exchange["durable"]) == ("fanout", True)


def test_whatever_is_published_to_a_relay_does_no_harm(
    broker: VirtualHost, hosts: list[RelayProcess], sender: Browser, come: Return, user: str
) -> None:
    """Messages to a relay that are malformed or unknown are left alone, and those of before do not hold it up."""
    old = come(user, hosts[1])
    queue = f"relay.{old.session[10:20]}"
    bodies = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 60_000, b'{"user":1,"session":[]}', b'{"session":{}}']
    bodies += [b'{"user":"x","session":"y"}', json.dumps({"user": user, "session": "x" * 100_000}).encode()]
    with closing(pika.BlockingConnection(pika.URLParameters(broker.url))) as connection:
        channel = connection.channel()
        for number in range(100):
            for body in bodies:
                kind = ("end", "ended", "later", None)[number % 4]
                properties = pika.BasicProperties(
                    type=kind, reply_to=("amq.rabbitmq.x", "relay.0", "é")[number % 3]
                )
                channel.basic_publish("", queue, body, properties)
    tell(sender, user, 1)
    assert old.contents(1) == [1]
    new = come(user, resumes=old.session)
    assert new.contents(1) == [1]
    eventually(lambda: broker.queues()[queue]["messages"] == 0)


class Ends:
    """Stands in for the sessions of a process: remembers what was to be ended."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, user: str, session: str, timeout: float) -> None:
        self.asked.append((user, session))


@pytest.fixture
def pair(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[RelayQueue, Ends, str]]]:
    """Two relay queues in this process, which wait for each other for ever; with what they end."""
    monkeypatch.setattr(relay_queue, "_END_TIMEOUT", 600.0)
    made = []
    for _ in range(2):
        ends, incarnation = Ends(), MessageIds(lambda: 1.0).incarnation
        queue = RelayQueue(
            incarnation,
            wait_for_connection=lambda: connection,
            publishing=connection,
            end_here=ends,
            wait_given_back=lambda user, timeout: True,
        )
        queue.start()
        made.append((queue, ends, incarnation))
    with gevent.Timeout(PATIENCE):
        for queue, _, _ in made:
            eventually(lambda queue=queue: queue._receiver and queue._sender, sleep=gevent.sleep)
        yield made
        for queue, _, _ in made:
            queue.stop()


def test_a_relay_asks_another_and_waits_for_its_answer(pair: list[tuple[RelayQueue, Ends, str]]) -> None:
    """`end` reaches the relay of the session alone, and the caller goes on when that has answered."""
    (near, near_ends, _), (_, far_ends, incarnation) = pair
    session = f"01M86BASS1{incarnation}000000"
    greenlets = [gevent.spawn(near.end_session, "ann", session) for _ in range(3)]
    gevent.joinall(greenlets, raise_error=True)
    assert far_ends.asked == [("ann", session)] * 3
    assert near_ends.asked == []
    assert near._waiting == {}


def test_a_relay_that_is_gone_is_not_waited_for(
    broker: VirtualHost, pair: list[tuple[RelayQueue, Ends, str]]
) -> None:
    """A returned message says that there is no such relay, and the caller goes on at once."""
    (near, _, _), (far, _, incarnation) = pair
    near.end_session("ann", SESSION)
    far.stop()
    eventually(lambda: f"relay.{incarnation}" not in broker.queues(), sleep=gevent.sleep)
    near.end_session("ann", f"01M86BASS1{incarnation}000000")
    near._reminders.stop()  # which ask again
    assert near._waiting == {}


def test_what_was_asked_over_a_lost_channel_is_not_waited_for(
    pair: list[tuple[RelayQueue, Ends, str]], connection: Connection
) -> None:
    """When the connection is lost, callers go on; both channels come back, and the relay is asked again."""
    (near, _, _), (_, far_ends, incarnation) = pair
    session = f"01M86BASS1{incarnation}000000"
    may_answer = gevent.event.Event()
    answer = pair[1][0]._end_here
    pair[1][0]._end_here = lambda *arguments: (answer(*arguments), may_answer.wait())[0]
    asking = gevent.spawn(near.end_session, "ann", session)
    eventually(lambda: far_ends.asked, sleep=gevent.sleep)
    connection._adapter.abort(ConnectionError("cut by the test"))
    asking.get()
    may_answer.set()
    eventually(lambda: len(far_ends.asked) == 2, sleep=gevent.sleep)
    eventually(lambda: not near._reminders._relays, sleep=gevent.sleep)
    near.end_session("ann", session)
    assert far_ends.asked == [("ann", session)] * 3


def test_a_relay_that_comes_back_is_asked_again(
    broker: VirtualHost, pair: list[tuple[RelayQueue, Ends, str]]
) -> None:
    """What was asked while it had no queue is asked when it has one, of all its sessions; then no more."""
    (near, _, _), (far, far_ends, incarnation) = pair
    far.stop()
    eventually(lambda: f"relay.{incarnation}" not in broker.queues(), sleep=gevent.sleep)
    sessions = [f"01M86BASS1{incarnation}00000{number}" for number in range(3)]
    for session in sessions * 2:
        near.end_session("ann", session)
    assert far_ends.asked == []
    far.start()
    eventually(lambda: len(far_ends.asked) >= 3, sleep=gevent.sleep)
    eventually(lambda: not near._reminders._relays, sleep=gevent.sleep)
    assert far_ends.asked == [("ann", session) for session in sessions]


def test_a_relay_that_does_not_come_back_is_forgotten(
    broker: VirtualHost, pair: list[tuple[RelayQueue, Ends, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked again for a minute, and no more than so many of them and of their sessions are remembered."""
    monkeypatch.setattr(reminders, "_KEPT_FOR", 0.3)
    monkeypatch.setattr(reminders, "_MAX_RELAYS", 2)
    monkeypatch.setattr(reminders, "_MAX_SESSIONS", 3)
    (near, _, _), _ = pair
    for relay in range(4):
        for number in range(5):
            near.end_session("ann", f"01M86BASS1000000000{relay}00000{number}")
    assert [len(sessions) for sessions in near._reminders._relays.values()] == [3, 3]
    eventually(lambda: not near._reminders._relays, sleep=gevent.sleep)


def test_the_sessions_of_a_relay_that_does_not_come_back_are_forgotten_together(
    pair: list[tuple[RelayQueue, Ends, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, none is asked for when its minute is over, and other relays have the room."""
    monkeypatch.setattr(reminders, "_KEPT_FOR", 0.3)
    (near, _, _), _ = pair
    asked: list[str] = []
    ask = near._reminders._ask
    near._reminders._ask = lambda user, session: (asked.append(session), ask(user, session))[1]
    for number in range(200):
        near._reminders.add("0000000000", "ann", f"01M86BASS1{number:016}")
    eventually(lambda: not near._reminders._relays, 5, sleep=gevent.sleep)
    assert set(asked) == {f"01M86BASS1{0:016}"}


def test_a_relay_without_a_channel_waits_for_it_before_it_asks(
    pair: list[tuple[RelayQueue, Ends, str]], connection: Connection
) -> None:
    """A relay that has just lost its own connection asks when that is back."""
    (near, _, _), (_, far_ends, incarnation) = pair
    connection._adapter.abort(ConnectionError("cut by the test"))
    eventually(lambda: near._sender is None, sleep=gevent.sleep)
    near.end_session("ann", f"01M86BASS1{incarnation}000000")
    eventually(lambda: far_ends.asked, sleep=gevent.sleep)


def test_a_handshake_waits_two_seconds_in_all(
    pair: list[tuple[RelayQueue, Ends, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was waited for a channel to ask on is no longer waited for the answer."""
    monkeypatch.setattr(relay_queue, "_END_TIMEOUT", 2.0)
    monkeypatch.setattr(relay_queue, "_BACK_TIMEOUT", 1.5)
    (near, _, _), (far, far_ends, incarnation) = pair
    may_answer = gevent.event.Event()
    far._end_here = lambda *arguments: (far_ends(*arguments), may_answer.wait())[0]
    near._can_send = gevent.event.Event()
    gevent.spawn_later(1.4, near._can_send.set)
    began = time.monotonic()
    near.end_session("ann", f"01M86BASS1{incarnation}000000")
    assert 1.9 < time.monotonic() - began < 2.8
    assert far_ends.asked
    may_answer.set()


# -- a relay that has lost its link --------------------------------------------------------------------------


def test_a_session_of_a_relay_that_has_lost_its_link_is_ended_when_that_is_back(
    relay: RelayFactory, broker: VirtualHost, user: str
) -> None:
    """It looks like one that is gone: the new session gets what was left at once; then the old one ends."""
    with Proxy(broker.url) as proxy:
        lost, other = relay(broker_url=proxy.url, clean=False), relay()
        for host in (lost, other):
            wait_until_ready(host)
        with Browser(other, f"{user}'s friend") as friend, ExitStack() as stack:
            old = stack.enter_context(Visit(lost, user))
            for number in (1, 2):
                tell(friend, user, number)
            assert old.contents(2) == [1, 2]
            proxy.cut()
            proxy.reset()
            new = stack.enter_context(Visit(other, user, resumes=old.session))
            tell(friend, user, 3)
            assert new.contents(3) == [1, 2, 3]
            proxy.heal()
            assert old.close_code() == 4409
            tell(friend, user, 4)
            assert new.contents(1) == [4]
