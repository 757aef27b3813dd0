"""Generation services that were profiled by phases: what the planner promises, the simulator must find."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator import evaluate
from planner import Problem, Solved, solve
from planner.generation import poisson_quantile, poisson_tail, token_model
from planner.option import Option, build_catalogue
from plans.demand import Demand, Rate, ServiceDemand
from plans.plan import Plan
from plans.service import GenerationService, GenerationSlo, Services, Variant
from tests.planner.brute_force import best_goodput
from tests.planner.problems import GIB, QUIET, cluster, demand, latency_service, phased, problem, profile
from tests.planner.rules import assert_sound
from traces.synthesis import Gamma, synthesise
from traces.table import RequestTrace

PROMPT = 128


def chat(answer: int, ttft_s: float, tpot_s: float, rate_rps: float = 1000.0, **fields: object) -> Problem:
    """Return a chat service that asks for more than the cluster's GPU can give."""
    model = phased("m", **{name: fields.pop(name) for name in ("pp", "kv_bytes") if name in fields})  # type: ignore[arg-type]
    service = GenerationService(
        name="chat", slo=GenerationSlo(ttft_s=ttft_s, tpot_s=tpot_s), variants=(Variant(model="m"),)
    )
    asked = ServiceDemand(
        service="chat",
        input_tokens=PROMPT,
        output_tokens=answer,
        rate_rps=(Rate(mean=rate_rps),),
        **fields,  # type: ignore[arg-type]
    )
    gpus = model.rows[0].pp
    return problem(cluster(("a", "gpu", gpus)), [service], [model], Demand(window_s=60, services=(asked,)))


def planned(wanted: Problem) -> Plan:
    result = solve(wanted)
    assert isinstance(result, Solved)
    return result.plan


def served_rps(plan: Plan, service: str = "chat") -> float:
    return sum(each.rate_rps for group in plan.groups for each in group.loadout if each.service == service)


def simulated(
    wanted: Problem, plan: Plan, answer: int, *, varied: bool = False, faster: float = 1.0, duration_s: float = 200.0
) -> float:
    """Return the attainment on arrivals at the rates of the plan, ``faster`` times as many, with answers of a mean."""
    generator = np.random.default_rng(1)
    loads = {
        one.service: Gamma(rate_rps=faster * served_rps(plan, one.service), cv=one.burstiness_cv)
        for one in wanted.demand.services
        if served_rps(plan, one.service)
    }
    trace = synthesise(loads, duration_s=duration_s, seed=1)
    frame = trace.frame
    lengths = generator.geometric(1 / answer, len(frame)) if varied else np.full(len(frame), answer)
    frame["input_tokens"] = pd.array(np.full(len(frame), PROMPT), dtype="Int64")
    frame["output_tokens"] = pd.array(lengths, dtype="Int64")
    trace = RequestTrace(frame, duration_s=trace.duration_s)
    found = evaluate(plan, wanted.services, trace, cluster=wanted.cluster, profiles=wanted.profiles).summary
    attainment = found.service("chat").attainment
    assert attainment is not None
    return attainment


def options(wanted: Problem) -> dict[int, Option]:
    return {option.batch: option for option in build_catalogue(wanted).options}


CASES = ((20, 0.2, 0.02), (20, 1.0, 0.06), (100, 0.2, 0.02), (100, 0.5, 0.03), (300, 0.2, 0.05))


@pytest.mark.parametrize(("answer", "ttft_s", "tpot_s"), CASES)
def test_what_is_planned_is_met_in_simulation(answer: int, ttft_s: float, tpot_s: float) -> None:
    """Safe: at the rate of the plan the SLO of 95 % is met; within 2 points where answers differ (geometric)."""
    wanted = chat(answer, ttft_s, tpot_s)
    plan = planned(wanted)
    predicted = plan.predicted[0].goodput_rps / served_rps(plan)
    for varied in (False, True):
        found = simulated(wanted, plan, answer, varied=varied)
        assert found >= (0.93 if varied else 0.95)
        assert predicted - 0.02 <= found <= predicted + 0.06


