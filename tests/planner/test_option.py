from __future__ import annotations

from dataclasses import replace

import pytest

from planner.option import build_catalogue
from planner.settings import Settings
from plans.demand import Demand, Rate, ServiceDemand
from plans.service import FrequencyService, FrequencySlo, GenerationService, GenerationSlo, Variant
from profiles.document import LatencyStatistics, Profile, ProfileMeta, Row
from tests.planner.problems import QUIET, cluster, demand, latency_service, problem, profile, town


def one(deadline_s: float = 0.2, *, settings: Settings = QUIET, cv: float = 1.0, **shape: object):
    """Return the catalogue of one service with one model on one GPU."""
    service = latency_service("s", ("m", 0.8), deadline_s=deadline_s)
    wanted = Demand(window_s=60, services=(ServiceDemand(service="s", burstiness_cv=cv, rate_rps=(Rate(mean=10.0),)),))
    inventory = cluster(("a", "gpu", 2))
    return build_catalogue(problem(inventory, [service], [profile("m", **shape)], wanted, settings=settings))  # type: ignore[arg-type]


def test_the_batches_are_the_grid_and_the_powers_of_two_inside_it() -> None:
    catalogue = one(10.0, batches=(2, 3, 10), growth=0.1)
    seen = {option.batch for option in catalogue.options} | {each.batch for each in catalogue.rejections}
    assert seen | {2} == {2, 3, 4, 8, 10}
    assert {option.confidence for option in catalogue.options if option.batch in (2, 3, 10)} <= {"measured"}
    assert {option.confidence for option in catalogue.options if option.batch in (4, 8)} == {"interpolated"}


def test_nothing_is_placed_outside_the_batches_measured() -> None:
    batches = [option.batch for option in one(100.0, batches=(2, 16)).options]
    assert (min(batches), max(batches)) == (2, 16)


def test_a_full_batch_and_the_wait_for_the_one_before_fit_the_deadline() -> None:
    for blocking, factor in (("strict", 1.0), ("expected", 0.5), ("none", 0.0)):
        settings = replace(QUIET, blocking=blocking)  # type: ignore[type-var]
        options = one(0.03, settings=settings, batches=(1, 2, 4, 8)).options
        assert options
        assert all(option.latency_s + factor * option.hold_s <= 0.03 + 1e-12 for option in options if option.batch > 1)
    assert max(each.batch for each in one(0.03, settings=replace(QUIET, blocking="none")).options) == 4
    assert max(each.batch for each in one(0.03, settings=replace(QUIET, blocking="strict")).options) == 2


def test_a_deadline_that_only_a_lone_request_can_meet_is_still_served() -> None:
    options = one(0.0101).options
    assert [option.batch for option in options] == [1]
    assert options[0].at_floor


def test_a_deadline_that_nothing_meets_is_rejected_with_the_numbers() -> None:
    catalogue = one(0.009)
    assert catalogue.options == ()
    assert {each.reason for each in catalogue.rejections} == {"latency"}
    first = next(each for each in catalogue.rejections if each.batch == 1)
    assert (first.needed, first.available) == (pytest.approx(0.01), pytest.approx(0.009))


def test_latencies_that_were_not_measured_carry_their_margin() -> None:
    measured, modelled = one(), one(source="modelled")
    by_batch = {option.batch: option.latency_s for option in measured.options}
    assert modelled.options
    assert all(option.latency_s > by_batch[option.batch] * 1.1 for option in modelled.options)


def test_memory_counts_the_headroom() -> None:
    assert one(weights_gib=15.0).options
    catalogue = one(weights_gib=15.3)
    assert catalogue.options == ()
    assert {each.reason for each in catalogue.rejections} == {"memory"}


def test_burstier_arrivals_leave_less_utilisation_down_to_the_floor() -> None:
    limits = [max(option.utilisation for option in one(0.06, cv=cv).options) for cv in (0.0, 1.0, 2.0, 4.0, 20.0)]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] == QUIET.max_utilisation
    assert limits[-1] == QUIET.min_utilisation
    assert all(option.at_floor for option in one(0.06, cv=20.0).options)


def test_dominated_options_are_left_out_and_counted() -> None:
    # Latency in proportion to batch: larger batches only cost.
    catalogue = one(10.0, growth=1.0)
    assert [option.batch for option in catalogue.options] == [1]
    assert catalogue.pruned == 3


