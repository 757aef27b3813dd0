"""``status``, ``drain`` and ``undrain``: a cluster as it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli.command import command
from foreplan.cli.options import ClusterFile, Gateways
from foreplan.cli.output import Output
from foreplan.cli.tls_options import ClientCert, ClientKey, Insecure, RootCert, cluster_dialer

if TYPE_CHECKING:
    from executor.cluster_status import PeerStatus

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    command(app, "status")(status)
    command(app, "drain")(drain)
    command(app, "undrain")(undrain)


def status(
    out: Output,
    cluster: ClusterFile,
    gateway: Gateways,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Show what is live, replica by replica, and the reason for each difference from the plan in force.

    Peers that do not tell their state are shown with the reason; when none does, that is an error (exit 1).
    """
    from executor.cluster_status import status as observe
    from plans.cluster import Cluster
    from plans.documents import read_document
    from plans.errors import RemoteFailure

    inventory = read_document(cluster, Cluster)
    dialer = cluster_dialer(inventory, gateway, client_cert, client_key, root_cert, insecure=insecure)
    found = asyncio.run(observe(inventory, gateway, dialer=dialer))
    out.result(found.to_json())
    heard = any(peer.generation is not None for peer in (*found.agents, *found.gateways))
    if heard:
        out.say(f"generation {found.live.generation} is live" if found.live else "nothing is live")
    out.table(
        ["peer", "address", "generation", "ready", "memory", "problem"],
        [[p.name, p.address, p.generation, p.ready, _memory(p), p.problem] for p in (*found.agents, *found.gateways)],
    )
    out.table(
        ["group", "service", "variant", "desired", "phase", "queued", "completed", "dropped", "failed", "problem"],
        [
            [one.group, one.service, one.variant, one.desired, one.phase.value if one.phase else None]
            + (
                [one.state.queued, one.state.completed, one.state.dropped, one.state.failed]
                if one.state
                else [None] * 4
            )
            + [one.problem]
            for one in found.replicas
        ],
    )
    if not heard:
        remedy = (
            "start them (`foreplan agent`, `foreplan gateway`), or give an operator's certificate (--grpc-client-cert)"
        )
        raise RemoteFailure(str(cluster), f"no agent or gateway tells its state; {remedy}", retryable=True)


def _memory(peer: PeerStatus) -> str | None:
    """Return the memory of an agent with its workers, and in use on its devices, as far as that is told."""
    from plans.units import format_bytes

    if peer.resident_bytes is None:
        return None
    devices = "".join(
        f", {format_bytes(used_bytes)} on device {i}" for i, used_bytes in enumerate(peer.device_used_bytes)
    )
    return format_bytes(peer.resident_bytes) + devices


NodeName = Annotated[str, typer.Argument(metavar="NODE", help="A node of the cluster.")]


def drain(
    out: Output,
    node: NodeName,
    cluster: ClusterFile,
    gateway: Gateways,
    force: Annotated[
        bool, typer.Option("--force", help="Also when a service then has no replica elsewhere, and fails.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait until it is idle.", min=0)] = 60.0,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Take a node out of the rotation, and wait until it is idle. Nothing is unloaded."""
    _drain(out, node, True, cluster, gateway, timeout, (client_cert, client_key, root_cert), insecure, force=force)


def undrain(
    out: Output,
    node: NodeName,
    cluster: ClusterFile,
    gateway: Gateways,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait until it is used.", min=0)] = 60.0,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Take a drained node back into the rotation."""
    _drain(out, node, False, cluster, gateway, timeout, (client_cert, client_key, root_cert), insecure)


def _drain(
    out: Output,
    node: str,
    drained: bool,
    cluster: Path,
    gateways: list[str],
    timeout_s: float,
    files: tuple[Path | None, Path | None, Path | None],
    insecure: bool,
    *,
    force: bool = False,
) -> None:
    from executor.draining import set_drained
    from plans.cluster import Cluster
    from plans.documents import read_document
    from plans.interrupts import run_until_told

    inventory = read_document(cluster, Cluster)
    dialer = cluster_dialer(inventory, gateways, *files, insecure=insecure)
    change = set_drained(inventory, gateways, node, drained, force=force, timeout_s=timeout_s, dialer=dialer)
    done = run_until_told(change)
    out.result({"node": node, "drained": drained, "services": list(done.services), "wall_s": done.wall_s})
    back = "takes requests again" if done.ready else "takes requests again as soon as its replicas serve"
    how = "is drained: no gateway sends to it, and nothing runs" if drained else back
    out.say(f"{node} {how} ({done.wall_s:.1f} s)")
