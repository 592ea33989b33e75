"""A program that publishes what pika cannot read disturbs nobody."""

from __future__ import annotations

from datetime import datetime, timezone

import pika
from pika import spec

from tests.conftest import RelayFactory
from tests.support.browser import Browser, wait_until_ready

SECONDS, MILLISECONDS = 1_700_000_000, 1_700_000_000_000


class InMilliseconds(spec.BasicProperties):
    """Properties with a header that holds milliseconds where AMQP has seconds."""

    def encode(self) -> list[bytes]:
        """Return the octets, with the wrong unit."""
        right, wrong = (number.to_bytes(8, "big") for number in (SECONDS, MILLISECONDS))
        return [piece.replace(right, wrong) for piece in super().encode()]


def test_a_date_in_the_far_future_ends_no_connection(relay: RelayFactory, broker_url: str) -> None:
    """Neither small nor large: the message arrives, and the bystander on the same connection notices nothing."""
    host = relay()
    wait_until_ready(host)
    properties = InMilliseconds(headers={"when": datetime.fromtimestamp(SECONDS, timezone.utc)}, message_id="m")
    with Browser(host, "ben") as ben, Browser(host, "bystander") as bystander:
        connection = pika.BlockingConnection(pika.URLParameters(broker_url))
        for body in ("small", "large " * 100_000):
            connection.channel().basic_publish("direct_message", "ben", body.encode(), properties)
            assert ben.receive() == body
        connection.close()
        text = bystander.say("bystander")
        assert bystander.receive() == text
    assert "waiting" not in host.log.partition("listening")[2].replace("waiting -> ", "")
