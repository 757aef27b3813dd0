"""``agent``, ``gateway``, ``apply``, ``rollback``, ``status``, ``drain``, ``undrain``, ``load`` and ``demo``."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreplan.cli.command import command
from foreplan.cli.evaluate_commands import RequestsFile, print_summary
from foreplan.cli.options import ClusterFile, Gateways, PlanFile, Seed, ServicesFile, read_requests
from foreplan.cli.output import Output, Step
from foreplan.cli.tls_options import (
    ClientCert,
    ClientKey,
    Insecure,
    RootCert,
    ServerCert,
    ServerKey,
    client_dialer,
    server_files,
)

if TYPE_CHECKING:
    from executor.controller import ApplyResult, ApplyTimeouts, ProgressEvent
    from executor.load import LoadProgress
    from executor.tls import Dialer
    from plans.cluster import Cluster
    from plans.plan import Plan, Prior
    from plans.store import PlanStore

__all__ = ["register"]

StoreDir = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Plan store: keeps every plan that was applied.")
]
StateDir = Annotated[Path, typer.Option("--state-dir", metavar="DIR", help="Where state that survives a kill is kept.")]
Metrics = Annotated[str, typer.Option("--metrics", metavar="HOST:PORT", help="Answer Prometheus there: /metrics.")]
Timeouts = Annotated[
    list[str] | None,
    typer.Option(
        "--timeout",
        metavar="STEP=SECONDS",
        help="Limit of a step: state, validate, stage, commit, routes, finish, abort or converge; repeat for each.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, change nothing, say what would happen.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    command(app, "agent")(agent)
    command(app, "gateway")(gateway)
    command(app, "apply")(apply)
    command(app, "rollback")(rollback)
    command(app, "status")(status)
    command(app, "drain")(drain)
    command(app, "undrain")(undrain)
    command(app, "load")(load)
    command(app, "demo")(demo)


def agent(
    out: Output,
    cluster: ClusterFile,
    node: Annotated[str, typer.Option(metavar="NAME", help="Which node of the cluster this is.")],
    state_dir: StateDir,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Instead of the node's address.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    threads: Annotated[int, typer.Option(help="CPU threads of one device's worker.", min=1)] = 1,
    model_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of local models (safetensors).")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Run batches by torch.compile.")] = False,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Replay CUDA graphs.")] = False,
    host_cache: Annotated[
        str, typer.Option(metavar="BYTES", help="Weights kept in host memory for each device, to swap models quickly.")
    ] = "0B",
    pin_cores: Annotated[
        bool, typer.Option("--pin-cores", help="Give each device's worker --threads cores of its own.")
    ] = False,
    runtime: Annotated[
        str, typer.Option(metavar="MODULE:FACTORY", help="What runs the models.")
    ] = "executor.runtime.group_runtime:TorchGroupRuntime",
    metrics: Metrics = "",
    forward_port: Annotated[
        int, typer.Option(help="Port where gateways hand over requests; 0 takes a free one.", min=0, max=65535)
    ] = 0,
    spare_worker: Annotated[bool, typer.Option(help="Start a worker ahead, for the first model.")] = True,
    server_cert: ServerCert = None,
    server_key: ServerKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Run the agent of one node: hosts workers, loads models, serves requests. Stops on SIGTERM."""
    import uvloop

    from executor.agent import AgentConfig, serve_agent
    from executor.logs import configure_logging
    from plans.cluster import Cluster
    from plans.documents import read_document
    from plans.errors import InvalidInput

    inventory = read_document(cluster, Cluster)
    known = {one.name: one for one in inventory.nodes}
    if node not in known:
        raise InvalidInput.of(f"one of {', '.join(known)}", where=cluster, field="--node", found=repr(node))
    address = listen or known[node].address
    if not address:
        raise InvalidInput.of("an address for the node, or --listen", where=cluster, field=node, found="none")
    log_level = (out.log_level or "info").upper()
    configure_logging(log_level)
    config = AgentConfig(
        node=node,
        address=address,
        device_count=known[node].gpus.count,
        memory_bytes=inventory.gpu_type_of(node).memory_bytes,
        state_dir=state_dir,
        device=device,
        runtime=runtime,
        dtype=dtype,
        threads=threads,
        model_dir=model_dir,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
        host_cache_bytes=_size_bytes(host_cache, "--host-cache"),
        pin_cores=pin_cores,
        log_level=log_level,
        metrics=metrics,
        forward_port=forward_port,
        spare_worker=spare_worker,
        tls=server_files(server_cert, server_key, root_cert),
        insecure=insecure,
    )
    host = address.rpartition(":")[0]
    uvloop.run(serve_agent(config, on_ready=lambda port: _ready(out, "agent", f"{host}:{port}", node)))


