from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.foreplan.workspace import ROOT, Workspace, cluster_text

FAKE = ["--runtime", "tests.executor.fake_runtime:FakeRuntime"]


class Server:
    """A ``foreplan agent`` or ``gateway`` in the background."""

    def __init__(self, workspace, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "foreplan", *arguments],
            cwd=workspace.folder,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(workspace.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert "listens on" in self.process.stdout.readline()

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.process.stdout.close()
        return code


def start_agent(workspace, name):
    return Server(
        workspace, "agent", "--cluster", "cluster.yaml", "--node", f"node-{name}", "--state-dir", f"state-{name}", *FAKE
    )


def start_gateway(workspace):
    return Server(workspace, "gateway", "--listen", workspace.gateway, "--state-dir", "state-gateway")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    workspace = Workspace.make(tmp_path_factory.mktemp("live"))
    workspace.plan()
    workspace.run("trace", "synth", "--service", "fast=20", "--service", "slow=5", "--duration", 3, "-o", "t.csv")
    servers = [start_agent(workspace, "a"), start_agent(workspace, "b"), start_gateway(workspace)]
    yield workspace
    assert [server.stop() for server in servers] == [0, 0, 0]


def where(workspace):
    return ["--cluster", "cluster.yaml", "--gateway", workspace.gateway]


def test_a_plan_is_applied_served_replaced_and_rolled_back(live):
    dry = json.loads(live.run("apply", "plan.json", *where(live), "--dry-run", "--json").stdout)
    assert dry["outcome"] == "dry run"
    (wave,) = dry["waves"]
    assert (wave["at_s"], wave["unload"]) == (0.0, [])
    assert len(wave["load"]) == len(dry["changes"])
    assert "wave 1, from about 0.0 s" in live.run("apply", "plan.json", *where(live), "--dry-run").stdout
    assert json.loads(live.run("status", *where(live), "--json").stdout)["generation"] == 0
    without = live.run("load", "--trace", "t.csv", "--services", "services.yaml", "--gateway", live.gateway)
    assert "requests failed: " in without.stderr
    assert " NOT_FOUND (the gateway has no plan with their service" in without.stderr

    applied = json.loads(live.run("apply", "plan.json", *where(live), "--store", "store", "--json").stdout)
    assert (applied["outcome"], applied["generation"]) == ("applied", 1)
    again = json.loads(live.run("apply", "plan.json", *where(live), "--store", "store", "--json").stdout)
    assert (again["outcome"], again["generation"]) == ("no changes", 1)

    flags = ["--services", "services.yaml", "--gateway", live.gateway, "--requests", "m.parquet", "--json"]
    result = json.loads(live.run("load", "--trace", "t.csv", *flags).stdout)
    assert result["attainment"] > 0.9
    assert sum(one["offered"] for one in result["services"]) == result["requests"]

    live.change("services.yaml", "deadline: 1s", "deadline: 900ms")
    live.plan("--current", "plan.json", output="next.json")
    live.change("services.yaml", "deadline: 900ms", "deadline: 1s")
    live.change("demand.json", '"mean": 8.0', '"mean": 9.0')
    live.plan(output="unaware.json")
    stale = live.run("apply", "unaware.json", *where(live), code=4)
    assert "generation 1" in stale.stderr

    applied = json.loads(live.run("apply", "next.json", *where(live), "--store", "store", "--json").stdout)
    assert applied["generation"] == 2
    live.run("rollback", "1", *where(live), "--store", "store")
    status = json.loads(live.run("status", *where(live), "--json").stdout)
    assert [one for part in ("agents", "gateways", "replicas") for one in status[part] if one["problem"]] == []
    assert status["generation"] == 3
    digest = json.loads(live.run("apply", "plan.json", *where(live), "--json").stdout)["placement_digest"]
    assert digest == status["placement_digest"]


def test_a_requests_file_that_cannot_be_written_is_told_before_anything_is_sent(tmp_path):
    workspace = Workspace.make(tmp_path)
    flags = ["--trace", "no-trace.csv", "--services", "services.yaml", "--gateway", "127.0.0.1:1"]
    assert "ends in .parquet or .csv" in workspace.run("load", *flags, "--requests", "m.txt", code=1).stderr
    assert "nowhere" in workspace.run("load", *flags, "--requests", "nowhere/m.csv", code=1).stderr


def test_a_plan_reaches_nodes_one_after_the_other_and_a_stale_one_reaches_none(live):
    """After the test above: plan.json is live, next.json was made against it, unaware.json against nothing."""
    kept = [*where(live), "--store", "store", "--json"]
    assert "is live" in live.run("apply", "unaware.json", *kept, "--target", "node-a", code=4).stderr
    refused = live.run("apply", "next.json", *where(live), "--target", "node-a", code=1)
    assert "--store: found nothing, expected the store that holds the live plan" in refused.stderr
    generations = [
        json.loads(live.run("apply", "next.json", *kept, *target).stdout)["generation"]
        for target in (["--target", "node-a"], ["--target", "node-b"], [])
    ]
    assert generations[0] == 4
    assert generations == sorted(generations)
    again = json.loads(live.run("apply", "next.json", *kept).stdout)
    assert again["outcome"] == "no changes"
    live.run("rollback", "1", *where(live), "--store", "store")


def test_what_an_apply_did_not_live_to_note_is_found_and_noted_by_the_next(live):
    """After the test above: plan.json is live, and next.json was made against it."""
    kept = [*where(live), "--store", "other-store", "--json"]
    before = json.loads(live.run("apply", "plan.json", *kept).stdout)["generation"]
    to_one = ["apply", "next.json", *kept, "--target", "node-a"]
    made = json.loads(live.run(*to_one).stdout)["generation"]
    records = live.folder / "other-store" / "generations"
    record, other = records / f"{made:010d}.json", records / f"{before:010d}.json"
    record.unlink()
    assert json.loads(live.run(*to_one).stdout)["outcome"] == "no changes"
    noted = json.loads(record.read_text())
    assert noted["generation"] == made
    earlier = noted | {"plan": json.loads(other.read_text())["plan"]}
    record.write_text(json.dumps(earlier))  # as a store has it that outlived the agents' journals
    live.run(*to_one)
    assert json.loads(record.read_text())["plan"] == noted["plan"]
    live.run("rollback", before, *where(live), "--store", "other-store")


def _interrupted(live, number, requests, *, processes="1", meanwhile=lambda: None):
    """Replay slowly, send signal ``number`` to the group when something is under way; return code, stdout, stderr."""
    flags = ["--services", "services.yaml", "--gateway", live.gateway, "--requests", requests, "--processes", processes]
    command = [sys.executable, "-m", "foreplan", "load", "--trace", "t.csv", "--speed", "0.01", *flags]
    with subprocess.Popen(
        command, cwd=live.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as load:
        assert "replaying" in load.stderr.readline()
        of_it, port = psutil.Process(load.pid), int(live.gateway.rpartition(":")[2])
        while not (of_it.children() or any(one.raddr and one.raddr.port == port for one in of_it.net_connections())):
            time.sleep(0.01)
        while processes == "2" and not of_it.children():
            time.sleep(0.01)
        meanwhile()
        os.killpg(load.pid, number)
        out, told = load.communicate(timeout=120)
    assert "Traceback" not in out + told
    return load.returncode, out, told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_interrupted_replay_keeps_what_it_has_and_says_so(live, processes, number):
    """Ctrl-C reaches every process of the group, and so may a supervisor's SIGTERM, whatever it has come to."""
    code, out, told = _interrupted(live, number, "cut.csv", processes=processes)
    assert code == 130, told
    assert "interrupted: only" in told
    assert "requests in" in out
    assert (live.folder / "cut.csv").read_text().startswith("service,scheduled_s,")
    (live.folder / "cut.csv").unlink()


def test_a_replay_whose_requests_cannot_be_written_any_more_tells_its_figures_first(live):
    (live.folder / "gone").mkdir()
    code, out, told = _interrupted(live, signal.SIGINT, "gone/cut.csv", meanwhile=(live.folder / "gone").rmdir)
    assert code == 1, told
    assert "requests in" in out
    assert "gone: found no such folder" in told


@pytest.mark.parametrize("arguments", [("apply", "plan.json"), ("drain", "node-a")])
def test_a_terminated_change_ends_as_an_interrupted_one(tmp_path, arguments):
    workspace = Workspace.make(tmp_path)
    workspace.plan()
    with contextlib.ExitStack() as stack:  # they take connections, and say nothing
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        silent[0].settimeout(60)
        ports = [one.getsockname()[1] for one in silent]
        address = f"127.0.0.1:{ports[2]}"
        (tmp_path / "cluster.yaml").write_text(cluster_text(ports[:2]))
        command = [sys.executable, "-m", "foreplan", *arguments, "--cluster", "cluster.yaml", "--gateway", address]
        with subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
        ) as change:
            stack.enter_context(silent[0].accept()[0])
            change.terminate()
            _, told = change.communicate(timeout=120)
    assert (change.returncode, "interrupted" in told) == (130, True)
    assert "Traceback" not in told


def test_a_port_in_use_is_named(live):
    flags = ["--cluster", "cluster.yaml", "--node", "node-a", "--state-dir", "other", *FAKE]
    result = live.run("agent", *flags, code=1)
    assert "127.0.0.1" in result.stderr
    assert "free" in result.stderr
    result = live.run("gateway", "--listen", live.gateway, "--state-dir", "other", code=1)
    assert live.gateway in result.stderr


def test_an_unknown_node_is_named(live):
    result = live.run("agent", "--cluster", "cluster.yaml", "--node", "node-z", "--state-dir", "other", code=1)
    assert "expected one of node-a, node-b" in result.stderr


def test_a_store_that_cannot_be_written_is_told_before_anything_changes(live):
    (live.folder / "no-store").write_text("")
    before = live.run("status", *where(live), "--json").stdout
    refused = live.run("apply", "plan.json", *where(live), "--store", "no-store", "--json", code=1)
    assert "no-store" in refused.stderr
    assert "applying" not in refused.stderr
    assert (
        json.loads(live.run("status", *where(live), "--json").stdout)["generation"] == json.loads(before)["generation"]
    )


def test_a_store_that_cannot_record_what_is_live_now_says_that_it_is(live):
    (live.folder / "full" / "plans").mkdir(parents=True)
    (live.folder / "full" / "generations").write_text("")
    refused = live.run("apply", "plan.json", *where(live), "--store", "full", code=1)
    assert "the plan is live as generation" in refused.stderr
    assert "run this again to record it" in refused.stderr
    (live.folder / "full" / "generations").unlink()
    assert "no changes" in live.run("apply", "plan.json", *where(live), "--store", "full").stdout
    assert len(list((live.folder / "full" / "generations").iterdir())) == 1


def test_a_change_that_nobody_reads_about_any_more_goes_on_to_its_end_and_is_noted(live):
    """After the tests above: plan.json is live, and next.json was made against it."""
    before = json.loads(live.run("status", *where(live), "--json").stdout)["generation"]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "foreplan", "apply", "next.json", *where(live), "--store", "unread"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=live.folder, env=environment, stdout=write, stderr=write, timeout=120)
    os.close(write)
    assert done.returncode == 1
    assert json.loads(live.run("status", *where(live), "--json").stdout)["generation"] == before + 1
    assert json.loads(live.run("apply", "next.json", *where(live), "--json").stdout)["outcome"] == "no changes"
    assert (live.folder / "unread" / "current").read_text() == f"{before + 1}\n"
    live.run("rollback", "1", *where(live), "--store", "store")


