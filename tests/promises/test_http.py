"""What the relay answers over HTTP, and whom it refuses before the upgrade."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import pytest

from imrelay.app import create_app
from imrelay.sessions.services import Services
from tests.conftest import RelayFactory
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import RelayProcess, eventually, plain_environment
from tests.support.websocket_peer import PATIENCE, HttpAnswer, Peer, handshake

_numbers = count(1)


@dataclass(frozen=True)
class Address:
    """Where a raw client connects to; it takes no TLS."""

    port: int
    certificate: str = ""


@pytest.fixture(scope="module")
def host(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """One relay with the default settings for all tests that need no other."""
    arguments = ["serve", "--server-port=0", f"--broker-url={broker_url}"]
    relay = RelayProcess(tmp_path_factory.mktemp("relay"), arguments, plain_environment())
    try:
        relay.wait_until_listening()
        wait_until_ready(relay)
        yield relay
        assert relay.stop() == 0
        assert "Traceback" not in relay.log, relay.log
    finally:
        relay.kill()


@pytest.fixture
def somebody() -> Iterator[str]:
    """An id that no other test has used."""
    return (f"visitor-{number}" for number in _numbers)


def ask(host: RelayProcess, request: bytes) -> HttpAnswer:
    """Send a request as it is, and return the answer."""
    with Peer(Address(host.port)) as peer:  # type: ignore[arg-type]
        peer.send(request)
        return peer.read_answer()


def get(host: RelayProcess, path: str, *, method: str = "GET") -> HttpAnswer:
    """Send a plain request for a path, which goes out as it stands."""
    return ask(host, f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode("latin-1"))


def error_in(answer: HttpAnswer) -> dict[str, str]:
    """Return the error of a refusal, whose body has exactly the form of the protocol."""
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = json.loads(answer.body)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["message"].isprintable()
    assert body["error"]["message"]
    return dict(body["error"])


# -- plain requests ------------------------------------------------------------------------------------------


def test_the_page(host: RelayProcess) -> None:
    """`/` is the chat page; `/<id>` is the same page, which sees from its address who its user is."""
    pages = [
        get(host, path) for path in ("/", "/1", "/ann@example.org", "/%E4%B8%AD%E6%96%87", "/a%20b", "/1?x=y")
    ]
    for page in pages:
        assert page.status == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.body == pages[0].body
    assert b"WebSocket" in pages[0].body
    assert get(host, "/%3Cscript%3E").body == pages[0].body


def test_health(host: RelayProcess) -> None:
    """/healthz is 200 while the process turns, /readyz once it can accept messages."""
    assert get(host, "/healthz").status == 200

    def ready() -> HttpAnswer | None:
        answer = get(host, "/readyz")
        return answer if answer.status == 200 else None

    answer = eventually(ready)
    assert json.loads(answer.body) == {"status": "ready"}


@pytest.mark.parametrize("path", ["/a/b", "/1/", "/api/nothing", "/healthz/x"])
def test_what_is_not_there_is_not_found(host: RelayProcess, path: str) -> None:
    """404 with a JSON body."""
    answer = get(host, path)
    assert answer.status == 404
    assert error_in(answer)["code"] == "not_found"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_pages_are_only_read(host: RelayProcess, method: str) -> None:
    """405 with a JSON body that the method is not for this path, and a header that says which are."""
    for path in ("/", "/1", "/healthz"):
        answer = get(host, path, method=method)
        assert answer.status == 405
        assert error_in(answer)["code"] == "method_not_allowed"
        assert "GET" in answer.headers["allow"]


BAD_PATHS = {
    "two dots": "/..",
    "two dots, encoded": "/%2e%2e",
    "one dot": "/%2E",
    "a control character": "/a%00b",
    "a newline": "/%0A",
    "a C1 control": "/%C2%85",
    "129 bytes": "/" + "a" * 129,
    "129 bytes in 43 characters": "/" + "%E4%B8%AD" * 43,
    "broken UTF-8": "/%FF",
    "UTF-8 cut off": "/%E4%B8",
    "half of a surrogate pair": "/%ED%A0%80",
    "an overlong form": "/%C0%AF",
    "broken UTF-8, not encoded": "/\xff",
}


@pytest.mark.parametrize("path", BAD_PATHS.values(), ids=BAD_PATHS)
def test_a_bad_id_has_no_page(host: RelayProcess, path: str) -> None:
    """What can be nobody's id is 400, also without an upgrade."""
    answer = get(host, path)
    assert answer.status == 400
    assert error_in(answer)["code"] in ("bad_id", "bad_request")


