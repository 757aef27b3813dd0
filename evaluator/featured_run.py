"""Runs with iterations, workflows, failures or changing plans: `evaluator.run.Run` and the state that these need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluator import kernel, operations
from evaluator.extras import (
    AGENDA,
    CALL,
    FLOW,
    FLOW_EDGE,
    FLOW_STAGE,
    GENERATOR,
    INSTANCE,
    INSTANCE_STAGE,
    PLACE,
    SEQUENCE,
)
from evaluator.run import Run
from evaluator.scenario import Arrivals, Deadlines, Replicas
from evaluator.settings import Settings
from evaluator.state import FEATURED_WORLD, NOWHERE
from evaluator.token_costs import UNLIMITED_TOKENS, TokenCosts
from evaluator.workflows import GroupPlaces, WorkflowArrays
from plans.service import GenerationSlo

__all__ = ["FeaturedRun", "Features", "Generating"]

_LASTING_OF_GROUP = (
    "dispatch_s",
    "end_s",
    "flush_s",
    "work_s",
    "busy_until_s",
    "fails_s",
    "queued",
    "running",
    "running_last",
    "running_count",
    "started",
    "generating",
    "stopped",
)
_LASTING_OF_REPLICA = ("head", "tail", "heap", "queued", "open", "gather", "gather_last", "finished", "inverse_batch")
_LASTING_OF_GENERATOR = ("running", "starting", "context", "decodes", "admissions", "newest", "end_s", "heaped")


_CARRIED = (
    "groups",
    "replicas",
    "head_key",
    "free_s",
    "busy_s",
    "busy_timeline_s",
    "route_balance",
    "route_credit",
    "generators",
    "ends",
    "pool",
    "streams",
    "log_replica",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generating:
    """A replica with token costs: its position, costs and SLO."""

    replica: int
    costs: TokenCosts
    slo: GenerationSlo


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a run has beside replicas.

    Attributes:
        generating: Replicas with token costs, by position.
        places: Where groups are.
        overlaps: For each group the positions of others that share a GPU with it.
    """

    generating: Sequence[Generating]
    places: GroupPlaces
    overlaps: Sequence[tuple[int, ...]]


