"""Nothing is lost when the broker stops, dies, freezes, raises an alarm, or restarts again and again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RelayFactory
from tests.support.brokers import (
    frozen,
    kill_node,
    memory_alarm,
    node_pid,
    open_files,
    resident_kib,
    start_application,
    stop_application,
    wait_not_ready,
    wait_ready,
)
from tests.support.browser import Browser
from tests.support.harness import Node, eventually
from tests.support.traffic import Traffic

TALK = {"ann": ["bob", "cid"], "bob": ["cid"], "cid": []}

#: Writes how many greenlets there are to the file `GREENLETS` names, when told by SIGUSR2.
COUNTER = """\
import gc, os, signal

def count(number, frame):
    from greenlet import greenlet
    gc.collect()
    living = sum(isinstance(thing, greenlet) and not thing.dead for thing in gc.get_objects())
    path = os.environ["GREENLETS"]
    with open(path + ".new", "w") as file:
        file.write(str(living))
    os.replace(path + ".new", path)

signal.signal(signal.SIGUSR2, count)
"""


@pytest.fixture(scope="module")
def own(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node to be damaged; `node` only says whether there is RabbitMQ at all."""
    broker = Node(tmp_path_factory.mktemp("damaged") / "data")
    yield broker
    broker.stop()


def test_a_stopped_broker_delays_messages_and_loses_none(own: Node, relay: RelayFactory) -> None:
    """Sockets stay open while the broker is stopped, and what was sent meanwhile is acked and arrives after."""
    host = relay(broker_url=own.url, broker_publish_timeout=60)
    with Traffic([host], TALK) as traffic:
        traffic.flow()
        stop_application(own)
        assert "no broker to publish to" in wait_not_ready(host)
        start_application(own)
        traffic.flow()
    traffic.verdict()
    wait_ready(host)


def test_a_stopped_broker_is_told_to_senders_after_publish_timeout(own: Node, relay: RelayFactory) -> None:
    """Each message that the broker did not confirm within publish_timeout is answered once, temporary error."""
    host = relay(broker_url=own.url, broker_publish_timeout=0.5)
    with Traffic([host], TALK, v1=True) as traffic:
        traffic.flow()
        stop_application(own)
        traffic.wait_for_errors(20)
        start_application(own)
        traffic.flow()
    traffic.verdict(errors=["broker_unavailable"])
    errors = [answer["error"] for sent in traffic.sent.values() for answer in sent.answers if "error" in answer]
    assert all(error["temporary"] is True for error in errors)


@pytest.mark.slow
def test_acked_messages_survive_a_broker_killed_with_9(own: Node, relay: RelayFactory) -> None:
    """With `persistent`, what was acked is delivered after kill -9 of the broker, also to users who were away."""
    host = relay(broker_url=own.url, broker_publish_timeout=90)
    before = node_pid(own)
    with Traffic([host], {"ann": ["bob", "away"], "bob": ["away"]}) as traffic:
        traffic.flow(30)
        kill_node(own)
        eventually(lambda: node_pid(own) != before, 30)
        traffic.flow()
        traffic.add("away")
        traffic.flow()
    traffic.verdict()


@pytest.mark.slow
def test_a_broker_paused_beyond_the_heartbeat_loses_nothing(own: Node, relay: RelayFactory) -> None:
    """A broker that hangs is given up by its heartbeat; when it goes on, nothing is lost and nothing repeated."""
    host = relay(broker_url=own.url, broker_heartbeat=1, broker_publish_timeout=90)
    with Traffic([host], TALK) as traffic:
        traffic.flow()
        with frozen(node_pid(own)):
            host.wait_for_log(r"broker connection publish: open -> waiting", 60)
            host.wait_for_log(r"broker connection consume-1: open -> waiting", 60)
        traffic.flow()
    traffic.verdict()


def test_an_alarm_stops_publishing_and_nothing_else(own: Node, relay: RelayFactory) -> None:
    """While the broker is in alarm, /readyz and senders are told, sockets stay, and what is there is delivered."""
    host = relay(broker_url=own.url, broker_publish_timeout=0.5)
    with Traffic([host], {"ann": ["bob", "absent"], "bob": []}) as traffic:
        traffic.flow(30)
        with memory_alarm(own):
            assert "alarm" in wait_not_ready(host)
            traffic.wait_for_errors(5)
            waiting = {key for key, sent in traffic.sent.items() if sent.to == "absent" and sent.acked}
            absent = traffic.add("absent")
            traffic.wait(lambda: waiting <= absent.arrived, "what waited for who was absent")
        traffic.flow()
        wait_ready(host)
    traffic.verdict(errors=["broker_unavailable"])


def test_messages_that_wait_out_an_alarm_are_acked(own: Node, relay: RelayFactory) -> None:
    """An alarm that clears within publish_timeout costs its senders nothing but time."""
    host = relay(broker_url=own.url, broker_publish_timeout=60)
    with Traffic([host], TALK) as traffic:
        traffic.flow()
        with memory_alarm(own):
            wait_not_ready(host)
            unanswered = len(traffic.sent)
            traffic.wait(lambda: len(traffic.sent) > unanswered + 20, "more messages sent during the alarm")
        traffic.flow()
    traffic.verdict()


def test_a_socket_opened_while_the_broker_is_away_gets_its_messages_later(own: Node, relay: RelayFactory) -> None:
    """A browser may come while there is no broker; it is subscribed when there is one again."""
    host = relay(broker_url=own.url, broker_publish_timeout=60)
    wait_ready(host)
    stop_application(own)
    wait_not_ready(host)
    with Browser(host, "early") as browser:
        text = browser.say("early", id=1)
        start_application(own)
        got = {str(browser.receive()), str(browser.receive())}
    assert text in got
    assert any('"ack"' in answer for answer in got)


@pytest.mark.slow
def test_thirty_restarts_of_the_broker_leave_nothing_behind(
    own: Node, relay: RelayFactory, tmp_path: Path
) -> None:
    """After thirty restarts in a row a relay has the descriptors, greenlets and memory that it had before."""
    (tmp_path / "sitecustomize.py").write_text(COUNTER)
    count = tmp_path / "greenlets"
    paths = filter(None, [os.environ.get("PYTHONPATH")])
    host = relay(
        broker_url=own.url,
        broker_publish_timeout=60,
        environment={"PYTHONPATH": os.pathsep.join([str(tmp_path), *paths]), "GREENLETS": str(count)},
    )

    def greenlets() -> int:
        count.unlink(missing_ok=True)
        os.kill(host.pid, signal.SIGUSR2)
        eventually(count.exists)
        return int(count.read_text())

    def restart() -> None:
        stop_application(own)
        start_application(own)
        traffic.flow(2)

    with Traffic([host], TALK, every=0.05) as traffic:
        traffic.flow()
        for _ in range(3):  # what is made once, at the first loss, is made then
            restart()
        files, memory, living = open_files(host.pid), resident_kib(host.pid), greenlets()
        for _ in range(27):
            restart()
        eventually(lambda: open_files(host.pid) <= files)
        eventually(lambda: greenlets() <= living)
        assert resident_kib(host.pid) < memory + 8 * 1024
    traffic.verdict()