def test_a_malformed_request_is_answered(host: RelayProcess) -> None:
    """400 with a JSON body for what is no HTTP; and the next one is served."""
    for request in (b"hello\r\n\r\n", b"GET / / HTTP/1.1\r\n\r\n"):
        answer = ask(host, request)
        assert answer.status == 400
        assert error_in(answer)["code"] == "bad_request"
    assert get(host, "/healthz").status == 200


# -- before the upgrade --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*BAD_PATHS.values(), "/", "/a/b", "/1/", "/%2F", "/a%2Fb", "//"], ids=[*BAD_PATHS, *"abcdef"]
)
def test_a_bad_id_has_no_socket(host: RelayProcess, path: str) -> None:
    """400 before the upgrade, with the rule that the id breaks."""
    answer = ask(host, handshake(path))
    assert answer.status == 400
    assert error_in(answer)["code"] == "bad_id"


@pytest.mark.parametrize(
    ("path", "user"),
    [
        ("/%61nn", "ann"),
        ("/ann+bob", "ann+bob"),
        ("/a%2Bb", "a+b"),
        ("/100%25", "100%"),
        ("/%E4%B8%AD%e6%96%87", "中文"),
        ("/q?to=nobody", "q"),
        ("/%3Fq", "?q"),
        ("/healthz", "healthz"),
        ("/" + "b" * 128, "b" * 128),
    ],
)
def test_percent_encoding_is_decoded_once(
    host: RelayProcess, somebody: Iterator[str], path: str, user: str
) -> None:
    """The id is the path without its '/', decoded, without the query."""
    with Browser(host, next(somebody)) as sender, Peer(Address(host.port)) as peer:  # type: ignore[arg-type]
        peer.open(path)
        text = sender.say(user)
        assert peer.read_message() == text


BAD_HANDSHAKES: dict[str, dict[str, str | None]] = {
    "no key": {"Sec_WebSocket_Key": None},
    "a short key": {"Sec_WebSocket_Key": "dGhlIHNhbXBsZQ=="},
    "no Connection": {"Connection": "keep-alive"},
    "no Host": {"Host": None},
    "a POST": {"line": "POST /refused HTTP/1.1"},
    "HTTP/1.0": {"line": "GET /refused HTTP/1.0"},
}


@pytest.mark.parametrize("changes", BAD_HANDSHAKES.values(), ids=BAD_HANDSHAKES)
def test_a_bad_handshake_is_refused(host: RelayProcess, changes: dict[str, str | None]) -> None:
    """400 with a JSON body, and no session is made."""
    answer = ask(host, handshake("/refused", **changes))
    assert answer.status == 400
    assert error_in(answer)["code"] == "bad_handshake"
    assert "session of 'refused'" not in host.log


@pytest.mark.parametrize("version", [None, "8", "14", "13, 8", "x"])
def test_another_version_is_told_ours(host: RelayProcess, version: str | None) -> None:
    """426, and the header says 13."""
    answer = ask(host, handshake("/refused", Sec_WebSocket_Version=version))
    assert answer.status == 426
    assert answer.headers["sec-websocket-version"] == "13"
    error_in(answer)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1", "file://", "x", ""]
)
def test_a_page_from_elsewhere_may_not_connect(host: RelayProcess, origin: str) -> None:
    """403 for a page of another origin than the host that it asks."""
    answer = ask(host, handshake("/refused", Host=f"127.0.0.1:{host.port}", Origin=origin))
    assert answer.status == 403
    assert error_in(answer)["code"] == "origin_not_allowed"


def test_a_page_from_here_may_connect(host: RelayProcess, somebody: Iterator[str]) -> None:
    """The relay's own page passes, and so does a program, which has no origin."""
    for origin in (f"http://127.0.0.1:{host.port}", None):
        answer = ask(
            host,
            handshake(f"/{next(somebody)}", Host=f"127.0.0.1:{host.port}", Origin=origin),
        )
        assert answer.status == 101


