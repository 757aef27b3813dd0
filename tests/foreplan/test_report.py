from __future__ import annotations

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from evaluator import evaluate
from foreplan.report import Content, Run, figures, render
from foreplan.report.content import timeline
from foreplan.runs import read_run
from plans import Demand, InvalidInput, Services
from profiles.document import Profile
from profiles.library import ProfileLibrary
from tests.plans.strategies import cluster, entry, group, plan
from tests.profiles.documents import profile, row
from traces.outcomes import summarise
from traces.table import RequestTrace


def prediction(service):
    return {
        "service": service,
        "offered_rps": 20.0,
        "goodput_rps": 19.0,
        "attainment": 0.95,
        "latency_s": {"p50": 0.01, "p99": None},
        "accuracy": 0.9,
        "confidence": "measured",
    }


PLAN = plan(
    [group("node-0", (0, 1), [entry("detect", 2), entry("segment", 2)]), group("node-1", (2,), [entry("detect")])],
    predicted=(prediction("detect"), prediction("segment")),
    unserved=({"service": "segment", "rate_rps": 3.0, "reason": "memory", "detail": "<needs> 3 GiB"},),
    warnings=("a & b", "segment: 3 of 5 rps are beyond the planned utilisation (memory): <needs> 3 GiB"),
)
SERVICES = Services.model_validate(
    {
        "services": [
            {"name": name, "slo": {"deadline": 0.5}, "variants": [{"model": f"{name}-model"}]}
            for name in ("detect", "segment")
        ]
    }
)


def full_content():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"arrival_s": np.sort(rng.uniform(0, 30, 300)), "service": ["detect", "segment"] * 150})
    trace = RequestTrace(frame)
    result = evaluate(PLAN, SERVICES, trace)
    runs = {label: Run(summary=result.summary, requests=result.requests) for label in ("simulated", "measured")}
    rates = trace.rates(5.0)
    quantiles = {"0.1": 1.0, "0.9": 9.0}
    demand = Demand.model_validate(
        {
            "window_s": 5,
            "method": "test method",
            "services": [
                {"service": name, "rate_rps": [{"mean": 5.0, "quantiles": quantiles}] * 6}
                for name in ("detect", "segment")
            ],
        }
    )
    rows = [
        {
            "batch": b,
            "latency_s": {"mean": 0.01 * b},
            "stage_latency_s": [0.01 * b],
            "weight_bytes": [60],
            "peak_bytes": [100],
        }
        for b in (1, 2)
    ]
    profiles = ProfileLibrary(
        Profile.model_validate({"model": f"{name}-model", "gpu_type": "tiny", "source": "measured", "rows": rows})
        for name in ("detect", "segment")
    )
    return Content(
        title="A <title>",
        facts={"machine": "m"},
        plan=PLAN,
        cluster=cluster(),
        services=SERVICES,
        profiles=profiles,
        demand=demand,
        history=rates,
        actual=rates,
        runs=runs,
        remarks=("oversubscribed",),
    )


def test_the_page_holds_everything_it_needs():
    page = render(full_content())
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", outside_scripts)
    assert "<script src" not in page
    for text in ("node-0/1", "node-1/3", "idle", "simulated load", "test method", "oversubscribed", "detect-model"):
        assert text in page


def test_text_from_documents_cannot_become_markup():
    page = render(full_content())
    assert "A &lt;title&gt;" in page
    assert page.count("&lt;needs&gt; 3 GiB") == 1
    assert "a &amp; b" in page


def test_a_plan_alone_makes_a_page_too():
    page = render(Content(title="t", plan=plan([]), cluster=cluster()))
    assert "Placement" in page
    assert "Forecast against actual" not in page


def test_a_timeline_counts_every_request_once():
    requests = full_content().runs["measured"].requests
    counts = timeline(requests, bin_s=1.0, end_s=30.0)
    assert counts.offered_rps.sum() == len(requests)
    assert counts.good_rps.sum() == (requests["outcome"] == "good").sum()
    assert (counts.good_rps <= counts.offered_rps).all()


