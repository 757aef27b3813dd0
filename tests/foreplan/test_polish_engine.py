"""The polish where only a simulation of whole plans tells what is served: tokens, and services that call each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import evaluator
from foreplan.planning import verify
from foreplan.polish import PolishSettings, polished
from foreplan.polish_arrivals import Sampler
from foreplan.polish_engine import PlanEngine
from planner import Problem, Solved, solve
from planner.assemble import Drafts
from planner.polished import scoring_tables
from planner.space import build_space
from plans.demand import Demand, Rate, ServiceDemand
from plans.plan import Plan
from plans.service import Edge, GenerationService, GenerationSlo, LatencySlo, Services, Variant, Workflow
from tests.planner.problems import cluster, demand, latency_service, phased, problem, profile
from traces.synthesis import Gamma, synthesise
from traces.table import RequestTrace

PROMPT, ANSWER = 128, 40
SEARCH = PolishSettings(time_s=120.0, traces=3, candidates=150)


def flow(rate_rps: float = 60.0, fanout: float = 1.5) -> Problem:
    """Return plates that are detected and then read, and a service by itself, all bursty, on eight GPUs."""
    services = (
        *(latency_service(name, (name, 1.0), deadline_s=9.0) for name in ("detect", "read")),
        latency_service("solo", ("solo", 1.0), deadline_s=0.1),
    )
    edge = Edge(source="detect", target="read", fanout=fanout)
    workflow = Workflow(name="plates", slo=LatencySlo(deadline_s=0.15), edges=(edge,))
    asked = demand(detect=rate_rps, solo=rate_rps)
    asked = asked.model_copy(
        update={"services": tuple(one.model_copy(update={"burstiness_cv": 4.0}) for one in asked.services)}
    )
    times = {"detect": 0.02, "read": 0.03, "solo": 0.01}
    library = [profile(name, base_s=base_s, batches=(1, 2, 4)) for name, base_s in times.items()]
    made = problem(cluster(("a", "gpu", 4), ("b", "gpu", 4)), list(services), library, asked)
    return replace(made, services=Services(services=services, workflows=(workflow,)))


def chat(rate_rps: float = 9.0) -> Problem:
    """Return a chat service and another one that share three GPUs under bursts that are too much for them."""
    service = GenerationService(name="chat", slo=GenerationSlo(ttft_s=0.3, tpot_s=0.03), variants=(Variant(model="m"),))
    asked = ServiceDemand(
        service="chat",
        input_tokens=PROMPT,
        output_tokens=ANSWER,
        burstiness_cv=4.0,
        rate_rps=(Rate(mean=rate_rps),),
    )
    other = latency_service("solo", ("n", 1.0), deadline_s=0.1)
    both = Demand(window_s=60, services=(asked, *demand(solo=90.0).services))
    return problem(cluster(("a", "gpu", 3)), [service, other], [phased("m"), profile("n", base_s=0.02)], both)


def planned(wanted: Problem) -> Plan:
    found = solve(wanted)
    assert isinstance(found, Solved)
    return found.plan


def attainment(wanted: Problem, plan: Plan, seed: int) -> float:
    """Return the share of requests and instances served in time, on arrivals that no polish has seen."""
    first = "plates" if wanted.services.workflows else "chat"
    asked = {first: wanted.demand.services[0], "solo": wanted.demand.services[1]}
    loads = {name: Gamma(rate_rps=one.rate_rps[0].mean, cv=one.burstiness_cv) for name, one in asked.items()}
    frame = synthesise(loads, duration_s=150.0, seed=1000 + seed).frame
    if first == "chat":
        for column, tokens in (("input_tokens", PROMPT), ("output_tokens", ANSWER)):
            frame[column] = pd.array(np.where(frame["service"] == "chat", tokens, 0), dtype="Int64")
    generates = first == "chat"
    found = evaluator.evaluate(
        plan,
        wanted.services,
        RequestTrace(frame),
        settings=evaluator.Settings(routing=evaluator.GATEWAY_ROUTING),
        cluster=wanted.cluster,
        profiles=wanted.profiles if generates else None,
    ).summary
    assert found.attainment is not None
    return found.attainment


@pytest.mark.parametrize("made", [flow, chat])
def test_what_is_polished_is_no_worse_on_arrivals_that_nobody_has_seen(made) -> None:  # type: ignore[no-untyped-def]
    """Law: on held-out seeds the polished plan serves as much in time as the one it started from, and is sound."""
    wanted = made()
    start = planned(wanted)
    better = polished(wanted, start, SEARCH, None)
    assert not any("not polished" in warning for warning in better.warnings)
    assert better.polish is not None
    assert better.polish.scorer == PlanEngine.name
    assert better.polish.attainment >= better.polish.start_attainment
    held_out = [(attainment(wanted, start, seed), attainment(wanted, better, seed)) for seed in range(3)]
    assert all(after >= before - 0.01 for before, after in held_out)
    gain = np.mean([after - before for before, after in held_out])
    assert gain >= (0.01 if made is flow else 0.0)
    assert verify(better, wanted.cluster, wanted.services, wanted.profiles, wanted.demand) == ()
    predicted = {one.service: one for one in better.predicted}
    assert all(one.attainment_interval is not None for one in predicted.values())


def test_the_same_seed_and_moves_give_the_same_plan() -> None:
    wanted, few = flow(), replace(SEARCH, candidates=30)
    start = planned(wanted)
    one, other = (polished(wanted, start, few, None) for _ in range(2))
    assert one.groups == other.groups
    assert one.predicted == other.predicted


def test_an_answer_of_a_workflow_counts_for_every_call_and_direct_requests_for_themselves() -> None:
    """Detect at 60 rps starts every instance; of read's 90 rps all are calls; solo is asked for by itself."""
    wanted = flow(fanout=2.0)
    space = build_space(wanted)
    tables = scoring_tables(space)
    blocks = Sampler(wanted, None).blocks(tables, 3, 0, requests=600)
    engine = PlanEngine(tables, wanted, blocks)
    sampled = blocks.offered(len(tables.names))
    detect, read, solo = range(3)
    assert (engine.offered[:, detect] == sampled[:, detect]).all()
    assert (engine.offered[:, read] == 2 * sampled[:, detect]).all()
    assert (engine.offered[:, solo] == sampled[:, solo]).all()