@pytest.mark.parametrize(
    "changes",
    [
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": "evil.example:8080", "Origin": "http://evil.example:8080"},
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": "2130706433"},
        {"Host": "0.0.0.0"},
        {"Host": "evil.example", "X_Forwarded_Host": "localhost"},
        {"line": "GET http://evil.example/refused HTTP/1.1", "Origin": "http://evil.example"},
    ],
    ids=str,
)
def test_another_name_on_loopback_may_not_connect(host: RelayProcess, changes: dict[str, str | None]) -> None:
    """403: a page of evil.example whose DNS suddenly says 127.0.0.1 has the matching Origin."""
    answer = ask(host, handshake("/refused", **changes))
    assert answer.status == 403
    error = error_in(answer)
    assert error["code"] == "host_not_allowed"
    assert "[server] allowed_origins" in error["message"]
    assert "session of 'refused'" not in host.log


def test_the_names_of_loopback_may_connect(host: RelayProcess, somebody: Iterator[str]) -> None:
    """The relay's page works under each name of this machine."""
    for name in (
        "localhost",
        "localhost.",
        "chat.localhost",
        "127.0.0.1",
        "127.0.0.2",
        "[::1]",
        "[::ffff:127.0.0.1]",
    ):
        for port in (f":{host.port}", ""):
            origin = f"http://{name}{port}"
            answer = ask(host, handshake(f"/{next(somebody)}", Host=name + port, Origin=origin))
            assert answer.status == 101, name


@pytest.mark.parametrize(
    "changes",
    [
        {"Host": "localhost\r\nHost: localhost"},
        {"Host": "localhost\r\nHost: evil.example"},
        {"Host": "user@localhost"},
        {"Host": "localhost/"},
        {"Host": "[::1"},
        {"Host": "localhost:80:80"},
        {"Host": "localhost, localhost"},
        {"line": "GET http://localhost@evil.example/refused HTTP/1.1"},
        {"line": "GET ws://localhost/refused HTTP/1.1"},
        {"line": "HEAD /refused HTTP/1.1"},
        {"line": "OPTIONS * HTTP/1.1"},
        {"Content_Length": "5"},
        {"Transfer_Encoding": "chunked"},
    ],
    ids=str,
)
def test_a_malformed_host_or_a_body_is_no_handshake(host: RelayProcess, changes: dict[str, str | None]) -> None:
    """400 before anything else is looked at."""
    answer = ask(host, handshake("/refused", **changes))
    assert answer.status == 400
    error_in(answer)


