"""Options about certificates, named after Triton's, and what they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from executor.tls import Dialer, TlsFiles
    from plans.cluster import Cluster

__all__ = [
    "ClientCert",
    "ClientKey",
    "Insecure",
    "RootCert",
    "ServerCert",
    "ServerKey",
    "client_dialer",
    "cluster_dialer",
    "server_files",
]

ServerCert = Annotated[
    Path | None, typer.Option("--grpc-server-cert", metavar="FILE", help="This process's certificate, PEM.")
]
ServerKey = Annotated[Path | None, typer.Option("--grpc-server-key", metavar="FILE", help="Its private key, PEM.")]
RootCert = Annotated[
    Path | None, typer.Option("--grpc-root-cert", metavar="FILE", help="Authorities to trust, PEM: ca.pem.")
]
ClientCert = Annotated[
    Path | None, typer.Option("--grpc-client-cert", metavar="FILE", help="Your certificate, PEM; its role decides.")
]
ClientKey = Annotated[Path | None, typer.Option("--grpc-client-key", metavar="FILE", help="Its private key, PEM.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Speak in the clear off loopback too: anybody may do anything.")
]


def server_files(certificate: Path | None, key: Path | None, authorities: Path | None) -> TlsFiles | None:
    """Return the files of a server, or None without any.

    Raises:
        InvalidInput: Some are given and others are not.
    """
    return _files("server", certificate, key, authorities)


def client_dialer(
    addresses: list[str], certificate: Path | None, key: Path | None, authorities: Path | None, *, insecure: bool
) -> Dialer:
    """Return what opens channels to ``addresses`` (``host:port``).

    Raises:
        InvalidInput: Some files are given and others are not, or cannot be used; or there are none, an address is not
            on this machine, and ``insecure`` was not asked for.
    """
    from executor.tls import Credentials, Dialer, check_transport

    files = _files("client", certificate, key, authorities)
    credentials = Credentials(files) if files else None
    for address in addresses:
        check_transport(address, credentials, insecure=insecure, where="address")
    return Dialer(credentials)


def cluster_dialer(
    cluster: Cluster,
    gateways: list[str],
    certificate: Path | None,
    key: Path | None,
    authorities: Path | None,
    *,
    insecure: bool,
) -> Dialer:
    """Return what opens channels to the nodes of ``cluster`` and to ``gateways``.

    Raises:
        InvalidInput: As for `client_dialer`.
    """
    addresses = [*(node.address for node in cluster.nodes if node.address), *gateways]
    return client_dialer(addresses, certificate, key, authorities, insecure=insecure)


def _files(role: str, certificate: Path | None, key: Path | None, authorities: Path | None) -> TlsFiles | None:
    from executor.tls import TlsFiles
    from plans.errors import Fault, InvalidInput

    given = {f"--grpc-{role}-cert": certificate, f"--grpc-{role}-key": key, "--grpc-root-cert": authorities}
    missing = [name for name, path in given.items() if path is None]
    if len(missing) == len(given):
        return None
    if certificate is None or key is None or authorities is None:
        expected = "all three of certificate, key and authorities, or none"
        raise InvalidInput([Fault(where=name, found="nothing", expected=expected) for name in missing])
    return TlsFiles(certificate=certificate, key=key, authorities=authorities)
