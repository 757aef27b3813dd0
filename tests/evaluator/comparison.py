"""Runs one random case through the compiled engine and through the naive simulator, and says where they differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evaluator import Evaluation, evaluate
from evaluator.changes import Failure, PlanChange, Recovery
from evaluator.control import Observation, Turn
from evaluator.settings import Settings
from evaluator.token_costs import token_costs_of
from plans import Plan
from profiles import ProfileLibrary
from tests.evaluator import naive
from tests.evaluator.naive_parts import Failure as NaiveFailure
from tests.evaluator.naive_parts import NewPlan, Result, Row, Scenario, TokenCosts, View
from tests.evaluator.random_scenarios import LARGEST_BATCH, Case, with_fresh_controller
from traces.table import RequestTrace


def trace_of(rows: Sequence[Row]) -> RequestTrace:
    """Return the rows as a trace."""
    frame = pd.DataFrame(
        {
            "arrival_s": [row.arrival_s for row in rows],
            "service": [row.name for row in rows],
            "stream": [row.stream for row in rows],
            "input_tokens": pd.array([row.input_tokens for row in rows], dtype="Int64"),
            "output_tokens": pd.array([row.output_tokens for row in rows], dtype="Int64"),
        }
    )
    return RequestTrace(frame)


def settings_of(told: Scenario) -> Settings:
    """Return what the scenario chooses as the engine's settings."""
    shared = {f.name for f in dataclasses.fields(Settings)} & {f.name for f in dataclasses.fields(Scenario)}
    chosen = {name: getattr(told, name) for name in shared}
    return Settings(**chosen | {"until_s": None if told.until_s == math.inf else told.until_s})


class _Asked:
    """The scenario's controller behind the engine's protocol."""

    def __init__(self, told: Scenario) -> None:
        assert told.controller is not None
        self.controller = told.controller

    def observe(self, observation: Observation) -> Turn | None:
        arrivals = {name: seen.arrived for name, seen in observation.services.items() if seen.arrived}
        decided = self.controller(View(now_s=observation.now_s, arrivals=arrivals, queued=observation.queued))
        return None if decided is None else Turn(plan=decided[0], solve_s=decided[1])


def engine_run(case: Case) -> Evaluation:
    """Return what the engine makes of the case."""
    told = with_fresh_controller(case.scenario)
    over_time: dict[str, Any] = {}
    if told.changes:
        over_time["changes"] = [_change(change) for change in told.changes]
    if told.controller is not None:
        over_time |= {"controller": _Asked(told), "interval_s": told.interval_s}
    return evaluate(
        told.plan,
        told.services,
        trace_of(told.rows),
        settings=settings_of(told),
        cluster=told.cluster,
        profiles=ProfileLibrary(case.profiles),
        mode="event",
        **over_time,
    )


def _change(change: NewPlan | NaiveFailure | naive.Recovery) -> PlanChange | Failure | Recovery:
    if isinstance(change, NewPlan):
        return PlanChange(at_s=change.time_s, plan=change.plan)
    kind = Failure if isinstance(change, NaiveFailure) else Recovery
    return kind(at_s=change.time_s, node=change.node, gpu=change.gpu)


def naive_run(case: Case) -> list[Result | None]:
    """Return what the naive simulator makes of the case's rows."""
    return simulation_of(case).run()


def simulation_of(case: Case) -> naive.Simulation:
    """Return the naive simulation of the case, with token costs as the engine reads them from profiles."""
    library = ProfileLibrary(case.profiles)
    told = with_fresh_controller(case.scenario)

    def costs(group: Any, entry: Any) -> TokenCosts | None:
        # More sequences than a new plan's largest batch may still run.
        found = token_costs_of(
            group, entry.model_copy(update={"max_batch": LARGEST_BATCH}), told.services, told.cluster, library
        )
        if found is None:
            return None
        return TokenCosts(
            prefill=list(zip(found.prefill_tokens, found.prefill_s, strict=True)),
            decode_s=found.decode_s,
            decode_token_s=found.decode_token_s,
            kv_limit_tokens=found.kv_limit_tokens,
        )

    return naive.Simulation(dataclasses.replace(told, costs=costs))


