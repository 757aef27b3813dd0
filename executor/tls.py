"""Mutual TLS: certificates that are read anew when their files change, for servers and for channels.

A file that is being replaced, or is wrong, never takes a running process down: the material read before stays in use
and the problem is logged. At its start a process refuses files that it cannot use.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from executor.roles import Role, roles_of_names
from plans.errors import Fault, InvalidInput

__all__ = ["Credentials", "Dialer", "TlsFiles", "check_transport", "is_elsewhere", "is_loopback", "peer_identity"]

_log = logging.getLogger("executor.security")

_SOON = timedelta(days=14)
"""How long before its end a certificate is told of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one process: its certificate and key, and the authorities that it trusts."""

    certificate: Path
    key: Path
    authorities: Path

    @property
    def all(self) -> tuple[Path, Path, Path]:
        """The three files."""
        return self.certificate, self.key, self.authorities


@dataclass(frozen=True, slots=True, kw_only=True)
class _Material:
    certificate: bytes
    key: bytes
    authorities: bytes


class Credentials:
    """The certificates of one process, kept in step with their files.

    Args:
        files: Where they lie.
        role: What the certificate has to name, of a process that serves; None for one that only calls, where those who
            are called judge.

    Attributes:
        files: Where they lie.
        version: Goes up whenever new material was taken up.

    Raises:
        InvalidInput: A file is missing or is not what it should be, the certificate has expired, or is of another role;
            with every fault.
    """

    def __init__(self, files: TlsFiles, role: Role | None = None) -> None:
        self.files = files
        self.version = 1
        self._role = role
        self._marks = _marks(files)
        self._material = _read(files, role)
        self._remind_at = datetime.min.replace(tzinfo=UTC)
        self._server_context, self._client_context = self._made_contexts(self._marks)

    def refresh(self) -> bool:
        """Take up files that have changed; return whether there is new material. Cheap when nothing changed."""
        marks = _marks(self.files)
        if marks == self._marks:
            return False
        self._marks = marks
        try:
            material = _read(self.files, self._role)
            if material == self._material:
                return False
            server, client = self._made_contexts(marks)
        except InvalidInput as error:
            _log.warning("event=certificates_unusable action=keep_the_old problem=%r", str(error))
            return False
        self._material, self._server_context, self._client_context = material, server, client
        self.version += 1
        _log.info("event=certificates_reloaded file=%s version=%d", self.files.certificate, self.version)
        return True

    @property
    def expires(self) -> datetime:
        """When the certificate in use ends, UTC."""
        return x509.load_pem_x509_certificates(self._material.certificate)[0].not_valid_after_utc

    def remind(self, now: datetime) -> None:
        """Log, once a day, that the certificate ends soon, or has ended: who shows it then gets no new connection."""
        left = self.expires - now
        if left > _SOON or now < self._remind_at:
            return
        self._remind_at = now + timedelta(days=1)
        level, event = (logging.WARNING, "expires") if left > timedelta(0) else (logging.ERROR, "expired")
        remedy = "renew it with `foreplan certs rotate`, and copy it here"
        text = "event=certificate_%s file=%s at=%s remedy=%r"
        _log.log(level, text, event, self.files.certificate, f"{self.expires:%Y-%m-%dT%H:%MZ}", remedy)

    def server(self) -> grpc.ServerCredentials:
        """Return credentials for a server that asks every caller for a certificate; new connections get new files."""
        told = self.version

        def fetch() -> Any:
            """Return a new configuration, or None when this server has the newest; gRPC asks at every handshake."""
            nonlocal told
            self.refresh()
            if told == self.version:
                return None
            told = self.version
            return self._server_configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._server_configuration(), fetch, require_client_authentication=True
        )

    def channel(self) -> grpc.ChannelCredentials:
        """Return credentials for a channel, from what is in the files now."""
        self.refresh()
        material = self._material
        return grpc.ssl_channel_credentials(
            root_certificates=material.authorities, private_key=material.key, certificate_chain=material.certificate
        )

    def ssl_context(self) -> ssl.SSLContext:
        """Return a context for an HTTPS server that asks every caller for a certificate.

        Each handshake goes by what is in the files then: what they trust no more is refused from there on.
        """
        self.refresh()
        return self._server_context

    def client_context(self) -> ssl.SSLContext:
        """Return a context for a connection to a server, from what is in the files now."""
        self.refresh()
        return self._client_context

    def _made_contexts(self, marks: _Marks) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """Return contexts for a server and for a client, of the files that were just read and had ``marks``.

        A context made before cannot be changed instead: it would trust for ever what it once did.

        Raises:
            InvalidInput: The files cannot be used, or have changed meanwhile.
        """
        server = _loaded(ssl.PROTOCOL_TLS_SERVER, self.files)
        server.verify_mode = ssl.CERT_REQUIRED
        server.num_tickets = 0  # a session that goes on without a handshake would outlive its authority
        server.sni_callback = self._hand_over
        client = _loaded(ssl.PROTOCOL_TLS_CLIENT, self.files)
        if _marks(self.files) != marks:
            raise InvalidInput.of("files that stay as they are", where=self.files.certificate, found="changes")
        return server, client

    def _hand_over(self, connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        """Let a handshake that begins, with or without a server's name, go by what is in the files now."""
        self.refresh()
        connection.context = self._server_context

    def _server_configuration(self) -> Any:
        material = self._material
        return grpc.ssl_server_certificate_configuration(
            [(material.key, material.certificate)], root_certificates=material.authorities
        )