def test_a_plan_that_runs_nothing_serves_nothing_and_more_replicas_serve_more() -> None:
    wanted = flow()
    space = build_space(wanted)
    tables = scoring_tables(space)
    engine = PlanEngine(tables, wanted, Sampler(wanted, None).blocks(tables, 3, 0, requests=600))
    draft = Drafts(space, planned(wanted).solver)
    every = [min(o for o, each in enumerate(space.options) if each.service == name) for name in space.names]
    plans = [draft([(group, option) for group in range(groups) for option in every]) for groups in (0, 2, 8)]
    scores = [engine.score(plan) for plan in plans]
    assert scores[0] == 0.0
    assert scores[0] < scores[1] < scores[2]
    assert (engine.served(plans[2], 0) <= engine.offered[0]).all()


def test_what_comes_in_the_warm_up_is_simulated_and_not_counted() -> None:
    wanted = flow()
    tables = scoring_tables(build_space(wanted))
    blocks = Sampler(wanted, None).blocks(tables, 3, 0, requests=600)
    warm = replace(blocks, warmup_s=0.4 * float(blocks.arrival_s.max()))
    plan = planned(wanted)
    counted, all_of_it = (PlanEngine(tables, wanted, each) for each in (warm, blocks))
    assert (counted.offered < all_of_it.offered).all()
    for block in range(3):
        assert (counted.served(plan, block) <= np.minimum(counted.offered, all_of_it.served(plan, block))[block]).all()
        assert counted.served(plan, block).sum() > 0


def test_a_generation_service_whose_tokens_nobody_states_is_not_polished() -> None:
    wanted = chat()
    unknown = wanted.demand.services[0].model_copy(update={"input_tokens": None, "output_tokens": None})
    wanted = replace(wanted, demand=Demand(window_s=60, services=(unknown, *wanted.demand.services[1:])))
    plan = planned(wanted)
    same = polished(wanted, plan, SEARCH, None)
    assert same.groups == plan.groups
    assert "does not state the tokens of chat" in same.warnings[-1]
