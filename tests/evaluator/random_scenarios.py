"""Small random scenarios over everything that the evaluator simulates, many of them on a coarse grid of times.

On the coarse grid every time is a multiple of 1/64 s, so that sums are exact and events often fall together.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plans import Cluster, LoadoutEntry, Plan, Route, Services, group_id
from plans import Group as PlannedGroup
from profiles import Profile
from tests.evaluator.naive_parts import Failure, NewPlan, Recovery, Row, Scenario, View
from tests.plans.strategies import SOLVER

GRID_S = 1 / 64
NODES = ("node-1", "node-2", "node-10")
GPUS = 4
MEMORY_BYTES = 2000
KV_BYTES_PER_TOKEN = 4
LARGEST_BATCH = 8
FEATURES = (
    "batching",
    "routing",
    "streams",
    "admission",
    "concurrency",
    "draws",
    "generation",
    "changes",
    "failures",
    "controller",
    "workflows",
    "everything",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scenario for the naive simulator, and the profiles from which its factors and costs are known."""

    feature: str
    scenario: Scenario
    profiles: Sequence[Profile]


def random_case(seed: int, feature: str | None = None) -> Case:
    """Return the case number `seed`; features take turns."""
    chosen = feature or FEATURES[seed % len(FEATURES)]
    return _Drawer(random.Random(seed), chosen).case()


