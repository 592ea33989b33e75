"""A relay whose standard error nobody reads goes on carrying messages, and tells later what its log lacks."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from imrelay.runtime import log
from tests.support.brokers import amqp
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import plain_environment

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 60.0
#: Sockets that come and go while nobody reads the log; each makes a few lines at the level debug.
SESSIONS = 200


class PipedRelay:
    """A relay with a small pipe as its standard error, which is read as far as the test says."""

    def __init__(self, directory: Path, *arguments: str, program: tuple[str, ...] = ("-m", "imrelay")) -> None:
        self.reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "--server-host=127.0.0.1", "--server-port=0", *arguments],
            cwd=directory,
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=writer,
        )
        os.close(writer)
        self.text = ""
        host, port = self.read_until(r"listening on http://(\S+):(\d+)").groups()
        self.host, self.port = host, int(port)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    def socket_url(self, user: str) -> str:
        """Return the WebSocket URL of a user."""
        return f"ws://{self.host}:{self.port}/{user}"

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read its log until it matches."""
        while not (found := re.search(pattern, self.text)):
            data = os.read(self.reader, 65_536)
            assert data, self.text
            self.text += data.decode()
        return found

    def read_to_end(self) -> None:
        """Read what is left of its log, beside its end."""
        while data := os.read(self.reader, 65_536):
            self.text += data.decode()


@pytest.fixture
def started() -> Iterator[list[PipedRelay]]:
    """Relays that are killed at the end."""
    relays: list[PipedRelay] = []
    yield relays
    for one in relays:
        one.process.kill()
        one.process.wait()
        os.close(one.reader)


def test_a_log_that_nobody_reads_stops_no_message(
    started: list[PipedRelay], broker_url: str, tmp_path: Path
) -> None:
    """Thousands of lines for a full pipe: messages flow; read at last, the log says how many it had to drop."""
    host = PipedRelay(tmp_path, f"--broker-url={broker_url}", "--log-level=debug", "--log-format=json")
    started.append(host)
    wait_until_ready(host)
    strange = pika.BasicProperties(type="x" * 200)  # a line for each
    with Browser(host, "ann") as ann, Browser(host, "ben") as ben, amqp(broker_url) as channel:
        for number in range(SESSIONS):
            Browser(host, f"guest{number % 50}").close()
            for _ in range(40):
                channel.basic_publish("imrelay.relays", "", b"{}", strange)
            ann.say("ben", number)
            assert ben.contents_until(number)
        host.process.send_signal(signal.SIGTERM)
        host.read_to_end()
    assert host.process.wait(PATIENCE) == 0
    lines = [json.loads(line) for line in host.text.splitlines()]
    notices = [line for line in lines if line["logger"] == "imrelay.runtime.log"]
    assert sum(int(line["message"].split()[0]) for line in notices) > 1000
    assert all("lines were dropped" in line["message"] for line in notices)
    times = [line["time"] for line in lines if line not in notices]
    assert times == sorted(times)
    assert lines[-1]["message"] == "stopped"
    assert not any("exception" in line for line in lines)


def test_a_log_that_nobody_reads_does_not_keep_the_relay_from_ending(
    started: list[PipedRelay], broker_url: str, tmp_path: Path
) -> None:
    """It ends at SIGTERM with status 0, though what it says at last goes nowhere."""
    host = PipedRelay(tmp_path, f"--broker-url={broker_url}", "--log-level=debug")
    started.append(host)
    wait_until_ready(host)
    for number in range(20):
        Browser(host, f"guest{number}").close()
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(PATIENCE) == 0


def test_exceptions_of_greenlets_and_at_the_end_pass_the_same_way(
    started: list[PipedRelay], broker_url: str, tmp_path: Path
) -> None:
    """What gevent prints of failed greenlets cannot stop the relay, and what ends it is printed in full."""
    code = (
        "import sys; from imrelay import cli; from imrelay.server import Server\n"
        "import gevent\n"
        "start = Server.start\n"
        "def fail():\n"
        "    raise RuntimeError('greenlet')\n"
        "def begin(server):\n"
        "    start(server)\n"
        "    for _ in range(2000): gevent.spawn(fail)\n"
        "    gevent.sleep(0)\n"
        "    raise RuntimeError('the end of it')\n"
        "Server.start = begin\n"
        "sys.exit(cli.main())\n"
    )
    host = PipedRelay(tmp_path, f"--broker-url={broker_url}", program=("-c", code))
    started.append(host)
    host.read_to_end()
    assert host.process.wait(PATIENCE) == 1
    assert host.text.count("failed with RuntimeError") > 100
    assert host.text.rstrip().endswith("RuntimeError: the end of it")


def test_the_notice_is_a_line_like_any_other() -> None:
    """The line about dropped ones has the form of the text log: time, level, logger."""
    line = log._notice(log._Text())(12)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING imrelay\.runtime\.log: 12 lines were .*\n", line
    )
