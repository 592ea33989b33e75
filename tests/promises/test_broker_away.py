"""A RabbitMQ that is not yet running, has stopped, or refuses the relay."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from tests.conftest import RelayFactory
from tests.support.browser import Browser, wait_until_ready, why_not_ready
from tests.support.harness import VirtualHost, eventually


class Forwarder:
    """A TCP port before the broker's: while it is shut, connections are refused, and those there were are cut."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._listener = self._bind(0)
        self._wakeup: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @staticmethod
    def _bind(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))  # reserves the port, but does not listen
        return listener

    @property
    def port(self) -> int:
        """Its own port."""
        return int(self._listener.getsockname()[1])

    @property
    def password(self) -> str:
        """The broker's."""
        return self._url.password or ""

    @property
    def url(self) -> str:
        """The broker's URL, through this forwarder."""
        credentials, _, _ = self._url.netloc.rpartition("@")
        return self._url._replace(netloc=f"{credentials}@127.0.0.1:{self.port}").geturl()

    @property
    def shown_url(self) -> str:
        """The same as a log may show it."""
        return self.url.replace(f":{self.password}@", ":***@")

    def open(self) -> None:
        """Let connections through from now on."""
        self._listener.listen()
        self._wakeup, stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run, args=(stop,), daemon=True)
        self._thread.start()

    def shut(self) -> None:
        """Cut all connections, and refuse new ones."""
        if self._thread is None or self._wakeup is None:
            return
        port = self.port
        self._wakeup.close()
        self._thread.join()
        self._thread = None
        self._listener.close()
        self._listener = self._bind(port)

    def close(self) -> None:
        """End it."""
        self.shut()
        self._listener.close()

    def _run(self, stop: socket.socket) -> None:
        others: dict[socket.socket, socket.socket] = {}
        with selectors.DefaultSelector() as selector, stop:
            for source in (self._listener, stop):
                selector.register(source, selectors.EVENT_READ)
            while True:
                for source in [key.fileobj for key, _ in selector.select()]:
                    assert isinstance(source, socket.socket)
                    if source is stop:
                        for each in others:
                            each.close()
                        return
                    if source is self._listener:
                        inside = self._listener.accept()[0]
                        outside = socket.create_connection((self._url.hostname, self._url.port))
                        others |= {inside: outside, outside: inside}
                        for each in (inside, outside):
                            selector.register(each, selectors.EVENT_READ)
                    elif source in others:
                        data = b""
                        with suppress(OSError):
                            data = source.recv(1 << 18)
                            others[source].sendall(data)
                        if not data:
                            for each in (source, others.pop(source)):
                                others.pop(each, None)
                                selector.unregister(each)
                                each.close()


@pytest.fixture
def forwarder(broker_url: str) -> Iterator[Forwarder]:
    """A forwarder before the broker, shut."""
    made = Forwarder(broker_url)
    try:
        yield made
    finally:
        made.close()


def test_a_relay_without_its_broker_says_so_and_goes_on(relay: RelayFactory, forwarder: Forwarder) -> None:
    """It names the URL without the password, tries again and again, is alive but not ready, and takes sockets."""
    host = relay(broker_url=forwarder.url, broker_publish_timeout=1, log_level="debug")
    reason = eventually(lambda: "refused" in (found := why_not_ready(host)) and found)
    assert "refused" in reason
    assert "amqp://" not in reason  # which anybody may read
    host.wait_for_log(r"waiting \(.*" + forwarder.shown_url.replace("*", r"\*") + ".*refused")
    with Browser(host, "one who waits") as one, Browser(host, "another") as two:
        one.say(two.user, "too early", id="c1")
        answer = one.error()
        assert (answer["code"], answer["id"], answer["temporary"]) == ("broker_unavailable", "c1", True)
        one.send("not JSON")
        assert one.error()["code"] == "bad_json"
        eventually(lambda: host.log.count("publish: waiting -> connecting") > 2)
        assert forwarder.password not in host.log + reason
        assert why_not_ready(host)


