"""An application that decides about handshakes may refuse one, or take a place that it gets back in any case."""

from __future__ import annotations

import dataclasses
import json

import pytest

from imrelay.websocket.handshake import Refusal
from tests.support.websocket_peer import Peer, handshake, running_server


@pytest.fixture
def server():
    with running_server(application_decides=True) as server:
        yield server


def test_a_refusal_is_a_whole_http_answer(server):
    """Status, headers and body are the application's; the connection ends behind them."""
    with Peer(server) as peer:
        peer.send(handshake("/refused"))
        answer = peer.read_answer()
        peer.read_end()
    assert answer.status == 503
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body) == {"error": {"code": "overloaded", "message": "come back later"}}


def test_the_application_is_asked_after_the_handshake_was_checked(server):
    """A broken handshake is refused for that, before the application is asked."""
    with Peer(server) as peer:
        peer.send(handshake("/refused", Sec_WebSocket_Version="8"))
        assert peer.read_answer().status == 426


def test_a_plain_request_is_no_handshake(server):
    """A request without an upgrade finds no `Upgrade` in its environ."""
    with Peer(server) as peer:
        peer.send(handshake("/refused", Upgrade=None))
        assert peer.read_answer().status == 200


def test_a_broken_application_is_a_500(server):
    """An exception in the application is answered with 500, and the server goes on."""
    with Peer(server) as peer:
        peer.send(handshake("/raises"))
        assert peer.read_answer().status == 500
        peer.read_end()
    with Peer(server) as peer:
        peer.open().assert_alive()


def test_attaching_may_block(server):
    """While one socket attaches, others are served; then the upgrade goes on, early frames included."""
    with Peer(server) as slow, Peer(server) as other:
        slow.send(handshake("/slow-attach"))
        assert server.await_report("attach:begun")
        other.open().assert_alive()
        server.get("/go?attach:go")
        assert slow.read_answer().status == 101
        slow.assert_alive()


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_left_while_it_attached(server, reset):
    """Where the client is gone when the endpoint has attached, it is not run, and closed."""
    with Peer(server) as peer:
        peer.send(handshake("/slow-attach?name=never"))
        assert server.await_report("attach:begun")
        if reset:
            peer.sock.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SOL_SOCKET, SO_LINGER: close sends RST
    server.get("/go?attach:go")
    assert server.await_report("closed:/slow-attach")
    assert server.get("/held") == 0


def test_refusals_are_values():
    """A refusal cannot be changed, and needs no headers."""
    refusal = Refusal(401, "token_missing", "log in first")
    assert refusal.headers == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        refusal.status = 200