def test_a_variant_that_is_worse_in_everything_is_dominated() -> None:
    service = latency_service("s", ("good", 0.9), ("bad", 0.8))
    wanted = problem(
        cluster(("a", "gpu", 1)),
        [service],
        [profile("good"), profile("bad", base_s=0.02, weights_gib=3.0)],
        demand(s=1.0),
    )
    assert {option.variant for option in build_catalogue(wanted).options} == {"good"}


def test_variants_below_the_minimum_accuracy_are_left_out() -> None:
    service = latency_service("s", ("good", 0.9), ("bad", 0.8), min_accuracy=0.85)
    profiles = [profile("good"), profile("bad", base_s=0.001)]
    catalogue = build_catalogue(problem(cluster(("a", "gpu", 1)), [service], profiles, demand(s=1.0)))
    assert {option.variant for option in catalogue.options} == {"good"}
    assert {each.reason for each in catalogue.rejections} == {"accuracy"}


def test_parallelisms_can_be_restricted_and_never_exceed_a_node() -> None:
    shape = {"parallelisms": ((1, 1), (2, 1), (1, 2), (4, 1))}
    assert {(option.tp, option.pp) for option in one(**shape).options} == {(1, 1), (2, 1), (1, 2)}
    restricted = replace(QUIET, parallelisms=((2, 1),))
    assert {(option.tp, option.pp) for option in one(settings=restricted, **shape).options} == {(2, 1)}


def test_weights_count_every_gpu_of_the_group() -> None:
    for option in one(weights_gib=4.0, parallelisms=((1, 1), (2, 1), (1, 2))).options:
        assert option.weight_bytes == pytest.approx(4 * 2**30, rel=1e-6)


def test_a_load_that_no_profile_times_takes_the_weights_of_a_gpu_over_the_load_bandwidth() -> None:
    def loads_s(stated_s: float, bandwidth: float | None, pair: tuple[int, int]) -> set[float]:
        shape = profile("m", weights_gib=4.0, parallelisms=(pair,))
        shape = shape.model_copy(
            update={"rows": tuple(row.model_copy(update={"load_s": stated_s}) for row in shape.rows)}
        )
        inventory = cluster(("a", "gpu", 2))
        kind = inventory.gpu_types["gpu"].model_copy(update={"load_bandwidth": bandwidth})
        inventory = inventory.model_copy(update={"gpu_types": {"gpu": kind}})
        service = latency_service("s", ("m", 0.8), deadline_s=10.0)
        options = build_catalogue(problem(inventory, [service], [shape], demand(s=10.0), settings=QUIET)).options
        return {round(option.load_s, 6) for option in options}

    assert loads_s(0.0, 2.0 * 2**30, (1, 1)) == {2.0}
    assert loads_s(0.0, 2.0 * 2**30, (2, 1)) == loads_s(0.0, 2.0 * 2**30, (1, 2)) == {1.0}
    assert loads_s(0.7, 2.0 * 2**30, (1, 1)) == {0.7}
    assert loads_s(0.0, None, (1, 1)) == {0.0}


def test_a_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    by_shape = {(o.tp, o.pp, o.batch): o for o in one(10.0, parallelisms=((1, 1), (1, 2))).options}
    single, pipeline = by_shape[1, 1, 8], by_shape[1, 2, 8]
    assert pipeline.hold_s == pytest.approx(single.hold_s / 2)
    assert pipeline.latency_s == pytest.approx(single.latency_s)


def test_the_town_offers_every_class_and_parallelism() -> None:
    options = build_catalogue(town()).options
    assert {option.service for option in options} == {"detect", "street", "chat", "read"}
    assert {(o.tp, o.pp) for o in options if o.service == "chat"} >= {(1, 1), (2, 1)}
    assert next(o.deadline_s for o in options if o.service == "street") == pytest.approx(0.12)
    assert next(o.deadline_s for o in options if o.service == "chat") == pytest.approx(0.5 + 99 * 0.02)