@pytest.mark.parametrize(("answer", "ttft_s", "tpot_s"), CASES)
def test_what_is_planned_is_near_what_the_simulator_bears(answer: int, ttft_s: float, tpot_s: float) -> None:
    """Tight: at 2.5 times the rate of the plan the SLO is missed at every concurrency that it could have chosen."""
    wanted = chat(answer, ttft_s, tpot_s)
    plan = planned(wanted)
    ((group,), (entry,)) = plan.groups, plan.groups[0].loadout
    for batch in (1, 2, 4, 8, 16, 32):
        table = tuple(entry.stage_latency_s[0] for _ in range(batch))
        other = entry.model_copy(update={"max_batch": batch, "stage_latency_s": table})
        changed = plan.model_copy(update={"groups": (group.model_copy(update={"loadout": (other,)}),)})
        assert simulated(wanted, changed, answer, faster=2.5) < 0.95


def test_an_answer_is_good_by_its_tokens_and_not_by_the_margin_of_a_whole() -> None:
    """A measured step of at most the TPOT will do, though 768 of them and their 2 % take longer than all may take."""
    wanted = chat(769, 0.15, 0.01245, rate_rps=0.003)
    model = wanted.profiles.latency("m", "gpu", 1, 1, input_tokens=PROMPT, output_tokens=769)
    assert model is not None
    whole = model.at(1)
    assert whole.p99_s * (1 + whole.error_ratio) > wanted.services.services[0].deadline_s(769)
    plan = planned(wanted)
    assert served_rps(plan) == pytest.approx(0.003)
    assert simulated(wanted, plan, 769, duration_s=100_000.0) >= 0.95


def test_a_generating_replica_holds_every_stage_of_a_pipeline() -> None:
    """The engine runs one pass at a time: two stages double the memory, not the rate."""
    single, pipeline = options(chat(50, 1.0, 0.05)), options(chat(50, 1.0, 0.05, pp=2))
    assert pipeline[16].hold_s == pytest.approx(single[16].hold_s)
    assert len(pipeline[16].memory_bytes) == 2


def test_memory_holds_every_sequence_to_its_last_token() -> None:
    kv_bytes = 2**20
    found = options(chat(100, 1.0, 0.1, kv_bytes=kv_bytes))
    for batch, option in found.items():
        assert option.memory_bytes[0] >= GIB + batch * (PROMPT + 100) * kv_bytes
    assert max(options(chat(100, 1.0, 0.1, kv_bytes=4 * kv_bytes))) < max(found)


def test_an_answer_of_one_token_has_no_further_ones() -> None:
    wanted = chat(1, 0.2, 0.001)
    plan = planned(wanted)
    assert served_rps(plan) > 0
    assert simulated(wanted, plan, 1) >= 0.95


def test_a_workflow_leaves_an_answer_less_than_its_tokens_may_take() -> None:
    wanted = chat(100, 1.0, 0.05)
    model = token_model(wanted, wanted.services.services[0], "m", wanted.demand.of("chat"), "gpu", (1, 1))
    assert model is not None
    times = model.at(8, 0.95)
    assert times.answer_s == pytest.approx(times.first_s + 99 * times.next_s)
    assert times.answer_s < wanted.services.services[0].deadline_s(100)


def test_a_neighbour_whose_batches_stretch_tokens_beyond_their_limit_gets_another_gpu() -> None:
    """A step takes 13 ms of at most 20: a neighbour's batches of 30 ms do not fit between two of them."""
    base = chat(100, 0.5, 0.02, rate_rps=0.5)
    services = Services(services=(*base.services.services, latency_service("slow", ("n", 1.0), deadline_s=1.0)))
    asked = Demand(window_s=60, services=(*base.demand.services, *demand(slow=2.0).services))
    library = [*base.profiles, profile("n", base_s=0.03, batches=(1,))]
    wanted = problem(base.cluster, list(services.services), library, asked, settings=replace(QUIET, blocking="strict"))
    plan = planned(wanted)
    assert all(len(group.loadout) == 1 for group in plan.groups)
    loose = chat(100, 0.5, 0.08, rate_rps=0.5)
    services = Services(services=(*loose.services.services, services.services[1]))
    wanted = replace(wanted, services=services)
    plan = planned(wanted)
    assert sorted(entry.service for group in plan.groups for entry in group.loadout) == ["chat", "slow"]
    assert simulated(wanted, plan, 100) >= 0.95


