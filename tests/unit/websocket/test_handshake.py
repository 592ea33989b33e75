"""The opening handshake: version 13 alone, checked as RFC 6455 section 4.2 says, refused by complete answers."""

from __future__ import annotations

import pytest

from tests.support.websocket_peer import KEY, TEXT, Peer, close_frame, frame, handshake

#: Settings of the server.
SERVER = {"subprotocols": ["imrelay.v1", "echo-protocol"]}


def ask(server, request):
    with Peer(server) as peer:
        peer.send(request)
        answer = peer.read_answer()
        if answer.status != 101:
            peer.read_end()
        return answer


def test_the_sample_of_the_rfc_is_answered_as_there(server):
    """The key of RFC 6455 section 1.3 gets the accept value that stands there, and nothing unasked."""
    answer = ask(server, handshake())
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert answer.headers["upgrade"] == "websocket"
    assert answer.headers["connection"] == "Upgrade"
    assert not {"sec-websocket-protocol", "sec-websocket-extensions", "content-length", "transfer-encoding"} & set(
        answer.headers
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"Connection": "keep-alive, Upgrade"},
        {"Connection": "keep-alive,upgrade"},
        {"Upgrade": "WebSocket"},
        {"Host": "example.com:8080"},
        {"Host": "[::1]:8080"},
        {"Sec_WebSocket_Extensions": "permessage-deflate; client_max_window_bits"},
        {"Sec_WebSocket_Protocol": "unknown"},
        {"Content_Length": "0"},
        {"Origin": "null"},
        {"User_Agent": "x" * 8000},
    ],
)
def test_valid_handshakes_pass(server, changes):
    """What RFC 6455 allows is upgraded."""
    assert ask(server, handshake(**changes)).status == 101


@pytest.mark.parametrize(
    "changes",
    [
        {"Connection": "not-an-upgrade"},
        {"Connection": "close"},
        {"Connection": None},
        {"Host": None},
        {"Host": ""},
        {"Host": "two, hosts"},
        {"Host": "user@example.com"},
        {"Sec_WebSocket_Key": None},
        {"Sec_WebSocket_Key": ""},
        {"Sec_WebSocket_Key": "tooshort"},
        {"Sec_WebSocket_Key": KEY + "AAAA"},
        {"Sec_WebSocket_Key": KEY[:-3] + "\xe9=="},
        {"Sec_WebSocket_Key": "!!!!!!!!!!!!!!!!!!!!!!=="},
        {"line": "POST /echo HTTP/1.1"},
        {"line": "HEAD /echo HTTP/1.1"},
        {"line": "GET /echo HTTP/1.0"},
        {"line": "GET /echo"},
        {"Content_Length": "5"},
        {"Transfer_Encoding": "chunked"},
    ],
)
def test_broken_handshakes_get_400(server, changes):
    """Whatever breaks section 4.2.1 is answered with 400, a JSON body, and the end of the connection."""
    answer = ask(server, handshake(**changes))
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert answer.error == "bad_handshake"


@pytest.mark.parametrize("version", [None, "", "8", "7", "12", "14", "013", "13, 8", "13.0", "+13"])
def test_other_versions_get_426(server, version):
    """A missing version, or any but 13, is answered with 426 that names 13."""
    answer = ask(server, handshake(Sec_WebSocket_Version=version))
    assert (answer.status, answer.error) == (426, "bad_version")
    assert answer.headers["sec-websocket-version"] == "13"


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ("imrelay.v1", "imrelay.v1"),
        ("echo-protocol", "echo-protocol"),
        ("echo-protocol, imrelay.v1", "imrelay.v1"),
        ("a,b ,\techo-protocol", "echo-protocol"),
        ("imrelay.v10", None),
        ("imrelay.v", None),
        ("my-echo-protocol", None),
        ("IMRELAY.V1", None),
        ("", None),
    ],
)
def test_the_subprotocol_is_an_exact_name_in_the_servers_order(server, offered, chosen):
    """The first of the server's own names that was offered is answered; a part of a name is none."""
    answer = ask(server, handshake(Sec_WebSocket_Protocol=offered))
    assert answer.headers.get("sec-websocket-protocol") == chosen


def test_two_headers_of_subprotocols_are_one_list(server):
    """A list of subprotocols may be split over several headers."""
    request = handshake(Sec_WebSocket_Protocol="x\r\nSec-WebSocket-Protocol: echo-protocol")
    assert ask(server, request).headers["sec-websocket-protocol"] == "echo-protocol"


def test_two_keys_are_refused(server):
    """A header that may stand once makes the handshake invalid when it stands twice."""
    assert ask(server, handshake(Sec_WebSocket_Key=f"{KEY}\r\nSec-WebSocket-Key: {KEY}")).status == 400


@pytest.mark.parametrize("changes", [{"Upgrade": None}, {"Upgrade": "h2c"}, {"Upgrade": None, "Connection": None}])
def test_requests_for_something_else_go_to_the_application(server, changes):
    """A request that does not ask for a WebSocket is plain HTTP, whatever other headers it has."""
    with Peer(server) as peer:
        peer.send(handshake("/page", **changes))
        answer = peer.read_answer()
        assert answer.status == 200
        assert b"/page" in answer.body


def test_a_plain_connection_is_kept_alive_and_may_then_upgrade(server):
    """Several plain requests and then a handshake may use one connection."""
    with Peer(server) as peer:
        for _ in range(3):
            peer.send(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n")
            assert peer.read_answer().status == 200
        peer.open()
        peer.assert_alive()


def test_a_body_is_bounded_for_the_application(server):
    """An application reads the body that was announced and no more, whatever the Connection header says."""
    with Peer(server) as peer:
        request = b"POST /body HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nContent-Length: 5\r\n\r\nhello"
        peer.send(request + b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n")
        assert peer.read_answer().body == b'"hello"'
        assert b"/next" in peer.read_answer().body


def test_frames_behind_the_handshake_are_not_lost(server):
    """A client that sends its first frames without waiting for the answer gets its echoes."""
    big = b"y" * 20_000
    with Peer(server) as peer:
        peer.send(handshake() + frame(TEXT, b"early") + frame(TEXT, big) + close_frame(1000))
        assert peer.read_answer().status == 101
        assert peer.read_message() == "early"
        assert peer.read_message() == big.decode()
        peer.expect_closed(1000)


def test_bytes_behind_a_refused_handshake_do_not_reset_the_answer(server):
    """A refusal arrives whole, though the client has sent a lot that nobody reads."""
    with Peer(server) as peer:
        peer.send(handshake(Sec_WebSocket_Version="8") + b"\x00" * 100_000)
        assert peer.read_answer().status == 426
        peer.read_end()
