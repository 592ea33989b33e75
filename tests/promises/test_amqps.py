"""amqps: the broker's certificate is verified by default, and the relay can show one of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.conftest import RelayFactory
from tests.support.brokers import free_ports, readiness, wait_ready
from tests.support.harness import RelayProcess, VirtualHost
from tests.support.traffic import Traffic


class Authority:
    """A certificate authority made by openssl, in a folder of its own.

    Its certificates have what strict verification asks for (RFC 5280, the default from Python 3.13 on): `keyUsage`
    in the authority's own, `authorityKeyIdentifier` in those that it issues.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.certificate = folder / "ca.pem"
        self._key = folder / "ca-key.pem"
        self._openssl(
            *("req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *(
                "-keyout",
                self._key,
                "-out",
                self.certificate,
                "-days",
                "2",
                "-subj",
                "/CN=an authority of the test",
                "-addext",
                "keyUsage=critical,keyCertSign,cRLSign",
            ),
        )

    def issue(self, name: str, *, address: str = "127.0.0.1") -> tuple[Path, Path]:
        """Make a certificate that holds for an address; return it and its key."""
        certificate, key, request = (self._folder / f"{name}{end}" for end in (".pem", "-key.pem", ".csr"))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName=IP:{address}\n"
            "basicConstraints=critical,CA:FALSE\n"
            "keyUsage=critical,digitalSignature\n"
            "subjectKeyIdentifier=hash\n"
            "authorityKeyIdentifier=keyid\n"
        )
        self._openssl(
            *("req", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-keyout", key, "-out", request, "-subj", f"/CN={name}"),
        )
        self._openssl(
            *("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", "2", "-out", certificate, "-extfile", extensions),
        )
        return certificate, key

    def verify_strictly(self, certificate: Path) -> None:
        """Fail with what openssl says where the certificate does not hold under strict verification."""
        self._openssl("verify", "-x509_strict", "-CAfile", self.certificate, certificate)

    @staticmethod
    def _openssl(*arguments: object) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class TlsSetup:
    """What the tests need of the set-up: URLs, and the authority that the broker's certificate is of."""

    authority: Authority
    #: Anybody may connect.
    url: str
    #: Only clients with a certificate of the authority may connect.
    strict_url: str


@pytest.fixture(scope="module")
def tls(broker: VirtualHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsSetup]:
    """Two TLS listeners on the node of the run, for as long as the module needs them."""
    authority = Authority(tmp_path_factory.mktemp("tls") / "authority")
    certificate, key = authority.issue("broker")
    files = f'{{cacertfile, "{authority.certificate}"}}, {{certfile, "{certificate}"}}, {{keyfile, "{key}"}}'
    broker.evaluate("rabbit_networking:ensure_ssl(), ok")
    ports = []
    try:
        for options in ("{verify, verify_none}", "{verify, verify_peer}, {fail_if_no_peer_cert, true}"):
            (port,) = free_ports(1)
            broker.evaluate(
                f"rabbit_networking:start_ssl_listener({{{{127,0,0,1}}, {port}, inet}}, [{files}, {options}], 4)"
            )
            ports.append(port)
        yield TlsSetup(authority, *(_amqps(broker.url, port) for port in ports))
    finally:
        for port in ports:
            broker.evaluate(f"rabbit_networking:stop_tcp_listener({{{{127, 0, 0, 1}}, {port}, inet}}), ok")


def _amqps(url: str, port: int, host: str = "127.0.0.1") -> str:
    parts = urlsplit(url)
    credentials = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(scheme="amqps", netloc=f"{credentials}@{host}:{port}"))


def assert_refused(host: RelayProcess, why: str) -> None:
    """Assert that the relay says why it has no broker, in its log and in `/readyz`."""
    host.wait_for_log(f"broker connection publish: .*{why}")
    status, reason = readiness(host)
    assert status == 503
    assert "no broker to publish to" in reason
    assert "imrelay:***@" in host.log, "the password stays out of the log"


