from __future__ import annotations

from dataclasses import replace

import pytest

from planner import solve
from planner.problem import check, offered_rps
from plans.demand import Rate, ServiceDemand
from plans.errors import InvalidInput
from plans.service import FrequencyService, FrequencySlo, Variant
from tests.planner.problems import cluster, demand, latency_service, problem, profile


def test_every_fault_of_the_documents_is_reported_at_once() -> None:
    broken = problem(
        cluster(("a", "gpu", 1)),
        [
            latency_service("known", ("m", 1.0), pin=("nowhere",)),
            latency_service("bare", ("ghost", 1.0)),
        ],
        [profile("m")],
        demand(known=1.0, stranger=2.0),
    )
    with pytest.raises(InvalidInput) as error:
        solve(broken)
    fields = {fault.field for fault in error.value.faults}
    assert fields == {"services[1].variants", "services[1].service", "services[0].pin"}
    text = str(error.value)
    assert "ghost" in text
    assert "gpu" in text
    assert "foreplan profile" in text


def test_a_profile_on_an_absent_gpu_type_does_not_count() -> None:
    here = problem(cluster(("a", "gpu", 1)), [latency_service("s", ("m", 1.0))], [profile("m", "other")], demand(s=1.0))
    with pytest.raises(InvalidInput, match="a profile of one of them on a GPU type present"):
        check(here)


def test_a_service_without_demand_is_planned_for_nothing_with_a_warning() -> None:
    quiet = problem(cluster(("a", "gpu", 1)), [latency_service("s", ("m", 1.0))], [profile("m")], demand())
    assert check(quiet) == ("s: the demand does not name it; planned for 0 requests per second",)


def test_a_variant_that_nobody_profiled_is_left_out_with_a_warning() -> None:
    services = [latency_service("s", ("m", 1.0), ("typo", 0.9))]
    given = problem(cluster(("a", "gpu", 1)), services, [profile("m"), profile("typo", "absent")], demand(s=5.0))
    assert check(given) == ("s: typo has no profile on a GPU type present (gpu); it is left out",)


def test_streams_times_fps_stand_for_the_rate_of_a_frequency_service() -> None:
    service = FrequencyService(name="video", slo=FrequencySlo(fps=30), variants=(Variant(model="m"),))
    wanted = ServiceDemand(service="video", streams=4, rate_rps=(Rate(mean=1.0),))
    assert offered_rps(service, wanted, 0.9) == 120.0
    assert offered_rps(service, wanted.model_copy(update={"streams": None}), 0.9) == 1.0


def test_the_planned_rate_is_the_quantile_of_the_peak_window() -> None:
    service = latency_service("s", ("m", 1.0))
    windows = (Rate(mean=5.0, quantiles={"0.5": 5.0, "0.9": 8.0}), Rate(mean=6.0, quantiles={"0.5": 6.0, "0.9": 7.0}))
    wanted = ServiceDemand(service="s", rate_rps=windows)
    assert offered_rps(service, wanted, 0.9) == 8.0
    assert offered_rps(service, wanted, 0.5) == 6.0
    assert offered_rps(service, None, 0.5) == 0.0


def test_a_problem_is_a_value() -> None:
    one = problem(cluster(("a", "gpu", 1)), [latency_service("s", ("m", 1.0))], [profile("m")], demand(s=1.0))
    assert replace(one, settings=one.settings).settings == one.settings