class Dialer:
    """Opens channels to other processes, with TLS or, without credentials, in the clear."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self.credentials = credentials

    @property
    def version(self) -> int:
        """Goes up when channels opened before should be replaced."""
        if self.credentials is None:
            return 0
        self.credentials.refresh()
        return self.credentials.version

    def open(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """Return a channel to ``address`` (``host:port``)."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, self.credentials.channel(), options=options)


def peer_identity(connection: ssl.SSLObject | ssl.SSLSocket | None) -> tuple[str, frozenset[Role]]:
    """Return the name and the roles that the other end of a TLS connection has proven; nothing without TLS."""
    encoded = connection.getpeercert(binary_form=True) if connection is not None else None
    if not encoded:
        return "", frozenset()
    certificate = x509.load_der_x509_certificate(encoded)
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(common[0].value) if common else "", _roles(certificate)


def _roles(certificate: x509.Certificate) -> frozenset[Role]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    return roles_of_names(names.get_values_for_type(x509.UniformResourceIdentifier))


def is_loopback(address: str) -> bool:
    """Say whether ``host:port`` names this machine only: 127.0.0.0/8, ::1 or localhost."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_elsewhere(address: str) -> bool:
    """Say whether ``host:port`` names a host, and not this one."""
    names_host = address.rpartition(":")[0] != ""  # what is no address at all is refused by whoever uses it
    return names_host and not is_loopback(address)


def check_transport(address: str, credentials: Credentials | None, *, insecure: bool, where: str) -> None:
    """Refuse to speak in the clear beyond loopback, unless the user insists.

    Raises:
        InvalidInput: ``address`` is not loopback, there are no certificates, and ``insecure`` was not asked for.
    """
    if credentials is not None or insecure or not is_elsewhere(address):
        return
    remedy = (
        "make certificates with `foreplan certs init` and `foreplan certs issue`, or give --insecure on a network "
        "where everybody may do everything"
    )
    raise InvalidInput.of("certificates for an address off loopback", where=where, found=address, remedy=remedy)


_Marks = tuple[tuple[int, int, int] | None, ...]
"""By what a change of the files is noticed."""


def _marks(files: TlsFiles) -> _Marks:
    marks: list[tuple[int, int, int] | None] = []
    for path in files.all:
        try:
            found = path.stat()
        except OSError:
            marks.append(None)
        else:
            marks.append((found.st_mtime_ns, found.st_ino, found.st_size))
    return tuple(marks)


_REMEDY = "copy certificate and key together from where `foreplan certs` made them, or make them anew with it"


def _read(files: TlsFiles, role: Role | None) -> _Material:
    faults: list[Fault] = []
    contents: list[bytes] = []
    for path in files.all:
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            found = error.strerror or str(error)
            faults.append(Fault(where=str(path), found=found, expected="a PEM file", remedy=_REMEDY))
    if faults:
        raise InvalidInput(faults)
    material = _Material(certificate=contents[0], key=contents[1], authorities=contents[2])
    faults = _faults(files, material, role)
    if faults:
        raise InvalidInput(faults)
    return material


def _faults(files: TlsFiles, material: _Material, role: Role | None) -> list[Fault]:
    faults = []
    own = key = None
    try:
        own = x509.load_pem_x509_certificates(material.certificate)[0]
    except ValueError as error:
        fault = Fault(where=str(files.certificate), found=str(error), expected="a certificate", remedy=_REMEDY)
        faults.append(fault)
    now = datetime.now(UTC)
    if own is not None and not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        found = f"valid from {own.not_valid_before_utc:%Y-%m-%d %H:%M} to {own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        remedy = "renew it with `foreplan certs rotate`, or set the clock"
        expected = f"a certificate that is valid now, {now:%Y-%m-%d %H:%M} UTC"
        faults.append(Fault(where=str(files.certificate), found=found, expected=expected, remedy=remedy))
    if own is not None and role is not None and role not in (roles := _roles(own)):
        found = f"role {' and '.join(sorted(roles))}" if roles else "no role"
        remedy = f"give this process one of its own: `foreplan certs issue DIR NAME --role {role} --host HOST`"
        expected = f"a certificate of role {role}"
        faults.append(Fault(where=str(files.certificate), found=found, expected=expected, remedy=remedy))
    try:
        x509.load_pem_x509_certificates(material.authorities)
    except ValueError as error:
        expected, remedy = "certificates of authorities", "copy the authority's ca.pem there"
        faults.append(Fault(where=str(files.authorities), found=str(error), expected=expected, remedy=remedy))
    try:
        key = serialization.load_pem_private_key(material.key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        expected = "a private key without a password"
        faults.append(Fault(where=str(files.key), found=str(error), expected=expected, remedy=_REMEDY))
    if own is not None and key is not None:
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if own.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
            found, expected = "the key of another certificate", f"the key of {files.certificate}"
            faults.append(Fault(where=str(files.key), found=found, expected=expected, remedy=_REMEDY))
    return faults


def _loaded(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(files.authorities)
        context.load_cert_chain(files.certificate, files.key)
    except OSError as error:  # that of the TLS library is one too
        found = error.strerror or str(error)
        raise InvalidInput.of("certificates that TLS can use", where=files.certificate, found=found) from error
    return context
