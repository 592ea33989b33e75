"""What an application accepts for a socket runs where the answer is 101, and is closed whatever the answer is."""

from __future__ import annotations

import pytest

from imrelay.websocket import Upgrade
from tests.support.websocket_peer import Peer, handshake, running_server

SERVER = {"application_decides": True, "subprotocols": ["a"]}


def test_an_accepted_endpoint_runs_and_is_closed(server):
    """It carries messages; at its end, however that comes, it is closed."""
    with Peer(server) as peer:
        peer.open().assert_alive()
        assert server.get("/held") == 1
    assert server.await_report("closed:/echo")
    assert server.get("/held") == 0


def test_headers_of_the_application_are_in_the_101(server):
    """All but those that the upgrade itself is made of."""
    with Peer(server) as peer:
        headers = peer.open(Sec_WebSocket_Protocol="a").answer.headers
    assert headers["x-more"] == "yes"
    assert headers["upgrade"] == "websocket"
    assert headers["sec-websocket-protocol"] == "a"
    assert not {"content-type", "content-length", "transfer-encoding", "date"} & headers.keys()


def test_an_answer_that_begins_late_counts(server):
    """PEP 3333 lets an application call `start_response` when its iterable is first asked."""
    with Peer(server) as peer:
        peer.open("/lazy").assert_alive()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/refused", 503),
        ("/plain-answer", 200),
        ("/replaced", 200),
        ("/raises-behind", 500),
        ("/nothing-accepted", 500),
        ("/with-a-body", 500),
        ("/close-raises", 500),
        ("/broken-attach", 500),
    ],
)
def test_any_other_answer_closes_what_was_accepted(server, path, status):
    """The answer goes out as HTTP, the connection ends behind it, and nothing is held any more."""
    for _ in range(3):
        with Peer(server) as peer:
            peer.send(handshake(path))
            answer = peer.read_answer()
            assert answer.status == status
            assert answer.headers["connection"] == "close"
            peer.read_end()
    assert server.get("/held") == 0


def test_the_last_endpoint_counts(server):
    """One that was accepted before it is closed at once."""
    with Peer(server) as peer:
        peer.open("/accepts-twice").assert_alive()
        assert server.await_report("closed:/accepts-twice")
        assert server.get("/held") == 1


def test_the_access_log_knows_who_was_not_upgraded():
    """A client that left while the endpoint attached is no 101 in the access log."""
    with running_server(application_decides=True, keep_log=True) as server:
        with Peer(server) as peer:
            peer.send(handshake("/slow-attach"))
            assert server.await_report("attach:begun")
        server.get("/go?attach:go")
        assert server.await_report("closed:/slow-attach")
        with Peer(server) as peer:
            peer.open().assert_alive()
        assert server.await_report("closed:/echo")
        server.get("/page")
        log = server.log()
    assert '"GET /slow-attach HTTP/1.1" 000' in log
    assert '"GET /echo HTTP/1.1" 101' in log


class CountingEndpoint:
    """Remembers how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def attach(self) -> None:
        """Do nothing."""

    def run(self, websocket: object) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Count it."""
        self.closed += 1


def test_nothing_can_be_accepted_after_the_answer():
    """An `Upgrade` that is kept beyond its request accepts nothing any more."""
    upgrade, late = Upgrade(("127.0.0.1", 1)), CountingEndpoint()
    assert upgrade.settle() is None
    with pytest.raises(RuntimeError, match="answered already"):
        upgrade.accept(late)
    assert late.closed == 1


def test_an_endpoint_is_handed_over_once():
    """From `accept` until `settle` it is the handler's; accepted twice, it is not closed."""
    upgrade, endpoint = Upgrade(("127.0.0.1", 1)), CountingEndpoint()
    upgrade.accept(endpoint)
    upgrade.accept(endpoint)
    assert upgrade.settle() is endpoint
    assert upgrade.settle() is None
    assert endpoint.closed == 0
