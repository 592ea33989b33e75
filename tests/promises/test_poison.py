"""A message that the relay cannot write is discarded and ends no session; one that it cannot take ends its own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import gevent
import pytest

from imrelay.broker.codec import Delivery
from imrelay.broker.connection import Connection
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.topology import Topology
from imrelay.sessions import subprotocols
from imrelay.sessions.intake import SessionState
from imrelay.sessions.services import Services
from imrelay.sessions.session import Session
from imrelay.settings.values import InboxConfig, WebSocketConfig
from tests.support.brokers import amqp
from tests.support.harness import VirtualHost, eventually

#: Guard against hanging, in seconds; no measure of speed.
PATIENCE = 20.0


class Socket:
    """Stands for a browser socket; what is written to it is noted."""

    close_code, close_reason = 1000, ""

    def __init__(self, subprotocol: str | None) -> None:
        self.subprotocol = subprotocol
        self.written: list[bytes] = []
        self.codes: list[int] = []

    def send_messages(self, frames: list[tuple[bytes, bool]]) -> None:
        """Note what is written."""
        self.written += [payload for payload, _ in frames]

    def close(self, code: int = 1000, reason: str = "", *, wait: bool = True) -> None:
        """Note with what it is ended."""
        self.codes.append(code)


@pytest.fixture
def pool(broker: VirtualHost) -> Iterator[ConsumerPool]:
    """A pool of this process's own."""
    made = ConsumerPool(
        lambda name, on_state: Connection(lambda: [broker.url], name=name, heartbeat=60, on_state=on_state),
        Topology("direct_message", InboxConfig()),
        prefetch=10,
        channels_per_connection=100,
    )
    made.start()
    with gevent.Timeout(PATIENCE * 3):
        yield made
    made.stop()


def run_session(pool: ConsumerPool, user: str, subprotocol: str | None) -> tuple[Session, Socket, gevent.Greenlet]:
    """Return a session that consumes, its socket, and the greenlet that runs it."""
    nothing = dict.fromkeys(("join", "leave", "register", "forget"), lambda session: None)
    registry = SimpleNamespace(**nothing, is_draining=False)
    mids = SimpleNamespace(next=lambda: ("session", 0))
    limits = WebSocketConfig()
    services = Services(
        cast(Any, registry),
        pool,
        publisher=cast(Any, None),
        mids=cast(Any, mids),
        relays=cast(Any, None),
        limits=limits,
        node_envelope=True,
        remembered=100,
    )
    session = Session(user, services)
    session.consume()
    assert session.wait_attached(PATIENCE)
    socket = Socket(subprotocol)
    return session, socket, gevent.spawn(session.run, socket)


@pytest.mark.parametrize("subprotocol", [None, "imrelay.v1"])
def test_a_message_that_cannot_be_written_ends_no_session(
    pool: ConsumerPool,
    broker: VirtualHost,
    subprotocol: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It goes to the dead-letter exchange, its mid to the log; what came before and comes after is written."""

    def unpack(self: subprotocols.Plain, delivery: Delivery) -> tuple[bytes, bool]:
        if b"poison" in delivery.body:
            raise RecursionError("deep")
        return delivery.body, False

    monkeypatch.setattr(subprotocols.Plain, "_unpack", unpack)
    user = f"poisoned {subprotocol}"
    session, socket, running = run_session(pool, user, subprotocol)
    with amqp(broker.url) as channel:
        channel.exchange_declare("imrelay.dead", "fanout")
        channel.queue_declare("dead")
        channel.queue_bind("dead", "imrelay.dead")
        for body in (b'"before"', b'"poison"', b'"after"'):
            channel.basic_publish("direct_message", user, body, mandatory=True)
        eventually(lambda: any(b"after" in payload for payload in socket.written), PATIENCE, sleep=gevent.sleep)
        assert session.state is SessionState.OPEN
        eventually(lambda: broker.queues()["dead"]["messages"] == 1, PATIENCE, sleep=gevent.sleep)
        assert channel.basic_get("dead", auto_ack=True)[2] == b'"poison"'
        channel.exchange_delete("imrelay.dead")
    assert "is discarded, mid None" in caplog.text
    shown = [payload for payload in socket.written if b"welcome" not in payload]
    assert len(shown) == 2
    assert b"poison" not in b"".join(shown)
    if subprotocol:
        assert [payload[:8] for payload in shown] == [b'{"seq":1', b'{"seq":2']
    session.close()
    running.join()
    left = 2 if subprotocol else 0
    eventually(lambda: broker.queues()[f"inbox.{user}"]["messages"] == left, PATIENCE, sleep=gevent.sleep)


def test_a_delivery_that_cannot_be_taken_ends_that_session_and_no_other(
    pool: ConsumerPool, broker: VirtualHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends with 1011 and a traceback in the log; others that share its connection do not notice."""
    deliver = Mailbox.deliver

    def fail(self: Mailbox, delivery: Delivery) -> None:
        if b"poison" in delivery.body:
            raise RuntimeError("it cannot be taken")
        deliver(self, delivery)

    monkeypatch.setattr(Mailbox, "deliver", fail)
    session, socket, running = run_session(pool, "poisoned", None)
    other, other_socket, other_running = run_session(pool, "other", None)
    adapter = pool._connections[0]._adapter
    with amqp(broker.url) as channel:
        for user, body in (("poisoned", b'"before"'), ("poisoned", b'"poison"'), ("other", b'"after"')):
            channel.basic_publish("direct_message", user, body, mandatory=True)
    running.join(PATIENCE)
    assert socket.codes[0] == 1011
    assert session.state is SessionState.CLOSED
    assert "RuntimeError: it cannot be taken" in caplog.text
    eventually(lambda: other_socket.written == [b'"after"'], PATIENCE, sleep=gevent.sleep)
    assert other.state is SessionState.OPEN
    assert pool._connections[0]._adapter is adapter
    eventually(lambda: broker.queues()["inbox.poisoned"]["messages_ready"] >= 1, PATIENCE, sleep=gevent.sleep)
    other.close()
    other_running.join()