def test_frames_of_one_stream_wait_for_each_other() -> None:
    service = FrequencyService(
        name="s", slo=FrequencySlo(fps=50, jitter_s=0.1), variants=(Variant(model="m", accuracy=1.0),)
    )
    wanted = Demand(window_s=60, services=(ServiceDemand(service="s", streams=2, rate_rps=(Rate(mean=100.0),)),))
    options = build_catalogue(problem(cluster(("a", "gpu", 1)), [service], [profile("m", growth=0.1)], wanted)).options
    assert {option.batch: option.multi_frame for option in options} == {1: 1, 2: 1, 4: 2, 8: 4}
    bare = {option.batch: option.latency_s - (option.multi_frame - 1) / 50 for option in options}
    assert bare == pytest.approx({batch: 0.01 * (1 + 0.1 * (batch - 1)) for batch in bare})
    tight = service.model_copy(update={"slo": FrequencySlo(fps=50, jitter_s=0.01)})
    few = build_catalogue(problem(cluster(("a", "gpu", 1)), [tight], [profile("m", growth=0.1)], wanted)).options
    assert {option.multi_frame for option in few} == {1}


def phased(prefill_s: float, decode_s: float) -> Profile:
    """Return a profile by phases: a prefill of 64 tokens, and decode steps that grow a little with the batch."""
    rows = [
        Row(
            batch=batch,
            phase=phase,
            input_tokens=64,
            latency_s=LatencyStatistics(mean=latency, p50=latency, p95=latency, p99=latency),
            stage_latency_s=(latency,),
            weight_bytes=(2**30,),
            peak_bytes=(2**30 + batch * 2**28,),
            samples=100,
        )
        for batch in (1, 4, 16)
        for phase, latency in (("prefill", prefill_s * batch), ("decode", decode_s * (1 + 0.02 * batch)))
    ]
    return Profile(model="m", gpu_type="gpu", source="measured", meta=ProfileMeta(), rows=tuple(rows))


def generation(ttft_s: float, tpot_s: float) -> list[int]:
    """Return the batches that a chat service may run at."""
    service = GenerationService(
        name="s", slo=GenerationSlo(ttft_s=ttft_s, tpot_s=tpot_s), variants=(Variant(model="m", accuracy=1.0),)
    )
    tokens = ServiceDemand(service="s", input_tokens=64, output_tokens=50, rate_rps=(Rate(mean=1.0),))
    wanted = Demand(window_s=60, services=(tokens,))
    catalogue = build_catalogue(problem(cluster(("a", "gpu", 1)), [service], [phased(0.05, 0.01)], wanted))
    return sorted(option.batch for option in catalogue.options)


def test_first_and_further_tokens_have_limits_of_their_own() -> None:
    assert 16 in generation(1.0, 0.1)
    assert generation(0.04, 1.0) == []  # the prefill alone takes longer
    # With 16 sequences a step takes 13.2 ms, and 15 prefills of 50 ms fall on every 49 steps: 28.5 ms a token.
    assert 16 in generation(1.0, 0.06)
    assert 16 not in generation(2.0, 0.028)


def test_a_pass_and_not_a_whole_answer_blocks_the_neighbours_of_a_generating_model() -> None:
    service = GenerationService(
        name="s", slo=GenerationSlo(ttft_s=1.0, tpot_s=0.1), variants=(Variant(model="m", accuracy=1.0),)
    )
    tokens = ServiceDemand(service="s", input_tokens=64, output_tokens=50, rate_rps=(Rate(mean=1.0),))
    wanted = Demand(window_s=60, services=(tokens,))
    options = build_catalogue(problem(cluster(("a", "gpu", 1)), [service], [phased(0.05, 0.01)], wanted)).options
    for option in options:
        assert option.block_s == pytest.approx(0.05, rel=0.01)
        assert option.hold_s > 0.4


def test_memory_grows_with_the_sequences_in_flight() -> None:
    service = GenerationService(
        name="s", slo=GenerationSlo(ttft_s=9.0, tpot_s=9.0), variants=(Variant(model="m", accuracy=1.0),)
    )
    tokens = ServiceDemand(service="s", input_tokens=64, output_tokens=50, rate_rps=(Rate(mean=1.0),))
    wanted = Demand(window_s=60, services=(tokens,))
    options = build_catalogue(problem(cluster(("a", "gpu", 1)), [service], [phased(0.05, 0.01)], wanted)).options
    sizes = {option.batch: option.memory_bytes[0] for option in options}
    assert sizes[16] - sizes[1] >= 15 * 2**28