def shared(tpot_s: float, busy_rps: float, gpus: int = 1, **settings: object) -> Problem:
    """Return chat, and two services of short batches that ask for ``busy_rps`` each, on ``gpus`` GPUs."""
    base = chat(100, 0.5, tpot_s, rate_rps=0.5)
    others = [latency_service(name, ("n", 1.0), deadline_s=2.0) for name in ("one", "two")]
    asked = Demand(window_s=60, services=(*base.demand.services, *demand(one=busy_rps, two=busy_rps).services))
    library = [*base.profiles, profile("n", base_s=0.002, batches=(1,))]
    services = [base.services.services[0].model_copy(update={"weight": 1000.0}), *others]
    chosen = replace(QUIET, blocking="strict", **settings)  # type: ignore[arg-type]
    return problem(cluster(("a", "gpu", gpus)), services, library, asked, settings=chosen)


def stretched(wanted: Problem, plan: Plan) -> list[float]:
    """Return, per generating replica with neighbours, its time per further token over the TPOT, from the documents."""
    known = {option.key: option for option in build_catalogue(wanted).options}
    found = []
    for group in plan.groups:
        for entry in group.loadout:
            ratio = known["chat", "m", "gpu", group.tp, group.pp, entry.max_batch].token_ratio if entry.tokens else 0.0
            busy = sum(
                each.rate_rps / each.max_batch * max(each.stage_latency_s[-1])
                for each in group.loadout
                if each.service != entry.service
            )
            if ratio and busy:
                found.append(ratio / (1 - busy))
    return found


@pytest.mark.parametrize("method", ["direct", "columns"])
@pytest.mark.parametrize(("tpot_s", "busy_rps", "gpus"), [(0.02, 100.0, 1), (0.03, 150.0, 1), (0.02, 100.0, 2)])
def test_neighbours_leave_tokens_their_time_and_no_more(tpot_s: float, busy_rps: float, gpus: int, method: str) -> None:
    """Batches of 2 ms fit between any two tokens; many of them do not. Brute force finds nothing better."""
    wanted = shared(tpot_s, busy_rps, gpus, method=method)
    plan = planned(wanted)
    assert_sound(plan, wanted)
    assert all(ratio <= 1 + 1e-6 for ratio in stretched(wanted, plan))
    best = best_goodput(wanted)
    assert best is not None
    assert plan.solver.objective == pytest.approx(best, rel=1e-4)
    assert plan.solver.bound >= best * (1 - 1e-6)


def test_without_blocking_neighbours_are_not_held_back() -> None:
    """The guard binds: the same problem without it serves more, with tokens beyond their limit."""
    wanted = shared(0.02, 100.0)
    loose = replace(wanted, settings=replace(wanted.settings, blocking="none"))
    assert served_rps(planned(loose), "one") + served_rps(planned(loose), "two") > 1.2 * (
        served_rps(planned(wanted), "one") + served_rps(planned(wanted), "two")
    )
    assert simulated(wanted, planned(loose), 100) < 0.95 <= simulated(wanted, planned(wanted), 100)


@given(mean=st.floats(0.01, 200.0), level=st.floats(0.01, 0.999))
def test_a_poisson_variable_stays_within_its_quantile_as_often_as_asked(mean: float, level: float) -> None:
    """P(N > q) <= 1 - level < P(N > q - 1)."""
    count = poisson_quantile(mean, level)
    assert poisson_tail(mean, count) <= 1 - level + 1e-9
    assert poisson_tail(mean, count - 1) > 1 - level - 1e-9


def test_nothing_is_above_a_count_where_nothing_comes() -> None:
    assert poisson_tail(0.0, 0) == 0.0
    assert poisson_tail(1.0, 0) == pytest.approx(1 - math.exp(-1))
    assert poisson_tail(1.0, -1) == 1.0
