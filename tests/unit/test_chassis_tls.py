"""TLS and mutual TLS over real sockets, with a certificate authority made for the test."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.chassis import tls
from services.chassis.channel import wait_until_serving
from services.chassis.config.schema import ServicesConfig, TlsConfig
from services.chassis.errors import EsperError, Reason
from tests.support.echo import pb, running, stub


class Authority:
    """A certificate authority that writes PEM files into ``folder``."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._builder(self.name, self.key, authority=True).sign(self.key, hashes.SHA256())
        self.file = folder / f"{name}.crt"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """(certificate, key) for loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        alternatives = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            self._builder(subject, key, authority=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        files = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "theirs")


async def _echo(server: TlsConfig, client: TlsConfig) -> str:
    async with (
        running(ServicesConfig(tls=server, host="127.0.0.1")) as run,
        run.channel(tls=client, timeout=5.0) as channel,
    ):
        return str((await stub(channel).Change(pb.EchoRequest(text="safe"))).text)


async def test_tls_serves_who_trusts_the_authority(authority: Authority, stranger: Authority) -> None:
    certificate, key = authority.issue("server")
    server = TlsConfig(certificate=certificate, key=key, ca=authority.file)
    assert await _echo(server, TlsConfig(ca=authority.file)) == "safe"
    for client in (TlsConfig(ca=stranger.file), TlsConfig()):  # another authority; no TLS at all
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _echo(server, client)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls_refuses_strangers(authority: Authority, stranger: Authority) -> None:
    certificate, key = authority.issue("server")
    server = TlsConfig(certificate=certificate, key=key, ca=authority.file, require_client_certificate=True)
    ours, ours_key = authority.issue("client")
    assert await _echo(server, TlsConfig(ca=authority.file, certificate=ours, key=ours_key)) == "safe"
    theirs, theirs_key = stranger.issue("stranger")
    for client in (
        TlsConfig(ca=authority.file, certificate=theirs, key=theirs_key),
        TlsConfig(ca=authority.file),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _echo(server, client)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_health_is_checked_through_tls(authority: Authority) -> None:
    certificate, key = authority.issue("server")
    async with running(ServicesConfig(tls=TlsConfig(certificate=certificate, key=key, ca=authority.file))) as run:
        await wait_until_serving("urza", run.address, tls_config=TlsConfig(ca=authority.file), timeout=10)


async def test_tls_opens_interfaces_beyond_loopback(authority: Authority) -> None:
    certificate, key = authority.issue("server")
    async with running(
        ServicesConfig(host="0.0.0.0", tls=TlsConfig(certificate=certificate, key=key, ca=authority.file))
    ) as run:
        assert run.address.startswith("0.0.0.0:")


def test_files_that_cannot_work_are_named(authority: Authority, tmp_path: Path) -> None:
    _, key = authority.issue("server")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("nothing of the kind")
    wrong = [
        (TlsConfig(certificate=tmp_path / "missing.crt", key=key), r"missing\.crt"),
        (TlsConfig(certificate=garbage, key=key), r"garbage\.pem is not a PEM file"),
        (TlsConfig(require_client_certificate=True, ca=authority.file), "needs certificate and key"),
    ]
    for config, words in wrong:
        with pytest.raises(EsperError, match=words) as caught:
            tls.server_credentials(config)
        assert caught.value.reason is Reason.BAD_TLS_FILES
    with pytest.raises(EsperError, match=r"missing\.crt"):
        tls.channel_credentials(TlsConfig(ca=tmp_path / "missing.crt"))


def test_without_files_there_is_no_tls() -> None:
    assert tls.server_credentials(TlsConfig()) is None
    assert tls.channel_credentials(TlsConfig()) is None
