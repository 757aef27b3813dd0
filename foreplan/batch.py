"""Many simulations: plans x traces x seeds, side by side, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evaluator import Settings, evaluate
from evaluator.simulation import Mode
from evaluator.sweep import Engine, Job, code_digest, key_of, run_jobs
from plans.cluster import Cluster
from plans.documents import canonical_digest
from plans.plan import Plan
from plans.service import Services
from profiles.library import ProfileLibrary
from traces.resample import block_bootstrap
from traces.table import RequestTrace

__all__ = ["BLOCKS", "Context", "run_batch"]

BLOCKS = 20
"""Blocks that a resampled trace is put together from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all simulations of a batch have in common."""

    services: Services
    settings: Settings
    cluster: Cluster | None = None
    profiles: ProfileLibrary | None = None
    mode: Mode = "auto"


def run_batch(
    context: Context,
    plans: Mapping[str, Plan],
    traces: Mapping[str, RequestTrace],
    *,
    seeds: int,
    engine: Engine = "processes",
    workers: int = 1,
    kept: Path | None = None,
    done: Callable[[str], None] = lambda key: None,
) -> list[dict[str, Any]]:
    """Return one JSON object per run, in the order of plans, traces and seeds.

    Each has ``plan``, ``trace``, ``seed``, ``mode`` and what ``evaluate --json`` prints. Seed 0 is the recorded trace
    with the seed of the settings; others serve a block bootstrap of it, with seeds of their own.

    Args:
        context: Services and settings.
        plans: By name.
        traces: By name.
        seeds: Runs of each plan on each trace, at least 1.
        engine: Where.
        workers: Runs at a time.
        kept: Folder for results, so that an interrupted batch goes on.
        done: Called after each run.

    Raises:
        InvalidInput: A plan or trace does not fit the services.
    """
    documents = [context.services, *([context.cluster] if context.cluster else [])]
    profiles = context.profiles.digest if context.profiles else ""
    common = (code_digest(), canonical_digest(documents), asdict(context.settings), profiles, context.mode)
    jobs = [
        Job(
            key=key_of(*common, name, plan.placement_digest, label, trace.digest, seed),
            work=_run,
            arguments=(context, plan, trace, seed, name, label),
        )
        for name, plan in plans.items()
        for label, trace in traces.items()
        for seed in range(seeds)
    ]
    results = run_jobs(jobs, engine=engine, workers=workers, kept=kept, done=done)
    return [results[job.key] for job in jobs]


def _run(context: Context, plan: Plan, trace: RequestTrace, seed: int, name: str, label: str) -> dict[str, Any]:
    if seed:
        trace = block_bootstrap(trace, block_s=trace.duration_s / BLOCKS, seed=seed)
    found = evaluate(
        plan,
        context.services,
        trace,
        settings=replace(context.settings, seed=context.settings.seed + seed),
        cluster=context.cluster,
        profiles=context.profiles,
        mode=context.mode,
    )
    return {"plan": name, "trace": label, "seed": seed, "mode": found.mode, **found.summary.to_json()}