def test_where_the_store_has_lost_the_live_plan_a_stale_one_is_told_to_be_stale(live):
    """After the tests above: plan.json is live; unaware.json was made against nothing."""
    noted = json.loads(live.run("apply", "plan.json", *where(live), "--store", "pruned", "--json").stdout)
    for path in (live.folder / "pruned" / "plans").iterdir():
        path.unlink()
    assert "is live" in live.run("apply", "unaware.json", *where(live), "--store", "pruned", code=4).stderr
    lost = live.run("rollback", noted["generation"], *where(live), "--store", "pruned", code=1).stderr
    assert "found no such file, expected the file of a stored plan; restore it" in lost


def test_a_plan_for_another_cluster_is_refused(live):
    document = json.loads((live.folder / "plan.json").read_text().replace("node-a", "node-x"))
    (live.folder / "foreign.json").write_text(json.dumps(document))
    result = live.run("apply", "foreign.json", *where(live), code=1)
    assert "foreign.json: groups[0].node: found 'node-x', expected a node of the cluster" in result.stderr


def test_a_status_that_nobody_answers_is_an_error_and_says_who_was_asked(tmp_path):
    workspace = Workspace.make(tmp_path)
    result = workspace.run("status", *where(workspace), code=1)
    assert "no agent or gateway tells its state; start them" in result.stderr
    table = result.stdout + result.stderr
    assert workspace.gateway in table
    assert "node-a" in table


