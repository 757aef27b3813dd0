"""Plans, for tests that apply them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from plans.plan import Group, LoadoutEntry, Plan, Prior, Route, SolverReport, TokenRules


def placement(
    groups: Mapping[str, Mapping[str, str]],
    *,
    prior: Plan | None = None,
    max_batch: int = 4,
    deadline_s: float = 5.0,
    memory_bytes: int = 1024,
    tokens: TokenRules | None = None,
) -> Plan:
    """Return a plan that runs ``groups`` (group id to service to variant) and routes each service in equal shares.

    A group over several devices, such as ``a/0-1``, runs its models tensor parallel.
    """
    gpus = {group: _gpus(group) for group in groups}
    hosts: dict[str, list[str]] = defaultdict(list)
    for group, services in groups.items():
        for service in services:
            hosts[service].append(group)
    return Plan(
        solver=SolverReport(name="test", status="optimal", objective=1, bound=1, gap=0, wall_s=0, seed=0),
        groups=tuple(
            Group(
                id=group,
                node=group.split("/")[0],
                gpus=gpus[group],
                tp=len(gpus[group]),
                loadout=tuple(
                    LoadoutEntry(
                        service=service,
                        variant=variant,
                        max_batch=max_batch,
                        rate_rps=1.0,
                        memory_bytes=(memory_bytes,) * len(gpus[group]),
                        deadline_s=deadline_s,
                        stage_latency_s=((0.001,),) * max_batch,
                        tokens=tokens,
                    )
                    for service, variant in services.items()
                ),
            )
            for group, services in groups.items()
        ),
        routes={
            service: tuple(Route(group=group, weight=1 / len(groups)) for group in groups)
            for service, groups in hosts.items()
        },
        prior=Prior(generation=1, digest=prior.placement_digest) if prior else None,
    )


def _gpus(group: str) -> tuple[int, ...]:
    first, _, last = group.split("/")[1].partition("-")
    return tuple(range(int(first), int(last or first) + 1))