class _Drawer:
    """Draws one case."""

    def __init__(self, rng: random.Random, feature: str) -> None:
        self.rng = rng
        self.feature = feature
        self.coarse = rng.random() < 0.6
        self.speed = rng.choice([0.5, 1.0, 1.0, 3.0])

    def has(self, *features: str) -> bool:
        """Whether one of the features is drawn: its turn, or everything's, or now and then."""
        if self.feature == "admission" or self.feature in features:
            return self.feature in features
        return self.rng.random() < (0.5 if self.feature == "everything" else 0.1)

    def time_s(self, least: int, most: int) -> float:
        """A time of `least` to `most` units of the grid."""
        if self.coarse:
            return self.rng.randint(least, most) * GRID_S
        return self.rng.uniform(least, most) * GRID_S

    # Documents -------------------------------------------------------------------------------------------------------

    def services(self) -> Services:
        names = ["detect", "segment", "classify"][: self.rng.randint(1, 3)]
        services: list[Mapping[str, object]] = [
            {"name": name, "slo": {"deadline": self.time_s(4, 40)}, "variants": self.variants(name)} for name in names
        ]
        if self.has("streams"):
            slo = {"fps": self.rng.choice([4, 8, 16]), "jitter": self.time_s(0, 8)}
            services.append({"name": "video", "class": "frequency", "slo": slo, "variants": self.variants("video")})
        if self.has("generation"):
            slo = {"ttft": self.time_s(8, self.rng.choice([60, 300])), "tpot": self.time_s(1, 8)}
            services.append({"name": "chat", "class": "generation", "slo": slo, "variants": self.variants("chat")})
        self.rng.shuffle(services)
        names = [str(service["name"]) for service in services]
        workflows = []
        if len(names) > 1 and self.has("workflows"):
            workflows = [self.workflow(f"flow-{number}", names) for number in range(self.rng.randint(1, 2))]
        return Services.model_validate({"services": services, "workflows": workflows})

    def variants(self, name: str) -> list[Mapping[str, str]]:
        return [{"model": f"{name}-small"}, {"model": f"{name}-large"}]

    def workflow(self, name: str, services: list[str]) -> Mapping[str, object]:
        """Edges only lead from earlier to later services, so there is no cycle."""
        order = self.rng.sample(services, len(services))
        pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
        chosen = self.rng.sample(pairs, self.rng.randint(1, min(4, len(pairs))))
        edges = []
        for source, target in chosen:
            size = self.rng.choice([0, 1_000_000, 20_000_000])
            fanout = self.rng.choice([0.5, 1.0, 1.5, 2.0, 3.0])
            edges.append({"from": source, "to": target, "fanout": fanout, "bytes": size})
        for source in dict.fromkeys(source for source, _ in chosen):
            leaving = [edge for edge in edges if edge["from"] == source]
            if self.rng.random() < 0.35:
                for edge in leaving:
                    edge["probability"] = self.rng.choice([0.5, 0.9, 1.0]) / len(leaving)
        joins = {target: self.rng.choice(["all", "any"]) for _, target in chosen if self.rng.random() < 0.6}
        return {"name": name, "slo": {"deadline": self.time_s(10, 90)}, "edges": edges, "joins": joins}

    def cluster(self) -> Cluster:
        nodes = [{"name": n, "gpus": {"type": "tiny", "count": GPUS}, "intra_bandwidth": 2.0**28} for n in NODES[:2]]
        nodes.append({"name": NODES[2], "gpus": {"type": "tiny", "count": GPUS}})
        return Cluster.model_validate(
            {
                "gpu_types": {"tiny": {"memory": MEMORY_BYTES}},
                "nodes": nodes,
                "network": {"bandwidth": 2.0**27, "latency": GRID_S},
            }
        )

    def plan(self, services: Services) -> Plan:
        groups: list[PlannedGroup] = []
        if self.rng.random() < 0.02:
            return Plan(solver=SOLVER)
        for node in NODES[: self.rng.randint(1, len(NODES))]:
            for gpus in self.rng.choice([[(0,)], [(0,), (1,)], [(0, 1)], [(0, 1), (2,)], [(0, 1, 2)], [(1,), (2, 3)]]):
                groups += [self.group(node, gpus, services)]
        routes = {}
        for service in services.services:
            hosts = [group.id for group in groups if group.entry(service.name) and self.rng.random() < 0.9]
            shares = {1: [1.0], 2: [0.75, 0.25], 3: [0.5, 0.25, 0.25], 4: [0.25] * 4}.get(len(hosts))
            shares = shares or [1 / max(1, len(hosts))] * len(hosts)
            self.rng.shuffle(shares)
            if hosts:
                routes[service.name] = tuple(Route(group=g, weight=w) for g, w in zip(hosts, shares, strict=True))
        return Plan(solver=SOLVER, groups=tuple(groups), routes=routes)

    def group(self, node: str, gpus: tuple[int, ...], services: Services) -> PlannedGroup:
        pp = self.rng.choice([size for size in (1, len(gpus)) if len(gpus) % size == 0])
        names = [service.name for service in services.services]
        hosted = self.rng.sample(names, self.rng.randint(1, min(3, len(names))))
        loadout = tuple(self.entry(name, len(gpus), pp) for name in hosted)
        return PlannedGroup(id=group_id(node, gpus), node=node, gpus=gpus, tp=len(gpus) // pp, pp=pp, loadout=loadout)

    def entry(self, service: str, gpus: int, pp: int) -> LoadoutEntry:
        largest = (
            self.rng.choice([1, 2, 3, 4, LARGEST_BATCH]) if self.feature != "admission" else self.rng.choice([1, 4])
        )
        one = [self.time_s(1, 8) for _ in range(pp)]
        more = [self.time_s(0, 3) for _ in range(pp)]
        weights = self.rng.randint(50, 200)
        kv_bytes = self.rng.choice([80, 120, 400]) * KV_BYTES_PER_TOKEN
        return LoadoutEntry(
            service=service,
            variant=self.rng.choice([f"{service}-small", f"{service}-large"]),
            max_batch=largest,
            multi_frame=self.rng.choice([1, 2, 3, 4]) if service == "video" else 1,
            rate_rps=1.0,
            memory_bytes=(weights + -(-kv_bytes // gpus) if service == "chat" else 3 * weights,) * gpus,
            weight_bytes=weights * gpus,
            load_s=self.time_s(0, self.rng.choice([0, 6, 40])),
            deadline_s=max(GRID_S, self.time_s(4, 40)),
            stage_latency_s=tuple(tuple(s + b * m for s, m in zip(one, more, strict=True)) for b in range(largest)),
        )

    # Profiles: what percentiles, interference and token costs are known by -------------------------------------------

    def profiles(self, services: Services, plans: Sequence[Plan], *, costs: bool) -> list[Profile]:
        shapes = sorted({(g.tp, g.pp) for plan in plans for g in plan.groups} | {(1, 1)})
        models = [(s.name, v.model) for s in services.services for v in s.variants]
        return [self.profile(model, shapes, tokens=costs and service == "chat") for service, model in models]

    def profile(self, model: str, shapes: Sequence[tuple[int, int]], *, tokens: bool) -> Profile:
        rows: list[Mapping[str, object]] = []
        p50, p95, p99 = (self.rng.choice([0.75, 1.0]), self.rng.choice([1.0, 1.5]), self.rng.choice([1.5, 4.0]))
        step_s, token_s = self.time_s(1, 4), GRID_S / 256
        for tp, pp in shapes:
            place = {"tp": tp, "pp": pp, "weight_bytes": [60] * pp, "peak_bytes": [100] * pp}
            if tokens:
                for phase, batch, length, took_s in [
                    *(("prefill", 1, length, step_s * (1 + length / 64)) for length in (16, 64, 128)),
                    *(
                        ("decode", batch, c, step_s / 2 * batch + token_s * batch * c)
                        for batch in (1, 8)
                        for c in (8, 64)
                    ),
                ]:
                    point = {"phase": phase, "batch": batch, "input_tokens": length, "latency_s": {"mean": took_s}}
                    rows.append(place | point | {"stage_latency_s": [took_s / pp] * pp})
                continue
            for batch in range(1, LARGEST_BATCH + 1):
                mean_s = step_s * (1 + batch)
                latency = {"mean": mean_s, "p50": p50 * mean_s, "p95": p95 * mean_s, "p99": p99 * mean_s}
                rows.append(place | {"batch": batch, "latency_s": latency, "stage_latency_s": [mean_s / pp] * pp})
        interference = {2: 1.5, 4: 2.5} if self.rng.random() < 0.5 else {}
        kv = KV_BYTES_PER_TOKEN if tokens and self.rng.random() < 0.8 else None
        fields = {"model": model, "gpu_type": "tiny", "source": "measured", "rows": rows, "interference": interference}
        return Profile.model_validate(fields | {"kv_bytes_per_token": kv})

    # The trace -------------------------------------------------------------------------------------------------------

    def rows(self, services: Services) -> list[Row]:
        count = self.rng.choice([1, 5, 30, 60])
        names = [s.name for s in services.services] + [w.name for w in services.workflows] * 3
        if self.feature == "generation":
            names += ["chat"] * 5
        clock, rows = 0.0, []
        for _ in range(count):
            clock += self.rng.choice([0, 1, 1, 2, 6]) * GRID_S * self.speed if self.coarse else self.gap_s()
            name = self.rng.choice(names)
            stream = self.rng.choice(["a", "b", "c", None]) if name == "video" else None
            lengths = self.rng.choice([1, 8, 20, 40, 90]), self.rng.choice([1, 2, 5, 12, 30])
            rows.append(
                Row(arrival_s=clock, name=name, stream=stream, input_tokens=lengths[0], output_tokens=lengths[1])
            )
        return rows

    def gap_s(self) -> float:
        return self.rng.expovariate(1.0) * 2 * GRID_S * self.speed

    # Changes ---------------------------------------------------------------------------------------------------------

    def changes(self, services: Services, end_s: float) -> list[NewPlan | Failure | Recovery]:
        most = max(1, round(end_s / GRID_S))
        made: list[NewPlan | Failure | Recovery] = []
        if self.has("changes"):
            plans = range(self.rng.randint(1, 3))
            made += [NewPlan(time_s=self.time_s(0, most), plan=self.plan(services)) for _ in plans]
        if self.has("failures"):
            for _ in range(self.rng.randint(1, 4)):
                gpu = self.rng.choice([None, 0, 1])
                node, failed_s = self.rng.choice(NODES[:2]), self.time_s(0, most)
                made.append(Failure(time_s=failed_s, node=node, gpu=gpu))
                if self.rng.random() < 0.8:
                    well_s = failed_s + self.time_s(1, self.rng.choice([4, 16, 60]))
                    made.append(Recovery(time_s=well_s, node=node, gpu=gpu))
        return sorted(made, key=lambda change: change.time_s)

    # All together ----------------------------------------------------------------------------------------------------

    def choices(self) -> dict[str, object]:
        """What a run may choose."""
        rng = self.rng
        told: dict[str, object] = {
            "order": rng.choice(["edf", "edf", "fifo"]),
            "early_drop": rng.random() < 0.75,
            "batch_delay_s": self.time_s(1, 6) if self.has("batching") else 0.0,
            "overhead_s": self.time_s(0, 2) if rng.random() < 0.3 else 0.0,
            "response_s": self.time_s(0, 2) if rng.random() < 0.3 else 0.0,
            "seed": (seed := rng.randrange(2**31)),
            "iteration_overhead_s": seed % 3 / 1024,  # counts where something is generated
        }
        policies = ["weighted-random", "round-robin", "shortest-queue", "least-finish", "corrected", "credits"]
        told["routing"] = rng.choice(policies) if self.has("routing", "streams", "workflows") else "weighted"
        if told["routing"] == "credits":
            told |= {
                "credit_target": rng.choice([0, 1, 4]),
                "credit_increase": rng.choice([0.25, 4.0]),
                "credit_decrease": rng.choice([0.5, 0.125]),
            }
        if self.has("concurrency"):
            told["concurrency"] = rng.choice([2, 3])
        if self.has("draws"):
            told["latency"] = rng.choice(["profile", "exponential"])
        if self.feature == "admission":
            policies = [*policies[:-2], "weighted", "earliest-free", "least-finish"]
            margin_s = self.time_s(0, 4) if rng.random() < 0.3 else 0.0
            told |= {"order": "fifo", "admission": "arrival", "admission_margin_s": margin_s}
            told |= {"routing": rng.choice(policies)}
        return told

    def case(self) -> Case:
        services = self.services()
        told = self.choices()
        plan, rows = self.plan(services), self.rows(services)
        end_s = rows[-1].arrival_s + 8 * GRID_S
        changes = self.changes(services, end_s)
        told |= {"retries": self.rng.choice([0, 1, 2]), "detection_s": self.time_s(0, self.rng.choice([0, 20]))}
        told |= {"max_prefill_tokens": self.rng.choice([32, 100, 8192])}
        if self.rng.random() < 0.15:
            told["until_s"] = max(rows[0].arrival_s, GRID_S, end_s * self.rng.choice([0.5, 0.75, 1.0, 2.0]))
        plans = [plan, *(change.plan for change in changes if isinstance(change, NewPlan))]
        if self.has("controller"):
            others = [self.plan(services) for _ in range(3)]
            plans += others
            decides = Decider(others, self.time_s(0, 12), self.rng.randint(0, 4))
            told |= {"controller": decides, "interval_s": max(GRID_S, self.time_s(3, 30))}
        factors: dict[tuple[str, str], Mapping[int, float]] = {}
        ratios: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        costs = "concurrency" not in told and self.rng.random() < 0.8
        profiles = self.profiles(services, plans, costs=costs)
        for service in services.services:
            for variant in service.variants:
                model = next(profile for profile in profiles if profile.model == variant.model)
                factors[service.name, variant.model] = model.interference
                ratios[service.name, variant.model] = ratios_of(model)
        scenario = Scenario(
            plan=plan,
            services=services,
            rows=rows,
            cluster=self.cluster(),
            changes=changes,
            interference=factors,
            ratios=ratios,
            **told,  # type: ignore[arg-type]
        )
        return Case(feature=self.feature, scenario=scenario, profiles=profiles)


def ratios_of(profile: Profile) -> list[tuple[float, float, float]]:
    """Return p50, p95 and p99 over the mean by batch; the same for every parallelism."""
    rows = {row.batch: row.latency_s for row in profile.rows if row.phase == "whole"}
    return [(s.p50 / s.mean, s.p95 / s.mean, s.p99 / s.mean) for _, s in sorted(rows.items())]


class Decider:
    """A controller: takes the next plan when more than `most` requests wait, or every third turn."""

    def __init__(self, plans: Sequence[Plan], solve_s: float, most: int) -> None:
        self.plans, self.solve_s, self.most = plans, solve_s, most
        self.turns = 0

    def fresh(self) -> Decider:
        """Return the same controller before its first turn."""
        return Decider(self.plans, self.solve_s, self.most)

    def __call__(self, view: View) -> tuple[Plan, float] | None:
        self.turns += 1
        waiting = sum(view.queued.values())
        if waiting > self.most or self.turns % 3 == 0:
            return self.plans[(self.turns + sum(view.arrivals.values())) % len(self.plans)], self.solve_s
        return None


def with_fresh_controller(scenario: Scenario) -> Scenario:
    """Return the scenario with its controller as before the first turn."""
    if isinstance(scenario.controller, Decider):
        return replace(scenario, controller=scenario.controller.fresh())
    return scenario