def _size_bytes(text: str, option: str) -> int:
    from plans.errors import InvalidInput
    from plans.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise InvalidInput.of(str(error), where="command line", field=option, found=repr(text)) from error


def gateway(
    out: Output,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")],
    state_dir: StateDir,
    processes: Annotated[int, typer.Option(help="Processes that share the port.", min=1)] = 1,
    http: Annotated[str, typer.Option(metavar="HOST:PORT", help="The protocol's HTTP form, under /v2.")] = "",
    metrics: Metrics = "",
    server_cert: ServerCert = None,
    server_key: ServerKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Run a gateway: the front door that routes requests by the plan in force. Stops on SIGTERM."""
    from executor.gateway import GatewayConfig
    from executor.gateway_processes import run_gateway
    from executor.logs import configure_logging

    log_level = (out.log_level or "info").upper()
    configure_logging(log_level)
    config = GatewayConfig(
        listen=listen,
        state_dir=state_dir,
        http=http,
        metrics=metrics,
        tls=server_files(server_cert, server_key, root_cert),
        insecure=insecure,
    )
    run_gateway(config, lambda address: _ready(out, "gateway", address), processes=processes, log_level=log_level)


def _ready(out: Output, role: str, address: str, name: str = "") -> None:
    """Say that a server listens: one line, or one JSON value, which a supervisor can wait for."""
    out.result({"ready": role, "node": name, "address": address})
    out.say(f"{role} {name} listens on {address}".replace("  ", " "))
    out.flush()


def apply(
    out: Output,
    plan: PlanFile,
    cluster: ClusterFile,
    gateway: Gateways,
    store: StoreDir = None,
    dry_run: DryRun = False,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE", help="Change these nodes only; the others run on as they are. Needs --store."),
    ] = None,
    timeout: Timeouts = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Bring all nodes and gateways to a plan, all or nothing."""
    from plans.cluster import Cluster
    from plans.codec import read_plan
    from plans.documents import read_document

    inventory = read_document(cluster, Cluster)
    dialer = _dialer(inventory, gateway, client_cert, client_key, root_cert, insecure=insecure)
    wanted = read_plan(plan)
    if target:
        wanted = _targeted(wanted, inventory, gateway, store, target, dialer)
    limits = _timeouts(timeout or [])
    _apply(out, wanted, inventory, gateway, store, dry_run=dry_run, timeouts=limits, dialer=dialer)


def _dialer(
    cluster: Cluster,
    gateways: list[str],
    certificate: Path | None,
    key: Path | None,
    authorities: Path | None,
    *,
    insecure: bool,
) -> Dialer:
    addresses = [*(node.address for node in cluster.nodes if node.address), *gateways]
    return client_dialer(addresses, certificate, key, authorities, insecure=insecure)


def _targeted(
    plan: Plan, cluster: Cluster, gateways: list[str], store: Path | None, nodes: list[str], dialer: Dialer
) -> Plan:
    """Return the live plan, which the store must hold, with the part of ``nodes`` taken from ``plan``."""
    from executor.cluster_status import status as observe
    from executor.targeting import targeted
    from plans.errors import Fault, InvalidInput
    from plans.store import PlanStore

    known = {node.name for node in cluster.nodes}
    if unknown := [node for node in nodes if node not in known]:
        expected = f"one of {', '.join(sorted(known))}"
        raise InvalidInput([Fault(where="--target", found=repr(node), expected=expected) for node in unknown])
    live = asyncio.run(observe(cluster, gateways, dialer=dialer)).live
    if live is None:
        return targeted(plan, None, nodes, None)
    if store is None:
        raise InvalidInput.of("the store that holds the live plan", where="--store", found="nothing")
    plans = PlanStore(store)
    for stored in reversed(plans.generations()):
        found = plans.get(stored.name)
        if found.placement_digest == live.digest:
            return targeted(plan, found, nodes, live)
    raise InvalidInput.of(f"the live plan, of generation {live.generation}", where=store, found="no such plan")


def _timeouts(given: list[str]) -> ApplyTimeouts:
    """Return the limits that ``STEP=SECONDS`` texts change.

    Raises:
        InvalidInput: A step is unknown, or its time no number above 0; with every fault.
    """
    import dataclasses

    from executor.controller import ApplyTimeouts
    from plans.errors import Fault, InvalidInput

    steps = [field.name.removesuffix("_s") for field in dataclasses.fields(ApplyTimeouts)]
    faults = []
    chosen: dict[str, float] = {}
    for text in given:
        step, _, seconds = text.partition("=")
        try:
            chosen[f"{step}_s"] = float(seconds)
        except ValueError:
            chosen[f"{step}_s"] = -1.0
        if step not in steps or not 0 < chosen[f"{step}_s"] < 1e6:
            expected = f"STEP=SECONDS, with a step of {', '.join(steps)} and seconds above 0"
            faults.append(Fault(where="--timeout", found=repr(text), expected=expected))
    if faults:
        raise InvalidInput(faults)
    return ApplyTimeouts(**chosen)


def rollback(
    out: Output,
    cluster: ClusterFile,
    gateway: Gateways,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The plan store.")],
    generation: Annotated[
        int | None, typer.Argument(metavar="[GENERATION]", help="Which; the newest that is not live when left out.")
    ] = None,
    dry_run: DryRun = False,
    timeout: Timeouts = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Apply a plan of the store again, whatever is live."""
    from executor.cluster_status import status as observe
    from plans.cluster import Cluster
    from plans.documents import read_document
    from plans.store import PlanStore

    plans = PlanStore(store)
    inventory = read_document(cluster, Cluster)
    dialer = _dialer(inventory, gateway, client_cert, client_key, root_cert, insecure=insecure)
    live = asyncio.run(observe(inventory, gateway, dialer=dialer)).live
    if generation is None:
        generation = _generation_before(plans, live)
    plan = plans.get(plans.generation(generation).name)
    out.say(f"rolling back to the plan of generation {generation}")
    limits = _timeouts(timeout or [])
    _apply(out, plan, inventory, gateway, store, dry_run=dry_run, prior=live, timeouts=limits, dialer=dialer)


def _generation_before(plans: PlanStore, live: Prior | None) -> int:
    """Return the newest generation of the store whose placement is not the live one."""
    from plans.errors import InvalidInput

    for stored in reversed(plans.generations()):
        if live is None or plans.get(stored.name).placement_digest != live.digest:
            return stored.generation
    raise InvalidInput.of("a stored plan other than the live one", where=plans.root, found="none")


def _apply(
    out: Output,
    plan: Plan,
    cluster: Cluster,
    gateways: list[str],
    store: Path | None,
    *,
    dry_run: bool,
    timeouts: ApplyTimeouts,
    dialer: Dialer,
    prior: Prior | None = None,
) -> None:
    from executor.controller import WouldApply
    from executor.controller import apply as bring
    from plans.store import PlanStore

    with out.progress("applying the plan") as step:
        result = asyncio.run(
            bring(
                plan,
                cluster,
                gateways,
                prior=prior,
                dry_run=dry_run,
                timeouts=timeouts,
                progress=lambda event: _event(out, step, event),
                dialer=dialer,
            )
        )
    if store is not None and not isinstance(result, WouldApply):
        plans = PlanStore(store)
        # Also when nothing changed: an apply that was cut short and run again is live, and must be found again.
        if all(stored.generation != result.generation for stored in plans.generations()):
            plans.record(result.generation, plan, applied_at=datetime.now(UTC).isoformat(timespec="seconds"))
    _print_applied(out, result)


def _event(out: Output, step: Step, event: ProgressEvent) -> None:
    text = f"{event.step} {event.peer}: {event.outcome} {event.detail}".rstrip()
    step.update(0, text=text)
    if event.outcome != "begun":
        out.note(text)


def _print_applied(out: Output, result: ApplyResult) -> None:
    from executor.controller import Applied, NoChanges

    changes = () if isinstance(result, NoChanges) else result.changes
    deferred = () if isinstance(result, NoChanges) else result.deferred
    outcome = "no changes" if isinstance(result, NoChanges) else "applied" if isinstance(result, Applied) else "dry run"
    out.result(
        {
            "outcome": outcome,
            "generation": result.generation,
            "placement_digest": result.placement_digest,
            "changes": [{"node": c.node, "action": c.action} | _key_json(c.key) for c in changes],
            "deferred": [_key_json(key) for key in deferred],
        }
    )
    signs = {"load": "+", "unload": "-", "keep": " "}
    for change in changes:
        out.say(f"{signs[change.action]} {change.key.group} {change.key.service} ({change.key.variant})")
    for key in deferred:
        waits = "had to wait" if isinstance(result, Applied) else "would have to wait"
        out.warn(f"{key.group} {key.service} {waits} until the memory of what it replaces is free")
    if isinstance(result, NoChanges):
        for line in result.converged:
            out.say(f"put right: {line}")
        out.say(f"no changes: the plan is live as generation {result.generation}")
    elif isinstance(result, Applied):
        out.say(f"applied as generation {result.generation} in {result.wall_s:.1f} s")
    else:
        out.say(f"dry run: nothing was changed; this would become generation {result.generation}")


def _key_json(key: Any) -> dict[str, str]:
    return {"group": key.group, "service": key.service, "variant": key.variant}


def status(
    out: Output,
    cluster: ClusterFile,
    gateway: Gateways,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Show what is live, replica by replica, and the reason for each difference from the plan in force."""
    from executor.cluster_status import status as observe
    from plans.cluster import Cluster
    from plans.documents import read_document

    inventory = read_document(cluster, Cluster)
    dialer = _dialer(inventory, gateway, client_cert, client_key, root_cert, insecure=insecure)
    found = asyncio.run(observe(inventory, gateway, dialer=dialer))
    out.result(found.to_json())
    out.say(f"generation {found.live.generation} is live" if found.live else "nothing is live")
    out.table(
        ["peer", "address", "generation", "ready", "problem"],
        [[p.name, p.address, p.generation, p.ready, p.problem] for p in (*found.agents, *found.gateways)],
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


NodeName = Annotated[str, typer.Argument(metavar="NODE", help="A node of the cluster.")]


def drain(
    out: Output,
    node: NodeName,
    cluster: ClusterFile,
    gateway: Gateways,
    force: Annotated[
        bool, typer.Option("--force", help="Also when a service then has no replica elsewhere, and fails.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait until it is idle.")] = 60.0,
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
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait until it is used.")] = 60.0,
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

    inventory = read_document(cluster, Cluster)
    dialer = _dialer(inventory, gateways, *files, insecure=insecure)
    done = asyncio.run(set_drained(inventory, gateways, node, drained, force=force, timeout_s=timeout_s, dialer=dialer))
    out.result({"node": node, "drained": drained, "services": list(done.services), "wall_s": done.wall_s})
    how = "is drained: no gateway sends to it, and nothing runs" if drained else "takes requests again"
    out.say(f"{node} {how} ({done.wall_s:.1f} s)")


def load(
    out: Output,
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="Request trace to replay.")],
    services: ServicesFile,
    gateway: Annotated[str, typer.Option("--gateway", metavar="HOST:PORT", help="The gateway.")],
    speed: Annotated[float, typer.Option(help="Trace seconds per second.", min=0.001)] = 1.0,
    processes: Annotated[int, typer.Option(help="Processes that send.", min=1)] = 1,
    connections: Annotated[int, typer.Option(help="Connections of each process to the gateway.", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs that the plan uses, for GPU-hours.", min=0)] = 0,
    requests: RequestsFile = None,
    seed: Seed = 0,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Replay a trace against a live gateway, open loop, and count what became of every request."""
    from executor.load import LoadOptions, replay
    from foreplan.runs import write_requests
    from plans.documents import read_document
    from plans.service import Services

    dialer = client_dialer([gateway], client_cert, client_key, root_cert, insecure=insecure)
    arrivals = read_requests(trace, out)
    with out.progress(f"replaying {len(arrivals)} requests", total=len(arrivals)) as step:
        how = LoadOptions(
            speed=speed,
            processes=processes,
            connections=connections,
            seed=seed,
            gpus=gpus,
            on_progress=lambda progress: _show(step, progress),
            tls=dialer.credentials.files if dialer.credentials else None,
        )
        result = asyncio.run(replay(arrivals, gateway, read_document(services, Services), how))
    for warning in result.warnings:
        out.warn(warning)
    if requests is not None:
        write_requests(requests, [result.requests])
    out.result(result.summary.to_json())
    print_summary(out, result.summary)


def _show(step: Step, progress: LoadProgress) -> None:
    """Show how far a run is, with what its latencies are so far."""
    text = f"{progress.good} of {progress.done} in time"
    p50_s, p99_s = progress.latency.quantile_s(0.5), progress.latency.quantile_s(0.99)
    if p50_s is not None and p99_s is not None:
        text += f", p50 {p50_s * 1000:.1f} ms, p99 {p99_s * 1000:.1f} ms"
    step.update(progress.done, total=progress.total, text=text)


def demo(
    out: Output,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="A day, or a folder of days, in Azure Functions 2019 format."),
    ] = None,
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where everything goes.")] = Path(
        "demo"
    ),
    windows: Annotated[int, typer.Option(help="Minutes of the trace to replay, at ten times speed.", min=1)] = 10,
    load: Annotated[
        float, typer.Option(help="Share of the cores that can be spared to keep busy at the peak.", min=0.01, max=5)
    ] = 0.45,
    seed: Seed = 1,
) -> None:
    """Do the whole job on this machine: profile, forecast, plan, apply, replay, evaluate, report."""
    from foreplan.demo import run_demo

    result = run_demo(out, folder, trace=trace, windows=windows, core_share=load, seed=seed)
    out.result(result.to_json())
    rows = []
    for prediction in result.plan.predicted:
        found = [result.runs[label].summary.service(prediction.service) for label in ("simulated", "measured")]
        shares = [prediction.attainment, *(one.attainment for one in found)]
        rows.append(
            [prediction.service, *("-" if share is None else f"{share:.1%}" for share in shares), found[1].mean_batch]
        )
    out.table(["service", "predicted", "simulated", "measured", "mean batch"], rows, title="Attainment")
    out.say(f"wrote {result.report} after {result.wall_s:.0f} s")
