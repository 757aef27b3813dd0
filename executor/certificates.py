"""A small certificate authority in a folder: ``foreplan certs``.

::

    ca.pem, ca-key.pem       the authority; ca.pem goes to every process, ca-key.pem stays here
    NAME.pem, NAME-key.pem   certificate and key of one process or person; the role is in the certificate

After `rotate_authority`, ``ca.pem`` holds the new certificate and those that are still needed: the one before, and each
that signed a certificate in the folder. So peers trust each other while certificates are replaced one by one. Keys are
readable by their owner only, and every file is replaced atomically, ``ca.pem`` before its key: after a kill in between
the authority is what it was; a first one leaves its ``ca.pem`` alone, which is to be removed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from executor.roles import Role, role_uri, roles_of_names
from plans.documents import atomic_writer
from plans.errors import BadStoredData, InvalidInput

__all__ = ["Certificate", "init_authority", "issue", "read_certificate", "rotate", "rotate_authority"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_BACKDATED = timedelta(minutes=5)
"""Clocks of a cluster differ a little."""
_LONGEST_HOST = 253
_MOST_DAYS = 36_500


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a certificate says, and where it lies: ``expires`` is in UTC, ``hosts`` are DNS names and IP addresses."""

    name: str
    role: Role | None
    hosts: tuple[str, ...]
    expires: datetime
    path: Path


def init_authority(folder: Path, *, days: int = 3650, now: datetime | None = None) -> Certificate:
    """Make an authority in ``folder``, which is made when missing.

    Raises:
        InvalidInput: There is one already, or its certificate alone, ``days`` is impossible, or the folder cannot be
            written.
    """
    remedies = {
        "ca-key.pem": "use it, or replace it with `foreplan certs rotate --ca`",
        "ca.pem": "put its ca-key.pem beside it, name another folder, or remove it if nothing trusts it",
    }
    for name, remedy in remedies.items():
        if (folder / name).exists():
            raise InvalidInput.of("a folder without an authority", where=folder, found=name, remedy=remedy)
    _check_days(days)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput.of("a folder that can be made", where=folder, found=error.strerror or str(error)) from error
    return _write_authority(folder, days, now or datetime.now(UTC), before=())


