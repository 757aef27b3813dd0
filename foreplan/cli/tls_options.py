"""Options about certificates, named after Triton's, and what they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    gateways: Sequence[str],
    certificate: Path | None,
    key: Path | None,
    authorities: Path | None,
    *,
    insecure: bool,
    nodes: Sequence[str] = (),
) -> Dialer:
    """Return what opens channels to ``gateways``, and to ``nodes`` of the cluster file (all ``host:port``).

    Raises:
        InvalidInput: Some files are given and others are not, or cannot be used; or there are none, an address is not
            on this machine, and ``insecure`` was not asked for.
    """
    from executor.tls import Credentials, Dialer

    files = _files("client", certificate, key, authorities)
    if files is None and not insecure:
        _refuse_elsewhere({("cluster", "nodes"): nodes, ("--gateway", ""): gateways})
    return Dialer(Credentials(files) if files else None)


def _refuse_elsewhere(addresses: Mapping[tuple[str, str], Sequence[str]]) -> None:
    """Refuse addresses, by where they were given and its field, that are not on this machine.

    Raises:
        InvalidInput: Some are not.
    """
    from executor.tls import is_elsewhere
    from plans.errors import Fault, InvalidInput

    remedy = (
        "give yours with --grpc-client-cert, --grpc-client-key and --grpc-root-cert (`foreplan certs init` and "
        "`foreplan certs issue` make them), or --insecure on a network where everybody may do everything"
    )
    faults = []
    for (where, field), given in addresses.items():
        if found := [address for address in given if is_elsewhere(address)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            expected = "certificates for addresses off loopback"
            faults.append(Fault(where=where, field=field, found=f"{found[0]}{more}", expected=expected, remedy=remedy))
    if faults:
        raise InvalidInput(faults)


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
    nodes = [node.address for node in cluster.nodes if node.address]
    return client_dialer(gateways, certificate, key, authorities, insecure=insecure, nodes=nodes)


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
