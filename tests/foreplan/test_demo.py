from __future__ import annotations

import json

import psutil
import pytest

from foreplan.demo.processes import ChildProcesses
from foreplan.demo.show import SAMPLE
from foreplan.demo.stage import (
    Machine,
    cluster_yaml,
    cut_load,
    make_cluster,
    make_services,
    read_history,
    services_yaml,
)
from plans import Cluster, InvalidInput, RemoteFailure, Services, parse_document
from profiles.library import ProfileLibrary
from tests.foreplan.workspace import ROOT, Workspace

PROFILES = ProfileLibrary.read(ROOT / "examples" / "profiles")
MACHINE = Machine(cores=4, devices_per_node=1)


def test_oversubscribed_cores_are_said_and_spare_ones_are_not():
    assert "oversubscribed" in Machine(cores=2, devices_per_node=1).remark
    assert Machine(cores=8, devices_per_node=3).remark is None
    assert Machine.here().devices_per_node >= 1


def test_the_documents_read_back_as_they_were_made():
    cluster, services = make_cluster(MACHINE), make_services(PROFILES)
    assert parse_document(cluster_yaml(cluster), Cluster, where="c") == cluster
    assert parse_document(services_yaml(services), Services, where="s") == services


@pytest.mark.parametrize("core_share", [0.2, 0.9])
def test_the_busiest_window_keeps_the_models_busy_for_their_share_at_most(core_share):
    load = cut_load(read_history(SAMPLE, seed=1), PROFILES, MACHINE, windows=10, core_share=core_share, seed=1)
    busy = 0.0
    for service, counts in zip(load.actual.services, load.actual.counts(), strict=True):
        model = make_services(PROFILES).service(service).variants[0].model
        busy += counts.max() / load.actual.window_s * PROFILES.latency(model, "cpu", 1, 1).at(1).mean_s
    assert 0 < busy <= core_share * MACHINE.spare_cores * 1.05
    assert len(load.arrivals) == load.actual.counts().sum()
    assert load.arrivals.duration_s == pytest.approx(60)
    assert load.history.end_s == pytest.approx(load.actual.start_s)


def test_a_trace_that_is_too_short_is_refused():
    rates = read_history(SAMPLE, seed=1).window(0, 60)
    with pytest.raises(InvalidInput, match="at least 30 minutes"):
        cut_load(rates, PROFILES, MACHINE, windows=10, core_share=0.5, seed=1)


def test_a_child_that_does_not_start_is_named_with_the_end_of_its_log(tmp_path):
    with ChildProcesses(tmp_path) as processes, pytest.raises(RemoteFailure, match=r"gateway: ended.*none\.yaml"):
        processes.start("gateway", ["agent", "--cluster", "none.yaml", "--node", "a", "--state-dir", str(tmp_path)])


def test_children_are_gone_when_the_block_ends_however_it_ends(tmp_path):
    workspace = Workspace.make(tmp_path)
    before = set(psutil.Process().children())

    def interrupted():
        with ChildProcesses(tmp_path / "logs") as processes:
            processes.start("gateway", ["gateway", "--listen", workspace.gateway, "--state-dir", str(tmp_path / "g")])
            assert set(psutil.Process().children()) > before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(psutil.Process().children()) <= before


def test_a_trace_that_is_none_is_said_before_anything_slow(tmp_path):
    workspace = Workspace.make(tmp_path)
    (tmp_path / "trace.csv").write_text("a,b\n1,2\n")
    assert "trace.csv" in workspace.run("demo", "--trace", "trace.csv", code=1).stderr


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    workspace = Workspace.make(tmp_path)
    result = json.loads(workspace.run("demo", "--windows", 2, "--json").stdout)
    assert {one["service"] for one in result["services"]} == {"classify", "segment", "moderate"}
    for one in result["services"]:
        assert one["attainment"].keys() == {"predicted", "simulated", "measured"}
    assert "Placement" in (tmp_path / "demo" / "report.html").read_text()