def issue(
    folder: Path,
    name: str,
    role: Role,
    *,
    hosts: Sequence[str] = (),
    days: int = 90,
    replace: bool = False,
    now: datetime | None = None,
) -> Certificate:
    """Issue a certificate and a new key for ``name``.

    Args:
        folder: Of the authority.
        name: Of the process or person: letters, digits, dots, dashes, underscores.
        role: What it may do.
        hosts: DNS names and IP addresses at which it serves; agents and gateways need at least one.
        days: How long it is valid.
        replace: Whether an older certificate of that name, and its key, give way.
        now: The time; for tests.

    Raises:
        InvalidInput: A value is impossible, the folder holds no authority that is valid, or there is such a certificate
            already.
        BadStoredData: The authority's files are damaged.
    """
    if not _NAME.fullmatch(name) or name in ("ca", "ca-key") or name.endswith("-key"):
        expected = "letters, digits, '.', '_' and '-', not 'ca' and not ending in '-key'"
        raise InvalidInput.of(expected, field="NAME", found=repr(name))
    if role in (Role.AGENT, Role.GATEWAY) and not hosts:
        expected = f"the host name or address at which this {role.value} listens"
        raise InvalidInput.of(expected, field="--host", found="none")
    _check_days(days)
    start = now or datetime.now(UTC)
    authority, authority_key = _authority(folder)
    if authority.not_valid_after_utc <= start:
        found = f"one that ended {authority.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        remedy = f"replace it with `foreplan certs rotate {folder} --ca` and copy ca.pem everywhere, or set the clock"
        raise InvalidInput.of("an authority that is valid", where=folder / "ca.pem", found=found, remedy=remedy)
    if not replace and (folder / f"{name}.pem").exists():
        remedy = (
            f"renew it as it is with `foreplan certs rotate {folder} {name}`, or give --replace to change its role or "
            "its hosts"
        )
        raise InvalidInput.of(f"no certificate of {name!r} yet", where=folder, found=f"{name}.pem", remedy=remedy)
    names: list[x509.GeneralName] = [_host_name(host) for host in hosts]
    names.append(x509.UniformResourceIdentifier(role_uri(role)))
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(name, role.value))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(min(start + timedelta(days=days), authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    certificate = builder.sign(authority_key, hashes.SHA256())
    _write_key(folder / f"{name}-key.pem", key)
    _write(folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM))
    return read_certificate(folder / f"{name}.pem")


def rotate(
    folder: Path, names: Sequence[str] = (), *, days: int = 90, now: datetime | None = None
) -> tuple[Certificate, ...]:
    """Replace certificates and keys by new ones of the same name, role and hosts; without ``names``, all of the folder.

    Running processes take the new files up by themselves.

    Raises:
        InvalidInput: There is no such certificate, the folder holds no authority that is valid, or ``days`` is
            impossible.
        BadStoredData: A certificate cannot be read, names no role, or is another's; none was replaced.
    """
    _check_days(days)
    _authority(folder)
    found = []
    for name in names or _issued(folder):
        path = folder / f"{name}.pem"
        if name == "ca" or not path.is_file():
            raise InvalidInput.of(
                "the name of a certificate in the folder", where=folder, field="NAME", found=repr(name)
            )
        old = read_certificate(path)
        if old.role is None:
            raise BadStoredData(path, "it names no role, so it was not issued by `foreplan certs`")
        if old.name != name:
            raise BadStoredData(path, f"this is the certificate of {old.name!r}; give the file that name, or remove it")
        found.append((old, old.role))
    return tuple(
        issue(folder, old.name, role, hosts=old.hosts, days=days, replace=True, now=now) for old, role in found
    )


def rotate_authority(folder: Path, *, days: int = 3650, now: datetime | None = None) -> Certificate:
    """Put a new authority in place of the old one, which stays trusted: until the next change, and while it is needed.

    Copy ``ca.pem`` to every process first, then `rotate` the certificates.

    Raises:
        InvalidInput: The folder holds no authority, or ``days`` is impossible.
    """
    _check_days(days)
    current, _ = _authority(folder)
    start = now or datetime.now(UTC)
    others = [one for one in _certificates(folder / "ca.pem") if one != current]
    paths = [folder / f"{name}.pem" for name in _issued(folder)]
    issued = [_certificates(path)[0] for path in paths if path.is_file()]
    needed = [current, *(other for other in others if any(_has_signed(other, one) for one in issued))]
    return _write_authority(folder, days, start, before=[old for old in needed if old.not_valid_after_utc > start])


def _issued(folder: Path) -> list[str]:
    """Return the names of the certificates in ``folder``."""
    keys = sorted(folder.glob("*-key.pem"))
    return [path.name.removesuffix("-key.pem") for path in keys if path.name != "ca-key.pem"]


def _has_signed(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def read_certificate(path: Path) -> Certificate:
    """Read what the first certificate in ``path`` says.

    Raises:
        BadStoredData: There is none.
    """
    certificate = _certificates(path)[0]
    uris: list[str] = []
    hosts: list[str] = []
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
        hosts = [*names.get_values_for_type(x509.DNSName), *addresses]
    except x509.ExtensionNotFound:
        pass
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Certificate(
        name=str(common[0].value) if common else "",
        role=next(iter(roles_of_names(uris)), None),
        hosts=tuple(hosts),
        expires=certificate.not_valid_after_utc,
        path=path,
    )


def _write_authority(folder: Path, days: int, now: datetime, *, before: Sequence[x509.Certificate]) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(f"Foreplan authority {now:%Y-%m-%d %H:%M:%S}", "authority")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    bundle = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (certificate, *before))
    _write(folder / "ca.pem", bundle)  # first: cut short here, the old key still has its certificate in it
    _write_key(folder / "ca-key.pem", key)
    return read_certificate(folder / "ca.pem")


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = folder / "ca-key.pem"
    if not path.is_file():
        remedy = (
            "put it back from where it is kept" if (folder / "ca.pem").exists() else "run `foreplan certs init` first"
        )
        raise InvalidInput.of("the folder of an authority", where=folder, found="no ca-key.pem", remedy=remedy)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise BadStoredData(path, f"this is no private key ({error})") from error
    known = _certificates(folder / "ca.pem")
    certificate = next((one for one in known if one.public_key() == key.public_key()), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate is None:
        raise BadStoredData(path, "it is not the key of a certificate in ca.pem; restore both from one copy")
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise BadStoredData(folder / "ca.pem", "its signature is wrong") from error
    return certificate, key


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        remedy = (
            "restore it from a copy" if path.name == "ca.pem" else "issue it anew with `foreplan certs issue --replace`"
        )
        problem = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else "this is no certificate"
        raise BadStoredData(path, f"{problem}; {remedy}") from error
    return found


def _subject(name: str, unit: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Foreplan"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if len(host) > _LONGEST_HOST or not _HOST.fullmatch(host):
        expected = "a host name or an IP address, without a port"
        raise InvalidInput.of(expected, field="--host", found=repr(host))
    return x509.DNSName(host)


def _check_days(days: int) -> None:
    if not 1 <= days <= _MOST_DAYS:
        raise InvalidInput.of(f"1 to {_MOST_DAYS}", field="--days", found=days)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(path, content, mode=0o600)


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    with atomic_writer(path, mode=mode) as stream:
        stream.write(content)
