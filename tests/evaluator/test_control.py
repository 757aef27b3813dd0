from __future__ import annotations

import pandas as pd
import pytest

from evaluator import evaluate
from evaluator.control import Turn
from plans import InvalidInput, Services
from tests.plans.strategies import cluster, entry, group, plan
from traces.table import RequestTrace

SERVICES = Services.model_validate(
    {"services": [{"name": "detect", "slo": {"deadline": 1.0}, "variants": [{"model": "detect-model"}]}]}
)


def serving(node, load_s=0.0):
    return plan(
        [group(node, (0,), [entry("detect", max_batch=1, load_s=load_s, deadline_s=0.9, stage_latency_s=((0.1,),))])]
    )


class Script:
    """Answers as told and remembers what it saw."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []

    def observe(self, observation):
        self.seen.append(observation)
        return self.answers.pop(0) if self.answers else None


def run(arrivals, controller, interval_s=1.0, **fields):
    trace = RequestTrace(pd.DataFrame({"arrival_s": arrivals, "service": "detect"}))
    where = fields.pop("known", cluster())
    return evaluate(
        serving("node-0"), SERVICES, trace, cluster=where, controller=controller, interval_s=interval_s, **fields
    )


def test_a_controller_is_asked_every_interval_while_requests_are_to_come():
    script = Script()
    run([0.5, 2.0, 3.5], script)
    assert [seen.now_s for seen in script.seen] == [1.0, 2.0, 3.0]
    assert [seen.since_s for seen in script.seen] == [0.0, 1.0, 2.0]


def test_it_sees_arrivals_outcomes_and_queues_since_it_was_last_asked():
    """Three at 0.85: one ends at 0.95, one runs, one waits at 1.0. The others end before 2.0."""
    script = Script()
    run([0.85, 0.85, 0.85, 1.95, 2.5], script)
    first, second = (seen.services["detect"] for seen in script.seen[:2])
    assert (first.arrived, first.good, first.queued) == (3, 1, 1)
    assert script.seen[0].queued == {"node-0/0": 1}
    assert (second.arrived, second.good, second.late, second.dropped, second.failed, second.queued) == (
        1,
        2,
        0,
        0,
        0,
        0,
    )


def test_its_plan_is_known_after_the_time_that_it_took_to_find_and_serves_after_its_loads():
    """Asked at 1, known at 1.5, loaded by 2: requests go to node-1 from 2 on."""
    script = Script(Turn(plan=serving("node-1", load_s=0.5), solve_s=0.5))
    found = run([0.1, 1.9, 2.0, 4.5], script).requests
    assert found["group"].tolist() == ["node-0/0", "node-0/0", "node-1/0", "node-1/0"]


def test_it_is_not_asked_while_its_decision_is_under_way():
    """Decided at 1, known at 1.5, flipped at 2, the old replica drained at 2.9 (its deadline is 0.9 s)."""
    script = Script(Turn(plan=serving("node-1", load_s=0.5), solve_s=0.5))
    run([0.1, 4.5], script)
    assert [seen.now_s for seen in script.seen] == [1.0, 3.0, 4.0]
    assert script.seen[1].plan == serving("node-1", load_s=0.5)


def test_nonsense_is_refused():
    with pytest.raises(InvalidInput, match="at least 0 seconds"):
        Turn(plan=serving("node-0"), solve_s=-1.0)
    with pytest.raises(InvalidInput, match="interval_s"):
        run([0.1], Script(), interval_s=0.0)
    with pytest.raises(InvalidInput, match="cluster"):
        run([0.1], Script(), known=None)
    with pytest.raises(InvalidInput, match="the controller's plan"):
        run([0.1, 5.0], Script(Turn(plan=serving("node-9"))))