def test_the_certificates_of_the_tests_hold_under_strict_verification(tmp_path: Path) -> None:
    """On every Python, not only where strict verification is the default."""
    authority = Authority(tmp_path / "authority")
    certificate, _ = authority.issue("broker")
    authority.verify_strictly(certificate)


def test_traffic_goes_over_a_verified_connection(tls: TlsSetup, relay: RelayFactory) -> None:
    """With the broker's authority in tls_ca_file, messages go over TLS."""
    host = relay(broker_url=tls.url, broker_tls_ca_file=tls.authority.certificate)
    with Traffic([host], {"ann": ["bob"], "bob": []}) as traffic:
        traffic.flow()
    traffic.verdict()


def test_an_unknown_authority_is_refused_by_default(tls: TlsSetup, relay: RelayFactory) -> None:
    """Without tls_ca_file only the authorities that the system trusts count."""
    assert_refused(relay(broker_url=tls.url), "certificate verify failed")


def test_another_authority_is_refused(tls: TlsSetup, relay: RelayFactory, tmp_path: Path) -> None:
    """A certificate of an authority other than that of tls_ca_file is refused."""
    another = Authority(tmp_path / "another")
    host = relay(broker_url=tls.url, broker_tls_ca_file=another.certificate)
    assert_refused(host, "certificate verify failed")


def test_a_certificate_for_another_host_is_refused(tls: TlsSetup, relay: RelayFactory) -> None:
    """The certificate has to be for the host that the URL names."""
    port = urlsplit(tls.url).port or 0
    host = relay(broker_url=_amqps(tls.url, port, host="localhost"), broker_tls_ca_file=tls.authority.certificate)
    assert_refused(host, "certificate verify failed.*localhost")


@pytest.mark.parametrize("in_one_file", [False, True])
def test_a_client_certificate_is_shown(
    tls: TlsSetup, relay: RelayFactory, tmp_path: Path, in_one_file: bool
) -> None:
    """A broker that demands a certificate gets the one of tls_cert_file, its key there or in tls_key_file."""
    certificate, key = tls.authority.issue(f"relay{in_one_file}")
    settings = {"broker_tls_cert_file": certificate, "broker_tls_key_file": key}
    if in_one_file:
        both = tmp_path / "both.pem"
        both.write_text(certificate.read_text() + key.read_text())
        settings = {"broker_tls_cert_file": both}
    host = relay(broker_url=tls.strict_url, broker_tls_ca_file=tls.authority.certificate, **settings)
    with Traffic([host], {"ann": ["bob"], "bob": []}) as traffic:
        traffic.flow()
    traffic.verdict()


def test_a_broker_that_demands_a_certificate_refuses_who_has_none(tls: TlsSetup, relay: RelayFactory) -> None:
    """Without tls_cert_file such a broker is not reached, and the relay says so."""
    host = relay(broker_url=tls.strict_url, broker_tls_ca_file=tls.authority.certificate)
    assert_refused(host, "certificate")


def test_a_broker_without_tls_is_not_taken_for_one_with(broker_url: str, relay: RelayFactory) -> None:
    """An amqps URL never falls back to a connection in the clear."""
    port = urlsplit(broker_url).port or 0
    assert_refused(relay(broker_url=_amqps(broker_url, port)), "SSL")


@pytest.mark.parametrize("key", ["tls_ca_file", "tls_cert_file"])
def test_a_missing_file_is_one_clear_line(broker_url: str, relay: RelayFactory, key: str) -> None:
    """A file that cannot be used ends the start with status 2 and names the setting."""
    host = relay(
        broker_url=broker_url, clean=False, wait=False, **{f"broker_{key}": "/nowhere.pem", "log_level": "error"}
    )
    assert host.process.wait(60) == 2
    (line,) = host.log.splitlines()
    assert key in line
    assert "/nowhere.pem" in line
    assert "No such file" in line


def test_the_next_amqps_url_is_tried(tls: TlsSetup, relay: RelayFactory) -> None:
    """Of several amqps URLs the second is used when the first refuses."""
    ca = tls.authority.certificate
    host = relay(broker_url=f"{tls.strict_url} {tls.url}", broker_tls_ca_file=ca)
    wait_ready(host)