@pytest.mark.parametrize("bin_s", [0.5, 7.0])
def test_a_timeline_is_in_requests_per_second_whatever_the_bin(bin_s):
    requests = full_content().runs["measured"].requests
    counts = timeline(requests, bin_s=bin_s, end_s=30.0)
    assert counts.offered_rps.sum() * bin_s == pytest.approx(len(requests))


def test_workflows_that_the_runs_served_are_told_beside_the_services():
    content = full_content()
    edge = {"from": "detect", "to": "segment"}
    wanted = Services.model_validate(
        {
            **SERVICES.model_dump(by_alias=True, mode="json"),
            "workflows": [{"name": "plates", "slo": {"deadline": 0.9}, "edges": [edge]}],
        }
    )
    rows = pd.DataFrame(
        {"arrival_s": np.arange(1, 60) / 2, "service": ["plates", "detect", "plates"] * 19 + ["plates"] * 2}
    )
    result = evaluate(PLAN, wanted, RequestTrace(rows))
    runs = {"simulated": Run(summary=result.summary, requests=result.requests)}
    content = dataclasses.replace(content, services=wanted, runs=runs)
    assert content.names() == ["detect", "segment", "plates"]
    page = render(content)
    assert "<tr><td>plates</td><td>simulated</td><td class=n>40</td>" in page
    assert figures.latency_figure(PLAN, runs, content.names(), {"plates": 0.9}).data[-1].y[-1] == 900


def test_runs_of_other_arrivals_are_not_told_as_one_comparison():
    content = full_content()
    assert "made of the same arrivals" in render(content)
    fewer = content.runs["measured"].requests.iloc[:-7]
    services = [service.name for service in SERVICES.services]
    measured = Run(summary=summarise(fewer, wall_s=30.0, gpus=3, services=services), requests=fewer)
    page = render(dataclasses.replace(content, runs={**content.runs, "measured": measured}))
    assert "what became of other arrivals in each of: simulated, measured; compare with care" in page
    assert "made of the same arrivals" not in page


def test_a_missing_p99_is_explained_and_a_forecast_alone_is_called_so():
    content = full_content()
    runs = {}
    for label, run in content.runs.items():
        few = run.requests.iloc[:40]
        summary = summarise(few, wall_s=30.0, gpus=3, services=["detect", "segment"])
        runs[label] = Run(summary=summary, requests=few)
    page = render(dataclasses.replace(content, runs=runs, actual=None))
    assert "A p99 needs 100 requests that finished" in page
    assert "<h2>Forecast</h2>" in page
    assert "A p99 needs" not in render(dataclasses.replace(content, runs={}))


def test_the_phases_of_a_model_that_generates_have_axes_of_their_own():
    rows = [row(batch, 0.1, phase="decode", input_tokens=64) for batch in (1, 2)]
    library = ProfileLibrary([profile(row(1, 10.0), *rows, model="detect-model")])
    page = render(dataclasses.replace(full_content(), profiles=library))
    assert "Latency of a batch (ms)" in page
    assert "Latency of a decode step (ms)" in page
    assert "Latency of a prefill" not in page


def test_a_request_log_that_is_not_there_is_called_so(tmp_path):
    with pytest.raises(InvalidInput, match="found no such file, expected a request log"):
        read_run(tmp_path / "none.parquet", PLAN, SERVICES)


@pytest.mark.parametrize(
    ("quantiles", "name", "value"),
    [({"0.1": 1.0, "0.5": 2.0, "0.9": 9.0}, "forecast median", 2.0), ({"0.1": 1.0, "0.9": 9.0}, "forecast mean", 0.5)],
)
def test_the_line_of_a_forecast_is_its_median_where_that_is_stated(quantiles, name, value):
    service = {"service": "detect", "rate_rps": [{"mean": 0.5, "quantiles": quantiles}] * 2}
    demand = Demand.model_validate({"window_s": 5, "services": [service]})
    line = figures.forecast_figure(demand, None, None).data[-1]
    assert (line.name, list(line.y)) == (name, [value] * 3)