def test_with_allowed_origins_any_name_may_be_asked(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """Behind a proxy the relay is asked by its public name; then the origin alone decides."""
    host = relay(server_allowed_origins="https://chat.example")
    for origin, status in (("https://chat.example", 101), (None, 101), ("http://chat.example", 403)):
        request = handshake(f"/{next(somebody)}", Host="chat.example", Origin=origin)
        assert ask(host, request).status == status


def test_off_loopback_the_named_host_is_enough(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """A relay that is reached at another address of its machine cannot know its names; the origin has to match."""
    address = next(iter(socket.gethostbyname_ex(socket.gethostname())[2]), "127.0.0.1")
    if address.startswith("127."):
        pytest.skip("this machine has no other address")
    host = relay(server_host=address)
    with socket.create_connection((address, host.port), PATIENCE) as sock:
        sock.sendall(handshake(f"/{next(somebody)}", Host="chat.example", Origin="http://chat.example"))
        assert sock.recv(100).startswith(b"HTTP/1.1 101")
    with socket.create_connection((address, host.port), PATIENCE) as sock:
        sock.sendall(handshake(f"/{next(somebody)}", Host="chat.example", Origin="http://evil.example"))
        assert sock.recv(100).startswith(b"HTTP/1.1 403")


def test_the_page_on_ipv6(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """The page and its socket work at http://[::1]:port/."""
    host = relay(server_host="::1")
    port = int(host.url.rpartition(":")[2])
    for request, status in (
        (f"GET /1 HTTP/1.1\r\nHost: [::1]:{port}\r\n\r\n".encode(), b"200"),
        (handshake(f"/{next(somebody)}", Host=f"[::1]:{port}", Origin=f"http://[::1]:{port}"), b"101"),
        (handshake(f"/{next(somebody)}", Host="evil.example", Origin="http://evil.example"), b"403"),
    ):
        with socket.create_connection(("::1", port), PATIENCE) as sock:
            sock.sendall(request)
            assert sock.recv(100).split()[1] == status


def test_allowed_origins_are_those_alone(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """With `allowed_origins`, pages of these may connect and the relay's own no longer."""
    host = relay(server_allowed_origins="https://chat.example http://localhost:8080")
    for origin, status in (
        ("https://chat.example", 101),
        ("https://CHAT.example:443", 101),
        ("http://localhost:8080", 101),
        ("http://chat.example", 403),
        ("https://chat.example.org", 403),
        ("http://localhost", 403),
        (f"http://127.0.0.1:{host.port}", 403),
    ):
        request = handshake(f"/{next(somebody)}", Host=f"127.0.0.1:{host.port}", Origin=origin)
        assert ask(host, request).status == status, origin


def test_no_more_than_max_connections(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """503 for one more; plain requests go on; a socket that ends makes room, a refused handshake takes none."""
    host = relay(server_max_connections=2)
    first, second = Browser(host, next(somebody)), Browser(host, next(somebody))
    with closing(second):
        for _ in range(3):
            answer = ask(host, handshake(f"/{next(somebody)}"))
            assert answer.status == 503
            assert error_in(answer)["code"] == "too_many_connections"
        assert get(host, "/healthz").status == 200
        assert second.rest() == []
        first.close()
        eventually(lambda: ask(host, handshake(f"/{next(somebody)}")).status == 101)


def test_nobody_may_come_while_the_relay_is_stopping(relay: RelayFactory, somebody: Iterator[str]) -> None:
    """While the last messages leave, a connection that is still there gets 503, and /readyz says why."""
    host = relay(server_drain_timeout=60, websocket_send_timeout=60)
    wait_until_ready(host)
    address: Any = Address(host.port)
    with (
        Peer(address, receive_buffer=4096) as slow,
        Peer(address) as late,
        Browser(host, next(somebody)) as sender,
    ):
        slow.open(f"/{(user := next(somebody))}")
        for number in range(200):  # more than the system's buffers hold: so the relay has to wait for it
            sender.say(user, "x" * 60_000, id=number)
        assert sorted(sender.ack()["id"] for _ in range(200)) == list(range(200))
        late.send(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert late.read_answer().status == 200
        host.process.terminate()
        assert sender.close_code() == 1012
        for request in (b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n", handshake(f"/{next(somebody)}")):
            late.send(request)
            answer = late.read_answer()
            assert answer.status == 503
            assert error_in(answer)["message"].startswith("the relay is stopping")
        assert host.process.poll() is None
        slow.sock.close()
        assert host.process.wait(PATIENCE) == 0


def test_a_server_that_cannot_upgrade_says_so() -> None:
    """Under a WSGI server without our handler an upgrade is answered with 501, and plain requests as ever."""
    app = create_app(cast(Services, None), ())
    answers: list[str] = []

    def call(**environ: str) -> bytes:
        setup = {"REQUEST_METHOD": "GET", "PATH_INFO": "/ann", "SERVER_NAME": "x", "SERVER_PORT": "80"}
        setup |= {"wsgi.url_scheme": "http", **environ}
        return b"".join(app(setup, lambda status, headers, exc_info=None: answers.append(status)))

    for path in ("/ann", "/", "/a/b", "/healthz"):  # of a handshake, all of it is the id
        answer = call(HTTP_UPGRADE="WebSocket", HTTP_CONNECTION="Upgrade", PATH_INFO=path)
        assert json.loads(answer)["error"]["code"] == "cannot_upgrade", path
    assert json.loads(call(HTTP_UPGRADE="WebSocket"))["error"]["code"] == "cannot_upgrade"  # a proxy's doing
    assert call().startswith(b"<!doctype html>")
    assert [answer[:3] for answer in answers] == ["501"] * 5 + ["200"]
