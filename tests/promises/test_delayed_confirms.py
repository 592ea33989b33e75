"""Confirms that no sender waits for are read together after a delay, all others at once; none is lost."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import gevent
import pytest
from gevent.event import Event
from pika import spec

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.broker.publication import Publication
from imrelay.broker.publisher import Publisher
from imrelay.broker.topology import Topology
from imrelay.errors import AnswerableError
from imrelay.settings.values import InboxConfig
from tests.support.gate import Gate
from tests.support.harness import VirtualHost, eventually

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


class Publishing:
    """A publishing channel, the confirms that it got, and whether the reading of its connection is delayed."""

    def __init__(self, connection: Connection) -> None:
        self.confirmed: list[int] = []
        self.lost = Event()
        self._connection = connection
        self._channel = Channel(connection, on_lost=lambda lost: self.lost.set())
        self._channel.call(spec.Queue.Declare(queue="here", exclusive=True, auto_delete=True))
        self._channel.confirm(lambda tag, multiple, accepted: self.confirmed.append(tag), self.confirmed.append)
        self._template = self._channel.prepare("", persistent=False)

    def publish(self, *, at_once: bool) -> None:
        """Publish a message."""
        content = self._template.encode_content("m", False, b"{}")
        self._channel.publish(self._template.encode_method("here") + content, at_once=at_once)

    def delay(self) -> None:
        """Delay the reading, without an end."""
        adapter = self._connection._adapter
        assert adapter is not None
        adapter.delay_reads(True)

    @property
    def is_delayed(self) -> bool:
        """Whether a few bytes would not wake the process."""
        adapter = self._connection._adapter
        assert adapter is not None
        assert adapter._stream is not None
        return bool(adapter._stream._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) > 1)


def test_a_confirm_that_nobody_waits_for_is_read_later(connection: Connection) -> None:
    """After such a publish the reading is delayed; then the confirm is read, and the delay is over."""
    publishing = Publishing(connection)
    publishing.publish(at_once=False)
    assert publishing.is_delayed
    eventually(lambda: publishing.confirmed, PATIENCE, sleep=gevent.sleep)
    assert publishing.confirmed == [1]
    eventually(lambda: not publishing.is_delayed, PATIENCE, sleep=gevent.sleep)


def test_a_confirm_that_somebody_waits_for_is_read_at_once(connection: Connection) -> None:
    """A publish whose confirm is waited for ends the delay, also that of others."""
    publishing = Publishing(connection)
    publishing.publish(at_once=False)
    publishing.publish(at_once=True)
    assert not publishing.is_delayed
    eventually(lambda: publishing.confirmed[-1:] == [2], PATIENCE, sleep=gevent.sleep)


def test_the_end_of_the_connection_is_read_at_once(connection: Connection, gate: Gate) -> None:
    """The end of the stream wakes the process during a delay."""
    publishing = Publishing(connection)
    publishing.delay()
    assert publishing.is_delayed
    gate.reset()
    assert publishing.lost.wait(PATIENCE)


class Spied(Publisher):
    """A publisher that remembers the `at_once` of each publish."""

    at_once: list[bool]

    def _open(self) -> None:
        super()._open()
        channel = self._channel
        assert channel is not None
        self.at_once = []

        class Spy:
            """Passes everything on."""

            def __getattr__(self, name: str) -> object:
                return getattr(channel, name)

            def publish(spy, frames: bytes, *, at_once: bool) -> None:  # noqa: N805 - `self` is the publisher
                self.at_once.append(at_once)
                channel.publish(frames, at_once=at_once)

        self._channel = Spy()  # type: ignore[assignment]


@pytest.fixture
def publisher(broker: VirtualHost) -> Iterator[Spied]:
    """A publisher with room for ten messages, which knows the inbox of `ben`."""

    def new_connection(name, on_state):
        return Connection(lambda: [broker.url], name=name, heartbeat=60, on_state=on_state)

    made = Spied(
        new_connection,
        Topology("delayed", InboxConfig()),
        queue_size=10,
        timeout=PATIENCE,
        persistent=False,
        create_unknown=True,
    )
    with gevent.Timeout(PATIENCE * 3):
        made.start()
        send(made, "first")
        assert made.flush(PATIENCE) == 0
        yield made
    made.stop()


def send(publisher: Publisher, mid: str, message_id: str | None = None) -> list[AnswerableError | None]:
    """Publish a message to ben, and return where its answer will stand."""
    answers: list[AnswerableError | None] = []
    publisher.publish(
        Publication("ben", b"{}", False, mid, 0, message_id, lambda publication, error: answers.append(error)),
        lambda: None,
    )
    return answers


def test_a_message_without_an_id_has_its_confirm_delayed(publisher: Spied) -> None:
    """Nobody waits for the answer to a message without an id."""
    publisher.at_once.clear()
    answers = send(publisher, "second")
    eventually(lambda: answers, PATIENCE, sleep=gevent.sleep)
    assert answers == [None]
    assert publisher.at_once == [False]


def test_a_message_with_an_id_has_its_confirm_read_at_once(publisher: Spied) -> None:
    """Its sender gets its answer as soon as the broker has confirmed it, whoever sends without one beside it."""
    publisher.at_once.clear()
    first = send(publisher, "second", "c1")
    second = send(publisher, "third")
    eventually(lambda: first and second, PATIENCE, sleep=gevent.sleep)
    assert publisher.at_once[0]


def test_a_queue_that_fills_has_its_confirms_read_at_once(publisher: Spied) -> None:
    """When over half of the room is taken, confirms make room: they are read as they come."""
    publisher.at_once.clear()
    answers = [send(publisher, f"m{number}") for number in range(8)]
    eventually(lambda: all(answers), PATIENCE, sleep=gevent.sleep)
    assert publisher.at_once[0]