def disagreements(case: Case) -> list[str]:
    """Return one line for each row, stream and group of which the two say different things."""
    evaluation, simulation = engine_run(case), simulation_of(case)
    frame, expected = evaluation.requests, simulation.run()
    offered = [(row, end) for row, end in zip(case.scenario.rows, expected, strict=True) if end is not None]
    if len(frame) != len(offered):
        return [f"{len(frame)} requests are offered, not {len(offered)}"]
    found = {
        (s.service, s.stream): (s.offered, s.good, s.fps, s.mean_jitter_s, s.largest_jitter_s)
        for s in evaluation.streams
    }
    measured = naive.streams(case.scenario, expected)
    if found.keys() != measured.keys():
        return [f"streams {sorted(found)}, naive: {sorted(measured)}"]
    lines = [
        f"stream {stream}: {found[stream]}, naive: {told}"
        for stream, told in measured.items()
        if not np.allclose(np.array(found[stream], dtype=float), told, rtol=1e-9, atol=1e-12, equal_nan=True)
    ]
    utilised = {group.group: group.utilisation for group in evaluation.summary.groups}
    if evaluation.summary.wall_s != simulation.wall_s or utilised != simulation.utilisation():
        lines.append(f"busy {utilised}, naive: {simulation.utilisation()}")
    lines += [f"{group} is busy {ratio} of the run" for group, ratio in utilised.items() if not 0 <= ratio <= 1 + 1e-9]
    return lines + [
        f"request {number} ({row.name} at {row.arrival_s!r}): {what}"
        for number, (got, (row, end)) in enumerate(zip(frame.to_dict("records"), offered, strict=True))
        for what in _differences(got, row, end)
    ]


def _differences(got: dict[str, Any], row: Row, end: Result) -> Iterator[str]:
    if got["outcome"] != end.outcome or _missing(got["reason"]) != end.reason:
        yield f"{got['outcome']} ({got['reason']}), naive: {end.outcome} ({end.reason})"
        return
    if end.finish_s is None:
        return
    expected = {"latency_s": end.finish_s - row.arrival_s, "ttft_s": end.ttft_s, "tpot_s": end.tpot_s}
    for name, value in expected.items():
        if value is not None and got[name] != value:
            yield f"{name} {got[name]!r}, naive: {value!r}"
    if end.group is not None and (got["group"], got["variant"]) != (end.group, end.variant):
        yield f"on {got['group']} ({got['variant']}), naive: {end.group} ({end.variant})"
    if end.batch is not None and end.ttft_s is None and got["batch_size"] != end.batch:
        yield f"batch of {got['batch_size']}, naive: {end.batch}"


def _missing(value: object) -> object:
    return None if value is None or value is pd.NA or value != value else value


def reduced(case: Case) -> Case:
    """Return the case without the rows and changes that its disagreement does not need."""
    for field in ("rows", "changes"):
        kept = list(getattr(case.scenario, field))
        for thing in list(kept):
            fewer = [other for other in kept if other is not thing]
            if field == "rows" and not fewer:
                continue
            smaller = dataclasses.replace(case, scenario=dataclasses.replace(case.scenario, **{field: fewer}))
            if disagreements(smaller):
                kept, case = fewer, smaller
    return case


def plan_in_words(plan: Plan) -> str:
    """Return what matters of a plan in a failure's message."""
    lines = [
        f"{group.id} tp {group.tp} pp {group.pp}: {e.service}/{e.variant} max {e.max_batch} mf {e.multi_frame} "
        f"load {e.load_s} drain {e.deadline_s} {e.stage_latency_s}"
        for group in plan.groups
        for e in group.loadout
    ]
    return "\n  ".join([*lines, str({s: [(r.group, r.weight) for r in routes] for s, routes in plan.routes.items()})])