class FeaturedRun(Run):
    """One run of `evaluator.state.FEATURED_WORLD`.

    Args:
        replicas: As for `Run`, and so what is not said here.
        features: What else there is.
        arrivals: See `Run`.
        deadlines: See `Run`.
        settings: See `Run`.
        flows: Workflows whose instances the trace may hold.
        has_instances: Whether it does.
        fails: Whether groups may be stopped.
        keep_requests: See `Run`.
        keep_latencies: See `Run`.
        bin_s: See `Run`.
    """

    _DTYPE = FEATURED_WORLD

    def __init__(
        self,
        replicas: Replicas,
        features: Features,
        arrivals: Arrivals,
        deadlines: Deadlines,
        settings: Settings,
        *,
        flows: WorkflowArrays,
        has_instances: bool = False,
        fails: bool = False,
        keep_requests: bool = False,
        keep_latencies: bool = False,
        bin_s: float | None = None,
    ) -> None:
        super().__init__(
            replicas,
            arrivals,
            deadlines,
            settings,
            keep_requests=keep_requests,
            keep_latencies=keep_latencies,
            bin_s=bin_s,
        )
        self._fails = fails
        world = self.world
        world["max_prefill_tokens"] = settings.max_prefill_tokens
        if arrivals.input_tokens is not None:
            world.attach("input_tokens", arrivals.input_tokens)
            for name in ("log_ttft_s", "log_tpot_s"):
                world.attach(name, np.full(len(arrivals.input_tokens) if keep_requests else 0, np.nan))
        world.attach_per_slot("calls", CALL)
        world.attach_per_slot("sequences", SEQUENCE, int(arrivals.input_tokens is not None))
        for name, width in (("pending", 1), ("ended", 1), ("touched", 2)):
            world.attach_per_slot(name, np.int32, width)
        self._set_flows(flows, has_instances=has_instances)
        self._forget_leads(0)
        self._set_features(features)

    def advance(self, until_s: float, *, before: int = 9) -> None:
        """Process every event up to ``until_s``, at that very time only those of a priority below ``before``."""
        world = self.world
        world["in_order"] = in_order = bool(self._fails or world["workflows"] or world["overlaps"])
        step = operations.advance_in_order if in_order else kernel.advance_featured
        while step(world.record, float(until_s), before) == kernel.POOL_FULL:
            old = len(world.array("pool"))
            world.grow(old)
            self._forget_leads(old)

    def token_times(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | tuple[None, None]:
        """Return TTFT and TPOT of each request, NaN where there are none; None where requests are not kept."""
        world = self.world
        if not world["log_ttft_s"]:
            return None, None
        return world.array("log_ttft_s"), world.array("log_tpot_s")

    def replace(
        self, replicas: Replicas, features: Features, moved: NDArray[np.int64], *, now_s: float, new_limits: bool
    ) -> None:
        """Go on with other replicas.

        Args:
            replicas: All replicas, old and new; groups that were there keep their positions.
            features: What else there is.
            moved: Shape (replica before,): the position that each has now.
            now_s: The time.
            new_limits: Whether limits of replicas that were there may have changed.
        """
        world = self.world
        before = {name: world.array(name) for name in _CARRIED}
        turns = world.array("services")["turn"].copy()
        counts, generates = world.array("counts"), before["replicas"]["generates"].copy()
        gathered = bool(world["bundles"])
        self._set_replicas(replicas, self.settings)
        world["bundles"] = gathered or bool(world["bundles"])  # bundles may wait where none gathers any more
        self._set_services(replicas, self._deadlines)
        world.array("services")["turn"] = turns
        world.attach("counts", counts)
        self._carry_groups(before)
        self._carry_replicas(before, moved)
        self._carry_generators(before, generates, moved, features)
        if new_limits:
            self._count_work()
        operations.operate(world.record, operations.REFRESH, 0, float(now_s), 0, 0)

    # What is set once ----------------------------------------------------------------------------------------------

    def _set_services(self, replicas: Replicas, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        super()._set_services(replicas, deadlines)

    def _forget_leads(self, first: int) -> None:
        self.world.array("calls")["lead"][first:] = NOWHERE

    def _set_flows(self, flows: WorkflowArrays, *, has_instances: bool) -> None:
        world = self.world
        count = len(flows.deadline_s)
        records = np.zeros(count, FLOW)
        records["deadline_s"] = flows.deadline_s
        records["first_stage"], records["stages"] = flows.stage_first[:-1], np.diff(flows.stage_first)
        records["first_edge"], records["edges"] = flows.edge_first[:-1], np.diff(flows.edge_first)
        stages = np.zeros(len(flows.service), FLOW_STAGE)
        for name in ("service", "join_any", "entry", "tail_s"):
            stages[name] = getattr(flows, name)
        edges = np.zeros(len(flows.source), FLOW_EDGE)
        for name in ("source", "target", "fanout", "payload_bytes", "probability"):
            edges[name] = getattr(flows, name)
        world["workflows"] = world["withdrawals"] = has_instances
        world["flow_count"] = count
        world.attach("flows", records)
        world.attach("flow_stages", stages)
        world.attach("flow_edges", edges)
        world["most_flow_stages"] = most_stages = int(records["stages"].max(initial=0))
        world["most_flow_edges"] = most_edges = int(records["edges"].max(initial=0))
        world.attach_per_slot("instances", INSTANCE, int(has_instances))
        world.attach_per_slot("instance_stages", INSTANCE_STAGE, most_stages * has_instances)
        world.attach_per_slot("taken", np.int8, most_edges * has_instances)

    # What changes with plans ---------------------------------------------------------------------------------------

    def _set_features(self, features: Features) -> None:
        self._set_places(features)
        self._set_generators(features.generating)

    def _set_places(self, features: Features) -> None:
        world = self.world
        groups = len(features.places.node)
        places = np.zeros(groups, PLACE)
        places["node"], places["intra_bandwidth"] = features.places.node, features.places.intra_bandwidth
        world.attach("places", places)
        world["network_bandwidth"] = features.places.network_bandwidth
        world["network_latency_s"] = features.places.network_latency_s
        world["overlaps"] = any(features.overlaps)
        first = np.concatenate([[0], np.cumsum([len(each) for each in features.overlaps])])
        world.attach("overlap_first", first.astype(np.int32))
        world.attach("overlap_other", np.array([g for each in features.overlaps for g in each], dtype=np.int32))
        world.attach("agenda", np.zeros(groups, AGENDA))
        world["leaves"] = leaves = 1 << max(groups - 1, 0).bit_length()
        world.attach("tree", np.full(2 * leaves, NOWHERE, dtype=np.int32))

    def _set_generators(self, generating: Sequence[Generating]) -> None:
        world = self.world
        costs = [each.costs for each in generating]
        records = np.zeros(len(costs), GENERATOR)
        records["newest"] = NOWHERE
        records["points"] = [len(each.prefill_s) for each in costs]
        records["decode_token_s"] = [each.decode_token_s for each in costs]
        limits = [UNLIMITED_TOKENS if each.kv_limit_tokens is None else each.kv_limit_tokens for each in costs]
        records["kv_limit_tokens"] = limits
        records["ttft_s"] = [each.slo.ttft_s for each in generating]
        records["tpot_s"] = [each.slo.tpot_s for each in generating]
        world["generation"] = len(costs) > 0
        world["most_points"] = int(records["points"].max(initial=1))
        world["most_running"] = max((len(each.decode_s) for each in costs), default=1)
        world.attach("generators", records)
        world.attach("prefill_tokens", _table([each.prefill_tokens for each in costs], int(world["most_points"])))
        world.attach("prefill_s", _table([each.prefill_s for each in costs], int(world["most_points"])))
        world.attach("decode_s", _table([each.decode_s for each in costs], int(world["most_running"])))
        world.attach("ends", np.zeros((len(costs), int(world["most_running"])), dtype=np.int32))
        replicas, groups = world.array("replicas"), world.array("groups")
        replicas["generates"] = NOWHERE
        for row, each in enumerate(generating):
            replicas["generates"][each.replica] = row
            groups["concurrency"][replicas["group"][each.replica]] = 1

    # What goes on through a change ---------------------------------------------------------------------------------

    def _carry_groups(self, before: dict[str, Any]) -> None:
        world = self.world
        count = len(before["groups"])
        groups = world.array("groups")
        for name in _LASTING_OF_GROUP:
            groups[name][:count] = before["groups"][name]
        for name in ("free_s", "busy_s"):
            old = before[name]
            world.array(name)[:count, : old.shape[1]] = old
        timeline = np.zeros((len(before["busy_timeline_s"]), len(groups)))
        timeline[:, :count] = before["busy_timeline_s"]
        world.attach("busy_timeline_s", timeline)

    def _carry_replicas(self, before: dict[str, Any], moved: NDArray[np.int64]) -> None:
        world = self.world
        replicas = world.array("replicas")
        for name in _LASTING_OF_REPLICA:
            replicas[name][moved] = before["replicas"][name]
        world.array("head_key")[moved] = before["head_key"]
        for name in ("route_balance", "route_credit"):
            world.array(name)[replicas["route"][moved]] = before[name][before["replicas"]["route"]]
        for positions in (before["pool"]["replica"], before["streams"]["replica"], before["log_replica"]):
            known = positions >= 0
            positions[known] = moved[positions[known]]

    def _carry_generators(
        self,
        before: dict[str, Any],
        generates: NDArray[np.int32],
        moved: NDArray[np.int64],
        features: Features,
    ) -> None:
        world = self.world
        self._set_features(features)
        rows = world.array("replicas")["generates"]
        for old, row in zip(generates, rows[moved], strict=True):
            if old == NOWHERE:
                continue
            for name in _LASTING_OF_GENERATOR:
                world.array("generators")[name][row] = before["generators"][name][old]
            heaped = before["generators"]["heaped"][old]
            world.array("ends")[row, :heaped] = before["ends"][old, :heaped]

    def _count_work(self) -> None:
        """Sum up the shares of what is queued on each group anew, replica by replica, one after the other."""
        replicas = self.world.array("replicas")
        for group in self.world.array("groups"):
            work_s = 0.0
            for replica in replicas[group["first"] : group["last"]]:
                shares = np.full(int(replica["queued"]) + 1, replica["share_s"])
                shares[0] = work_s
                work_s = float(np.cumsum(shares)[-1])
            group["work_s"] = work_s


def _table(rows: Sequence[Sequence[float]], width: int) -> NDArray[np.float64]:
    table = np.zeros((len(rows), width))
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table
