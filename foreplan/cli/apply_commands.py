"""``apply`` and ``rollback``: plans brought to a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreplan.cli.command import EXIT_ERROR, command
from foreplan.cli.options import ClusterFile, Gateways, PlanFile
from foreplan.cli.output import Output, Step
from foreplan.cli.tls_options import ClientCert, ClientKey, Insecure, RootCert, cluster_dialer

if TYPE_CHECKING:
    from executor.controller import ApplyResult, ApplyTimeouts, PlannedWave, ProgressEvent
    from executor.tls import Dialer
    from plans.cluster import Cluster
    from plans.plan import Plan, Prior
    from plans.store import PlanStore

__all__ = ["register"]

StoreDir = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Plan store: keeps every plan that was applied.")
]
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
    command(app, "apply")(apply)
    command(app, "rollback")(rollback)


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
    from executor.apply_plan import check_plan
    from plans.cluster import Cluster
    from plans.codec import read_plan
    from plans.documents import read_document

    inventory = read_document(cluster, Cluster)
    dialer = cluster_dialer(inventory, gateway, client_cert, client_key, root_cert, insecure=insecure)
    wanted = read_plan(plan)
    check_plan(wanted, inventory, plan_name=str(plan), cluster_name=str(cluster))
    if target:
        wanted = _targeted(wanted, inventory, gateway, store, target, dialer)
    prior = None if target else _prior_of_the_rest(wanted, inventory, gateway, store, dialer)
    limits = _timeouts(timeout or [])
    _apply(out, wanted, inventory, gateway, store, dry_run=dry_run, prior=prior, timeouts=limits, dialer=dialer)


def _prior_of_the_rest(
    plan: Plan, cluster: Cluster, gateways: list[str], store: Path | None, dialer: Dialer
) -> Prior | None:
    """Return what is live, if that is ``plan`` on some nodes (``--target``), so that the others may follow."""
    from executor.cluster_status import status as observe
    from executor.targeting import is_part_of
    from plans.store import PlanStore

    if store is None:
        return None
    live = asyncio.run(observe(cluster, gateways, dialer=dialer)).live
    if live is None or live.digest in {plan.placement_digest, *([plan.prior.digest] if plan.prior else [])}:
        return None
    found = _stored(PlanStore(store), live)
    return live if found is not None and is_part_of(found, plan) else None


def _targeted(
    plan: Plan, cluster: Cluster, gateways: list[str], store: Path | None, nodes: list[str], dialer: Dialer
) -> Plan:
    """Return the live plan, which the store must hold, with the part of ``nodes`` taken from ``plan``.

    Raises:
        StalePlan: ``plan`` was made against something else than what is live, or than what some nodes have left for it.
    """
    from executor.apply_plan import stale
    from executor.cluster_status import status as observe
    from executor.targeting import is_part_of, targeted
    from plans.errors import Fault, InvalidInput, StalePlan
    from plans.store import PlanStore

    known = {node.name for node in cluster.nodes}
    if unknown := [node for node in nodes if node not in known]:
        expected = f"one of {', '.join(sorted(known))}"
        raise InvalidInput([Fault(where="--target", found=repr(node), expected=expected) for node in unknown])
    live = asyncio.run(observe(cluster, gateways, dialer=dialer)).live
    if live is None:
        return targeted(plan, None, nodes, None)
    remedy = "give the store (--store) that it was applied with, or apply the whole plan, without --target"
    expected = f"the store that holds the live plan, of generation {live.generation}"
    if store is None:
        raise InvalidInput.of(expected, where="--store", found="nothing", remedy=remedy)
    found = _stored(PlanStore(store), live)
    if found is None:
        raise InvalidInput.of(expected, where=store, found="no such plan", remedy=remedy)
    known = {plan.placement_digest, *([plan.prior.digest] if plan.prior else [])}
    if live.digest not in known and not is_part_of(found, plan):
        raise StalePlan(stale(plan.prior, live).problem)
    return targeted(plan, found, nodes, live)


def _stored(plans: PlanStore, live: Prior) -> Plan | None:
    """Return the plan in the store that is live, also when the apply was killed before it noted that; None without one.

    The one noted under that generation is looked at first: to read a plan takes time, and a store keeps all.
    """
    kept = plans.names()
    noted = [one.name for one in plans.generations() if one.generation == live.generation and one.name in kept]
    candidates = (plans.get(name) for name in dict.fromkeys((*noted, *kept)))
    return next((one for one in candidates if one.placement_digest == live.digest), None)


_LEAST_S = {"routes": 4.0}
"""Limits of steps may not be as short as this: gateways wait for agents before they refuse routes."""


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
        if step not in steps or not _LEAST_S.get(step, 0.0) < chosen[f"{step}_s"] < 1e6:
            expected = f"STEP=SECONDS, with a step of {', '.join(steps)} and seconds above {_LEAST_S.get(step, 0):g}"
            expected = f"{expected} and below 1e6"
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
    from executor.apply_plan import check_plan
    from executor.cluster_status import status as observe
    from plans.cluster import Cluster
    from plans.documents import read_document
    from plans.store import PlanStore

    _check_store(store)
    plans = PlanStore(store)
    inventory = read_document(cluster, Cluster)
    dialer = cluster_dialer(inventory, gateway, client_cert, client_key, root_cert, insecure=insecure)
    live = asyncio.run(observe(inventory, gateway, dialer=dialer)).live
    if generation is None:
        generation = _generation_before(plans, live)
    stored = plans.generation(generation)
    plan = plans.get(stored.name)
    check_plan(plan, inventory, plan_name=str(stored.path), cluster_name=str(cluster))
    out.say(f"rolling back to the plan of generation {generation}")
    if not dry_run:
        out.note(f"should this be cut short, `foreplan rollback {generation}` goes on from there")
    limits = _timeouts(timeout or [])
    _apply(out, plan, inventory, gateway, store, dry_run=dry_run, prior=live, timeouts=limits, dialer=dialer)


def _generation_before(plans: PlanStore, live: Prior | None) -> int:
    """Return the newest generation of the store whose placement is not the live one."""
    from plans.errors import InvalidInput

    for stored in reversed(plans.generations()):
        if live is None or plans.get(stored.name).placement_digest != live.digest:
            return stored.generation
    raise InvalidInput.of("a stored plan other than the live one", where=plans.root, found="none")


def _check_store(store: Path) -> None:
    """Refuse a store to read from that is none.

    Raises:
        InvalidInput: There is no such folder.
    """
    from plans.errors import InvalidInput

    if not store.is_dir():
        found = "no folder" if store.exists() else "no such folder"
        remedy = "give the --store that plans were applied with"
        raise InvalidInput.of("a plan store", where=store, found=found, remedy=remedy)


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
    from executor.controller import apply as bring
    from plans.interrupts import run_until_told
    from plans.store import PlanStore

    plans = PlanStore(store) if store is not None and not dry_run else None
    name = ""
    if plans is not None:
        with _writing(plans, "nothing was changed; make room there, or name another folder"):
            name = plans.put(plan)  # first: a store that cannot be used is known before anything changes
            plans.generations()
    with out.progress("applying the plan") as step:
        result = run_until_told(
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
    try:
        if plans is not None:
            _note(plans, result, plan, name)
    finally:  # and not before: where nobody reads it, this ends the command
        _print_applied(out, result)


def _note(plans: PlanStore, result: ApplyResult, plan: Plan, name: str) -> None:
    """Note in the store that ``plan``, stored as ``name``, is live.

    Also when nothing changed: an apply that was cut short and run again is live, and must be found again. And where the
    store has that number of an earlier cluster, whose agents began anew.

    Raises:
        InvalidInput: It cannot be written.
    """
    if (result.generation, name) in [(one.generation, one.name) for one in plans.generations()]:
        return
    live = f"the plan is live as generation {result.generation} all the same"
    with _writing(plans, f"{live}; make room there, and run this again to record it"):
        plans.record(result.generation, plan, applied_at=datetime.now(UTC).isoformat(timespec="seconds"))


@contextmanager
def _writing(plans: PlanStore, remedy: str) -> Iterator[None]:
    """Say which store cannot be written, and what that means.

    Raises:
        InvalidInput: It cannot.
    """
    from plans.errors import InvalidInput

    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise InvalidInput.of("a store that can be written", where=plans.root, found=found, remedy=remedy) from error


def _event(out: Output, step: Step, event: ProgressEvent) -> None:
    text = f"{event.step} {event.peer}: {event.outcome} {event.detail}".rstrip()
    step.update(0, text=text)
    if event.outcome != "begun":
        out.note(text)


def _print_applied(out: Output, result: ApplyResult) -> None:
    from executor.controller import Applied, NoChanges, WouldApply

    changes = () if isinstance(result, NoChanges) else result.changes
    waves = result.waves if isinstance(result, WouldApply) else ()
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
        | ({"waves": [_wave_json(wave) for wave in waves]} if isinstance(result, WouldApply) else {})
        | (
            {"put_right": list(result.converged), "not_serving": list(result.not_serving)}
            if isinstance(result, NoChanges)
            else {}
        )
    )
    signs = {"load": "+", "unload": "-", "keep": " "}
    for change in changes:
        out.say(f"{signs[change.action]} {change.key.group} {change.key.service} ({change.key.variant})")
    for key in deferred:
        waits = "had to wait" if isinstance(result, Applied) else "would have to wait"
        out.warn(f"{key.group} {key.service} {waits} until the memory of what it replaces is free")
    for number, wave in enumerate(waves, start=1):
        after = ", when routes have flipped" if number > 1 else ""
        out.say(f"wave {number}, from about {wave.at_s:.1f} s, for about {wave.for_s:.1f} s{after}:")
        for sign, keys in (("-", wave.leaves), ("+", wave.loads)):
            for key in keys:
                out.say(f"  {sign} {key.group} {key.service} ({key.variant})")
    if isinstance(result, NoChanges):
        for line in result.converged:
            out.say(f"put right: {line}")
        how = "it was live already, and has been put right" if result.converged else "no changes: the plan is live"
        out.say(f"{how} as generation {result.generation}")
        if result.not_serving:
            out.error(f"it does not serve: {'; '.join(result.not_serving)}; `foreplan status` tells more")
            raise typer.Exit(EXIT_ERROR)
    elif isinstance(result, Applied):
        out.say(f"applied as generation {result.generation} in {result.wall_s:.1f} s")
    else:
        out.say(f"dry run: nothing was changed; this would become generation {result.generation}")


def _wave_json(wave: PlannedWave) -> dict[str, Any]:
    keys = {"unload": wave.leaves, "load": wave.loads}
    return {"at_s": wave.at_s, "for_s": wave.for_s} | {name: [_key_json(k) for k in of] for name, of in keys.items()}


def _key_json(key: Any) -> dict[str, str]:
    return {"group": key.group, "service": key.service, "variant": key.variant}