def test_it_works_as_soon_as_the_broker_is_there(relay: RelayFactory, forwarder: Forwarder) -> None:
    """Sockets that came before the broker need not come again; what was given up is not sent after all."""
    host = relay(broker_url=forwarder.url, broker_publish_timeout=1)
    with Browser(host, "before") as one, Browser(host, "before, too") as two:
        one.say(two.user, "too early", id="c1")
        assert one.error()["code"] == "broker_unavailable"
        forwarder.open()
        wait_until_ready(host)
        text = one.say(two.user, "in time", id="c2")
        assert one.ack()["id"] == "c2"
        assert two.receive() == text
        text = two.say(one.user)
        assert one.receive() == text
        assert one.rest() == two.rest() == []


def test_a_message_waits_a_while_for_the_broker(relay: RelayFactory, forwarder: Forwarder) -> None:
    """What is sent while the broker is away goes out when it comes within `publish_timeout`, once and in order."""
    host = relay(broker_url=forwarder.url, broker_publish_timeout=60)
    with Browser(host, "patient") as one, Browser(host, "the friend of patient") as two:
        for number in range(100):
            one.say(two.user, number, id=number)
        forwarder.open()
        assert two.contents_until(99) == list(range(100))
        assert sorted(one.ack()["id"] for _ in range(100)) == list(range(100))
        assert one.rest() == two.rest() == []


def test_a_broker_that_goes_and_comes_back(relay: RelayFactory, forwarder: Forwarder, broker: VirtualHost) -> None:
    """Sockets stay open, what comes to an inbox meanwhile is delivered then, and readiness follows the broker."""
    host, neighbour = relay(broker_url=forwarder.url, broker_publish_timeout=60), relay()
    forwarder.open()
    for each in (host, neighbour):
        wait_until_ready(each)
    with Browser(host, "stays") as one, Browser(neighbour, "has a broker") as two:
        for number in range(3):
            forwarder.shut()
            assert eventually(lambda: why_not_ready(host))
            text = two.say(one.user, number, id="c1")
            two.ack()
            answer = one.say(two.user, number, id="c2")
            forwarder.open()
            assert {one.receive(), one.receive()} >= {text}
            assert two.receive() == answer
            wait_until_ready(host)
        assert one.rest() == two.rest() == []


@pytest.mark.parametrize("what", ["password", "vhost"])
def test_a_broker_that_does_not_let_it_in(relay: RelayFactory, broker_url: str, what: str) -> None:
    """A wrong password or virtual host is said; the log has the URL too, without its password; it keeps trying."""
    url = urlsplit(broker_url)
    assert url.password is not None
    if what == "password":
        url = url._replace(netloc=url.netloc.replace(url.password, "another-password"))
    else:
        url = url._replace(path="/no-such-vhost")
    host = relay(broker_url=url.geturl(), log_level="debug")
    assert url.password is not None
    shown = url.geturl().replace(f":{url.password}@", ":***@")
    said = "ACCESS_REFUSED" if what == "password" else "no-such-vhost"
    reason = eventually(lambda: said in (found := why_not_ready(host)) and found)
    eventually(lambda: shown in host.log)
    eventually(lambda: host.log.count("publish: waiting -> connecting") > 1)
    assert url.password not in host.log + reason


def test_the_next_url_is_tried(relay: RelayFactory, forwarder: Forwarder, broker_url: str) -> None:
    """Of several URLs one that answers is enough."""
    host = relay(broker_url=f"{forwarder.url} {broker_url}")
    wait_until_ready(host)
    with Browser(host, "one of a cluster") as browser:
        text = browser.say(browser.user)
        assert browser.receive() == text


def test_a_relay_may_be_stopped_while_it_connects(relay: RelayFactory, forwarder: Forwarder) -> None:
    """With a broker that takes the connection and says nothing, a stop is as clean as any."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        host = relay(broker_url=f"amqp://ann:pw@127.0.0.1:{silent.getsockname()[1]}/")
        connections = [silent.accept()[0] for _ in range(2)]
        for connection in connections:
            connection.settimeout(30)
            assert connection.recv(8) == b"AMQP\x00\x00\x09\x01"
        assert host.stop() == 0
        assert "Traceback" not in host.log
        for connection in connections:
            connection.close()
