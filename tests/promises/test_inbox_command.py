"""`imrelay inbox` shows what waits for a user, and throws it away only when it is told so twice."""

from __future__ import annotations

import os
import pty
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import RelayFactory
from tests.support.brokers import amqp
from tests.support.browser import Browser
from tests.support.harness import RelayProcess, VirtualHost, eventually, plain_environment

#: What a look at an inbox says beside its figures while no socket keeps that inbox.
RENEWED = "RabbitMQ takes this look for a use of the inbox: its time to expire has begun anew\n"


class Command:
    """Runs `imrelay inbox` against the module's virtual host, without a terminal."""

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        self.url = url

    def _arguments(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "imrelay", "inbox", f"--broker-url={self.url}", *arguments]

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """Return what it printed, on either stream; it has to end with `status`."""
        done = subprocess.run(
            self._arguments(*arguments),
            cwd=self._folder,
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done
        return done.stdout + done.stderr

    def at_terminal(self, answer: str, *arguments: str) -> str:
        """Run it at a terminal, answer its question, and return all that was on the screen."""
        near, far = pty.openpty()
        process = subprocess.Popen(
            self._arguments(*arguments),
            cwd=self._folder,
            env=plain_environment(),
            stdin=far,
            stdout=far,
            stderr=far,
            start_new_session=True,
        )
        os.close(far)
        screen = b""
        try:
            while b"[y/N]" not in screen:
                screen += os.read(near, 4096)
            os.write(near, answer.encode() + b"\n")
            with suppress(OSError):  # the terminal is gone when the process is
                while more := os.read(near, 4096):
                    screen += more
            assert process.wait(60) == 0, screen
        finally:
            process.kill()
            process.wait()
            os.close(near)
        return screen.decode()


@pytest.fixture
def command(broker: VirtualHost, tmp_path: Path) -> Command:
    return Command(broker.url, tmp_path)


@pytest.fixture(scope="module")
def host(broker: VirtualHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """One relay for the module."""
    arguments = ["serve", "--server-port=0", f"--broker-url={broker.url}", "--server-drain-timeout=5"]
    relay = RelayProcess(tmp_path_factory.mktemp("relay"), arguments, plain_environment())
    try:
        relay.wait_until_listening()
        yield relay
    finally:
        relay.stop()


@pytest.fixture
def user(host: RelayProcess) -> str:
    """A user who is away and for whom three messages wait."""
    name = f"away-{secrets.token_hex(4)}"
    with Browser(host, "sender") as sender:
        for number in range(3):
            sender.say(name, number, id=number)
            sender.ack()
    return name


def depth(broker: VirtualHost, user: str) -> int:
    return int(broker.queues()[f"inbox.{user}"]["messages"])


def test_it_shows_depth_and_sockets(command: Command, broker: VirtualHost, host: RelayProcess, user: str) -> None:
    """It tells how many messages wait and how many sockets are here, and changes nothing."""
    assert command(user) == f"{user}: 3 messages wait, 0 sockets are here\n{RENEWED}"
    assert depth(broker, user) == 3
    with Browser(host, user) as first, Browser(host, user):
        assert first.contents_until(2) == [0, 1, 2]
        eventually(lambda: depth(broker, user) == 0)
        assert command(user) == f"{user}: 0 messages wait, 2 sockets are here\n"


def test_nobody_has_no_inbox(command: Command, broker: VirtualHost) -> None:
    """For an id that was never here it says so, ends with status 1, and makes nothing."""
    assert "nobody has no inbox" in command("nobody", status=1)
    assert "no inbox" in command("nobody", "--purge", "--yes", status=1)
    assert "inbox.nobody" not in broker.queues()


@pytest.mark.parametrize(("action", "question"), [("--purge", "Throw away 3"), ("--delete", "Delete the inbox")])
def test_it_asks_before_it_acts(
    command: Command, broker: VirtualHost, user: str, action: str, question: str
) -> None:
    """At a terminal it asks, and anything but yes leaves all as it is."""
    for answer in ("n", "", "yesterday"):
        assert question in command.at_terminal(answer, user, action)
    assert depth(broker, user) == 3
    screen = command.at_terminal("y", user, action)
    assert ("3 messages thrown away" if action == "--purge" else "inbox deleted, with 3 messages") in screen
    queue = broker.queues().get(f"inbox.{user}")
    assert (queue is not None and queue["messages"] == 0) if action == "--purge" else queue is None


@pytest.mark.parametrize("action", ["--purge", "--delete"])
def test_without_a_terminal_it_takes_yes_only_by_option(
    command: Command, broker: VirtualHost, user: str, action: str
) -> None:
    """Where there is nobody to ask, nothing is thrown away without --yes."""
    assert "say --yes" in command(user, action, status=1)
    assert depth(broker, user) == 3
    command(user, action, "--yes")
    assert f"inbox.{user}" not in broker.queues() or depth(broker, user) == 0


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_the_first_messages_are_dropped_and_no_others(
    command: Command, broker: VirtualHost, relay: RelayFactory, queue_type: str
) -> None:
    """--drop N throws away the N that would come first, after a question, and not while sockets are there."""
    host = relay(inbox_queue_type=queue_type)
    user = f"poisoned-{queue_type}"
    with Browser(host, "sender") as sender:
        for number in range(130):
            sender.say(user, number, id=number)
            sender.ack()
    with Browser(host, user, subprotocols=["imrelay.v1"]) as browser:  # a quorum queue takes back what it had
        browser.read()  # the welcome
        assert [browser.read()["message"]["content"] for _ in range(16)] == list(range(16))
    eventually(lambda: broker.queues()[f"inbox.{user}"]["consumers"] == 0)
    assert "say --yes" in command(user, "--drop", "2", status=1)
    assert "Throw away the first 2 messages" in command.at_terminal("n", user, "--drop", "2")
    assert "\n2 messages thrown away" in command(user, "--drop", "2", "--yes")
    with Browser(host, user, subprotocols=["imrelay.v1"]) as browser:
        browser.read()  # the welcome
        assert [browser.read()["message"]["content"] for _ in range(16)] == list(range(2, 18))
    eventually(lambda: broker.queues()[f"inbox.{user}"]["consumers"] == 0)
    assert "\n120 messages thrown away" in command(user, "--drop", "120", "--yes")
    with Browser(host, user, subprotocols=["imrelay.v1"]) as browser:
        browser.read()  # the welcome
        assert [browser.read()["message"]["content"] for _ in range(8)] == list(range(122, 130))
        assert "is here" in command(user, "--drop", "2", "--yes", status=1)
    eventually(lambda: broker.queues()[f"inbox.{user}"]["consumers"] == 0)
    assert "\n8 messages thrown away" in command(user, "--drop", "9", "--yes")
    eventually(lambda: depth(broker, user) == 0)  # a quorum queue counts with delay
    assert "invalid" in command(user, "--drop", "0", status=2)


def test_a_deleted_inbox_takes_its_exchange_along(command: Command, broker: VirtualHost, user: str) -> None:
    """After --delete nothing of the user is left on the broker."""
    command(user, "--delete", "--yes")
    assert f"user.{user}" not in broker.exchanges()
    assert not [row for row in broker.bindings() if user in str(row)]


def test_purging_leaves_what_is_under_way_to_a_socket(
    command: Command, broker: VirtualHost, relay: RelayFactory, user: str
) -> None:
    """--purge takes what waits, and not what a browser has and did not acknowledge yet."""
    host = relay(broker_prefetch=1)
    with Browser(host, user, subprotocols=["imrelay.v1"]) as browser:
        browser.read()  # the welcome
        assert browser.read()["message"]["content"] == 0
        assert "2 messages wait, 1 sockets are here" in command(user)
        assert "2 messages thrown away" in command(user, "--purge", "--yes")
        eventually(lambda: depth(broker, user) == 1)
        browser.send('{"ack":1}')
        eventually(lambda: depth(broker, user) == 0)


def test_a_socket_outlives_the_deletion_of_its_inbox(
    command: Command, host: RelayProcess, broker: VirtualHost, user: str
) -> None:
    """A connected user whose inbox is deleted gets a new one at once, for relays and other programs."""
    with Browser(host, user) as browser:
        assert browser.contents_until(2) == [0, 1, 2]
        command(user, "--delete", "--yes")
        eventually(lambda: broker.queues().get(f"inbox.{user}", {}).get("consumers") == 1)
        with amqp(broker.url) as channel:
            channel.basic_publish("direct_message", user, b'{"content":"after"}', mandatory=True)
        assert browser.read() == {"content": "after"}


def test_what_prevents_it_is_one_line(command: Command, user: str) -> None:
    """A broker that is not there, a bad id and two actions at once are each told in a sentence."""
    command.url = "amqp://imrelay:secret@127.0.0.1:1"
    told = command(user, "--broker-publish-timeout=1", status=1)
    assert told.startswith("imrelay: no connection to the broker: amqp://imrelay:***@127.0.0.1:1")
    assert told.count("\n") == 1
    told = command("a/b", status=1)
    assert told.startswith("imrelay: ")
    assert told.count("\n") == 1
    assert "not allowed with" in command(user, "--purge", "--delete", status=2)
