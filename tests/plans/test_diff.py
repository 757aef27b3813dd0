from __future__ import annotations

from hypothesis import given

from plans import apply_diff, diff
from plans.service import Workflow
from tests.plans.strategies import entry, group, plan, plans


@given(plans(), plans())
def test_applying_the_difference_gives_the_second_plan(before, after):
    """Law: apply_diff(a, diff(a, b)) == b."""
    assert apply_diff(before, diff(before, after)) == after


@given(plans())
def test_a_plan_does_not_differ_from_itself(one):
    change = diff(one, one)
    assert not change.changes_placement
    assert not change.entries
    assert not change.record


@given(plans(), plans())
def test_the_digest_tells_placements_apart(before, after):
    same = before.groups == after.groups and before.routes == after.routes
    assert (before.placement_digest == after.placement_digest) == same
    assert diff(before, after).changes_placement != same


@given(plans(), plans())
def test_entry_changes_cover_every_replica_that_differs(before, after):
    replicas = [{(g.id, g.tp, g.pp, e.service): e for g in one.groups for e in g.loadout} for one in (before, after)]
    changed = {key for key in replicas[0].keys() | replicas[1].keys() if replicas[0].get(key) != replicas[1].get(key)}
    assert {(c.group, c.service) for c in diff(before, after).entries} == {(name, s) for name, _, _, s in changed}


def test_a_new_batch_size_needs_no_load_and_a_new_variant_does():
    before = plan([group("node-0", (0,), [entry("detect"), entry("segment")])])
    after = plan(
        [
            group(
                "node-0",
                (0,),
                [
                    entry("detect", max_batch=1, stage_latency_s=((0.01,),)),
                    entry("segment", variant="larger"),
                ],
            )
        ]
    )
    changes = {change.service: change for change in diff(before, after).entries}
    assert (changes["detect"].action, changes["detect"].reloads) == ("update", False)
    assert (changes["segment"].action, changes["segment"].reloads) == ("update", True)


def test_another_workflow_changes_what_runs():
    before = plan([group("node-0", (0,), [entry("detect"), entry("read")])])
    edges = [{"from": "detect", "to": "read"}]
    flow = Workflow.model_validate({"name": "plates", "slo": {"deadline": "1s"}, "edges": edges})
    after = before.model_copy(update={"workflows": (flow,)})
    assert diff(before, after).changes_placement
    assert before.placement_digest != after.placement_digest


def test_a_group_that_is_cut_otherwise_reloads_everything():
    before = plan([group("node-0", (0, 1), [entry("detect", 2)])])
    after = plan([group("node-0", (0, 1), [entry("detect", 2, 2)], pp=2)])
    assert [(c.action, c.reloads) for c in diff(before, after).entries] == [("delete", False), ("create", True)]
