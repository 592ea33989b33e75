"""The hook that may refuse before the upgrade, and what becomes of what it took."""

from __future__ import annotations

import dataclasses
import json

import pytest

from imrelay.websocket import Refusal
from tests.websocket_peer import Peer, handshake, running_server


@pytest.fixture
def server():
    with running_server() as server:
        yield server


def test_a_refusal_is_a_whole_http_answer(server):
    """Status, extra headers and the JSON body are the hook's; the connection ends behind them."""
    with Peer(server) as peer:
        peer.send(handshake("/refused"))
        answer = peer.read_answer()
        peer.read_end()
    assert answer.status == 503
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body) == {"error": {"code": "overloaded", "message": "come back later"}}


def test_the_hook_is_asked_after_the_handshake_was_checked(server):
    """A broken handshake is refused for that, before the hook is asked."""
    with Peer(server) as peer:
        peer.send(handshake("/refused", Sec_WebSocket_Version="8"))
        assert peer.read_answer().status == 426


def test_the_hook_is_not_asked_about_plain_requests(server):
    """A request without an upgrade goes to the application, whatever the hook thinks of the path."""
    with Peer(server) as peer:
        peer.send(handshake("/refused", Upgrade=None))
        assert peer.read_answer().status == 200


def test_a_broken_hook_is_a_500(server):
    """An exception in the hook is answered with 500, and the server goes on."""
    with Peer(server) as peer:
        peer.send(handshake("/broken-hook"))
        assert peer.read_answer().status == 500
    with Peer(server) as peer:
        peer.open().assert_alive()


def test_the_hook_may_block(server):
    """While the hook waits for one socket, others are served; then the upgrade goes on, early frames included."""
    with Peer(server) as slow, Peer(server) as other:
        slow.send(handshake("/slow-hook"))
        assert server.await_report("hook:begun")
        other.open().assert_alive()
        server.get("/go?hook:go")
        assert slow.read_answer().status == 101
        slow.assert_alive()


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_left_during_the_hook_is_abandoned(server, reset):
    """If the client is gone when the hook is done, the application is not called and `abandoned` is."""
    with Peer(server) as peer:
        peer.send(handshake("/slow-hook?name=never"))
        assert server.await_report("hook:begun")
        if reset:
            peer.sock.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SOL_SOCKET, SO_LINGER: close sends RST
    server.get("/go?hook:go")
    assert server.await_report("abandoned") == "a place"


def test_refusals_are_values():
    """A refusal cannot be changed, and needs no headers."""
    refusal = Refusal(401, "token_missing", "log in first")
    assert refusal.headers == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        refusal.status = 200
