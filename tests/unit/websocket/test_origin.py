"""The Origin rule: scheme, host and port must match exactly; no Origin passes, `null` does not."""

from __future__ import annotations

import pytest

from imrelay.websocket import is_loopback, names_loopback, origin_allowed
from tests.support.websocket_peer import Peer, handshake, running_server


def environ(origin=None, host="chat.example.com", scheme="http"):
    """Return what of a WSGI environ counts here."""
    found = {"HTTP_HOST": host, "wsgi.url_scheme": scheme}
    if origin is not None:
        found["HTTP_ORIGIN"] = origin
    return found


LISTED = ["https://chat.example.com", "http://localhost:8080", "https://[2001:db8::1]:8443"]


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "https://chat.example.com",
        "https://chat.example.com:443",
        "HTTPS://Chat.Example.COM",
        "http://localhost:8080",
        "https://[2001:db8::1]:8443",
    ],
)
def test_listed_origins_pass(origin):
    """An entry matches with its default port said or not; a request without Origin passes."""
    assert origin_allowed(environ(origin), LISTED)


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://chat.example.com",
        "https://chat.example.com:8443",
        "https://chat.example.com.evil.net",
        "https://evil.net/https://chat.example.com",
        "https://evilchat.example.com",
        "https://example.com",
        "https://user@chat.example.com",
        "https://chat.example.com/path",
        "https://chat.example.com https://evil.net",
        "https://chat.example.com,https://evil.net",
        "https://chat.example.com\n",
        "chat.example.com",
        "//chat.example.com",
        "http://localhost",
        "http://localhost:80800",
        "file://",
        "chrome-extension://abcdef",
    ],
)
def test_other_origins_do_not(origin):
    """Another scheme, host or port, `null`, and whatever is no origin at all are not allowed."""
    assert not origin_allowed(environ(origin), LISTED)
    assert not origin_allowed(environ(origin, host="another.example.com"), [])


@pytest.mark.parametrize(
    ("origin", "host", "scheme"),
    [
        ("http://chat.example.com", "chat.example.com", "http"),
        ("http://chat.example.com", "chat.example.com:80", "http"),
        ("http://chat.example.com:80", "chat.example.com", "http"),
        ("http://chat.example.com:8080", "chat.example.com:8080", "http"),
        ("https://chat.example.com", "chat.example.com", "https"),
        # behind a proxy that takes off the TLS and passes the Host on
        ("https://chat.example.com", "chat.example.com", "http"),
        ("https://chat.example.com", "chat.example.com:443", "http"),
        ("http://[::1]:8080", "[::1]:8080", "http"),
        ("http://CHAT.example.com", "chat.EXAMPLE.com", "http"),
    ],
)
def test_without_a_list_the_named_host_passes(origin, host, scheme):
    """An empty list stands for the host that the request names."""
    assert origin_allowed(environ(origin, host, scheme), [])


@pytest.mark.parametrize(
    ("origin", "host", "scheme"),
    [
        ("http://evil.net", "chat.example.com", "http"),
        ("http://chat.example.com:8080", "chat.example.com", "http"),
        ("http://chat.example.com", "chat.example.com:8080", "http"),
        ("https://chat.example.com", "chat.example.com:80", "http"),
        ("http://chat.example.com", "chat.example.com", "https"),
        ("http://chat.example.com", "", "http"),
        ("null", "null", "http"),
    ],
)
def test_without_a_list_other_hosts_do_not(origin, host, scheme):
    """Another host, or another port of the same host, is another origin."""
    assert not origin_allowed(environ(origin, host, scheme), [])


def test_the_rule_in_a_real_handshake():
    """An application that asks for it refuses a foreign page and lets its own page pass."""
    with running_server(application_decides=True) as server:
        own = f"http://127.0.0.1:{server.port}"
        for origin, status in ((own, 101), (None, 101), ("null", 403), ("http://127.0.0.1", 403)):
            with Peer(server) as peer:
                peer.send(handshake("/same-origin", Host=f"127.0.0.1:{server.port}", Origin=origin))
                assert peer.read_answer().status == status


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8080",
        "LOCALHOST.",
        "chat.localhost:1",
        "127.0.0.1",
        "127.0.0.1:8080",
        "127.8.9.10",
        "[::1]",
        "[::1]:8080",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]:80",
    ],
)
def test_names_of_this_machine(host):
    """What no foreign DNS can be made to say is a name of loopback."""
    assert names_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "localhost.evil.example",
        "evillocalhost",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "local%68ost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",
        "[::]",
        "[::2]",
        "128.0.0.1",
        "[::ffff:10.0.0.1]",
        "::1",
        "localhost:port",
        "localhost, evil.example",
    ],
)
def test_other_names(host):
    """Everything else is not, other spellings of the address included: no browser sends them."""
    assert not names_loopback(host)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (("127.0.0.1", 8080), True),
        (("127.0.0.53", 8080), True),
        (("::1", 8080, 0, 0), True),
        (("::ffff:127.0.0.1", 8080, 0, 0), True),
        (("10.0.0.1", 8080), False),
        (("2001:db8::1", 8080, 0, 0), False),
        (("fe80::1%eth0", 8080, 0, 2), False),
        ("/run/imrelay.sock", False),
        (b"\0imrelay", False),
        ("", False),
    ],
)
def test_addresses_of_this_machine(address, expected):
    """The address of an accepted socket is on loopback or not; a Unix socket is behind a proxy."""
    assert is_loopback(address) is expected
