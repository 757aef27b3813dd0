from __future__ import annotations

from planner import Solved, solve
from plans.service import GenerationService
from profiles.generation import prefill_points
from tests.planner.problems import generated_of


def test_what_generates_is_placed_with_the_deadlines_of_its_tokens_and_what_a_prefill_takes() -> None:
    problem = generated_of("generation", 1)
    found = solve(problem)
    assert isinstance(found, Solved)
    kinds = {node.name: node.gpus.type for node in problem.cluster.nodes}
    placed = [(group, entry) for group in found.plan.groups for entry in group.loadout]
    talks = [entry for _, entry in placed if entry.tokens is not None]
    assert talks
    for group, entry in placed:
        service = problem.services.service(entry.service)
        if not isinstance(service, GenerationService):
            assert entry.tokens is None
            continue
        assert entry.tokens is not None
        assert (entry.tokens.ttft_s, entry.tokens.tpot_s) == (service.slo.ttft_s, service.slo.tpot_s)
        profile = problem.profiles.profile(entry.variant, kinds[group.node])
        assert profile is not None
        assert (entry.tokens.prefill_tokens, entry.tokens.prefill_s) == prefill_points(profile, group.tp, group.pp)
        assert entry.tokens.prefill_tokens