def test_a_dead_agent_is_named_with_its_address(tmp_path):
    workspace = Workspace.make(tmp_path)
    workspace.plan()
    servers = [start_agent(workspace, "a"), start_gateway(workspace)]
    try:
        result = workspace.run("apply", "plan.json", *where(workspace), code=1)
        assert "node-b" in result.stderr
        status = json.loads(workspace.run("status", *where(workspace), "--json").stdout)
        assert not status["healthy"]
        assert status["generation"] == 0
    finally:
        for server in servers:
            server.stop()


def test_a_gateway_that_is_not_there_is_named(tmp_path):
    workspace = Workspace.make(tmp_path)
    workspace.run("trace", "synth", "--service", "fast=20", "--duration", 1, "-o", "t.csv")
    flags = ["--services", "services.yaml", "--gateway", workspace.gateway]
    assert workspace.gateway in workspace.run("load", "--trace", "t.csv", *flags, code=1).stderr


def test_killed_servers_come_back_to_the_plan_in_force(tmp_path):
    workspace = Workspace.make(tmp_path)
    workspace.plan()
    workspace.run("trace", "synth", "--service", "fast=20", "--service", "slow=5", "--duration", 2, "-o", "t.csv")
    servers = [start_agent(workspace, "a"), start_agent(workspace, "b"), start_gateway(workspace)]
    try:
        workspace.run("apply", "plan.json", *where(workspace))
        for server in servers:
            server.stop(signal.SIGKILL)
        servers = [start_agent(workspace, "a"), start_agent(workspace, "b"), start_gateway(workspace)]
        assert "no changes" in workspace.run("apply", "plan.json", *where(workspace)).stdout
        flags = ["--services", "services.yaml", "--gateway", workspace.gateway, "--json"]
        assert json.loads(workspace.run("load", "--trace", "t.csv", *flags).stdout)["attainment"] > 0.9
    finally:
        for server in servers:
            server.stop()
    assert not _left_behind(tmp_path)


def _left_behind(folder):
    """Return processes that still work in ``folder``."""
    return [process.pid for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]
