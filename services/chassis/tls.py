"""TLS and mutual TLS for both ends of a channel, from ``services.tls``.

A server speaks TLS when it has a certificate and a key; with ``require_client_certificate`` it accepts only clients
whose certificate ``ca`` vouches for. A client speaks TLS when it has a ``ca`` to judge servers by, and presents its own
certificate where one is configured. Certificates name their hosts in the subject alternative name (RFC 9525); the
common name is not looked at.
"""

from __future__ import annotations

from pathlib import Path

import grpc

from services.chassis.config.schema import TlsConfig
from services.chassis.errors import EsperError, Reason


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials | None:
    """Credentials to listen with, or None without TLS.

    Raises EsperError (BAD_TLS_FILES) for a file that cannot be used, or client certificates required without TLS.
    """
    pair = _pair(config)
    if pair is None:
        if config.require_client_certificate:  # serving anybody in the clear is not what was asked for
            raise _bad("services.tls.require_client_certificate needs certificate and key")
        return None
    if not config.require_client_certificate or config.ca is None:
        return grpc.ssl_server_credentials([pair])
    return grpc.ssl_server_credentials([pair], root_certificates=_read("ca", config.ca), require_client_auth=True)


def channel_credentials(config: TlsConfig) -> grpc.ChannelCredentials | None:
    """Credentials to connect with, or None without TLS. Raises EsperError (BAD_TLS_FILES) as above."""
    if config.ca is None:
        return None
    key, certificate = _pair(config) or (None, None)
    return grpc.ssl_channel_credentials(_read("ca", config.ca), key, certificate)


def _pair(config: TlsConfig) -> tuple[bytes, bytes] | None:
    """(private key, certificate chain) in PEM; the configuration has both or none."""
    if config.certificate is None or config.key is None:
        return None
    return _read("key", config.key), _read("certificate", config.certificate)


def _read(name: str, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _bad(f"services.tls.{name}: cannot read {path}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        # grpc would fail much later, with a handshake error that names no file.
        raise _bad(f"services.tls.{name}: {path} is not a PEM file")
    return content


def _bad(message: str) -> EsperError:
    return EsperError(message, reason=Reason.BAD_TLS_FILES)
