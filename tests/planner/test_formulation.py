from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner import exact_model
from planner.backend import Budget, Solution, solver
from planner.formulation import Formulation
from planner.greedy import greedy
from planner.objective import ACCURACY, BYTES_MOVED, GOODPUT, GPU_COST, Kept, tiers, with_kept
from planner.space import Placed, build_space
from plans.service import Edge, LatencySlo, Spread, Workflow
from tests.planner.conftest import Golden
from tests.planner.problems import QUIET, cluster, demand, generated, latency_service, problem, profile, town

NUMBER = re.compile(r"\(([0-9]{1,2}\.[0-9]{1,2})\)")
RANGE = re.compile(r"\(([0-9]+)\.([0-9]+)\) to \(([0-9]+)\.([0-9]+)\)")
CONSTRAINTS = ("formulation", "objective", "side_rows", "fairness")
"""Modules whose methods add constraints and objectives."""


def numbers(text: str) -> set[str]:
    """Return every number of an inequality that ``text`` names, with those between the ends of a range."""
    between = {
        f"{found[1]}.{number}" for found in RANGE.finditer(text) for number in range(int(found[2]), int(found[4]) + 1)
    }
    return {each for each in {*NUMBER.findall(text), *between} if not each.startswith("0.") and not each.endswith(".0")}


def small() -> Formulation:
    """Two services that block each other at large batches, one with a budget and a replica, on two alike GPUs."""
    wanted = problem(
        cluster(("a", "gpu", 2)),
        [
            latency_service("x", ("m", 0.9), deadline_s=0.045, weight=2.0, max_gpus=1, min_replicas=1),
            latency_service("y", ("n", 0.8), deadline_s=0.3),
        ],
        [profile("m", batches=(1, 4), weights_gib=9.0), profile("n", batches=(1, 4), base_s=0.02, weights_gib=5.0)],
        demand(x=50.0, y=20.0),
    )
    space = build_space(wanted)
    return Formulation(space, space.singles)


def test_the_lp_text_of_a_small_problem_is_as_before(golden: Golden) -> None:
    formulation = small()
    golden.check("planner_small.lp", formulation.model.with_objective(formulation.goodput(), maximise=True).lp_text())


def joined() -> Formulation:
    """One more of everything that joins groups: spread, a workflow with affinity, a floor, an attainment, a loss."""
    service = latency_service("x", ("m", 1.0), min_replicas=1, spread=Spread(over="node", min_domains=2))
    wanted = problem(
        cluster(("a", "gpu", 1), ("b", "gpu", 1)),
        [service, latency_service("y", ("m", 1.0))],
        [profile("m", batches=(4,))],
        demand(x=10.0),
        settings=replace(QUIET, objective="max-min", attainment=0.5, keep_after_loss=0.5),
    )
    edge = Edge(source="x", target="y", fanout=2.0, payload_bytes=2**20)
    flow = Workflow(name="w", slo=LatencySlo(deadline_s=1.0), edges=(edge,), affinity="require")
    space = build_space(replace(wanted, services=wanted.services.model_copy(update={"workflows": (flow,)})))
    return Formulation(space, space.singles)


def test_the_lp_text_of_what_joins_groups_is_as_before(golden: Golden) -> None:
    formulation = joined()
    objective = tiers(formulation.space)[0]
    golden.check("planner_joined.lp", with_kept(formulation, objective, ()).lp_text())


def test_a_placement_is_complete_in_every_variable_of_what_joins_groups() -> None:
    formulation = joined()
    space = formulation.space
    option = {name: int(np.flatnonzero(space.service_of == index)[0]) for index, name in enumerate(space.names)}
    rate = {name: float(space.sustained_rps[option[name]]) for name in space.names}
    placement = tuple(
        sorted(
            Placed(group, option[name], wanted / 2 / rate[name])
            for group in range(2)
            for name, wanted in (("x", 10.0), ("y", 20.0))
        )
    )
    values = formulation.encode(placement)
    blocks = [name for name in formulation.model.variables if ".a[" in name or ".b[" in name]
    assert blocks
    rows = [name for name in formulation.model.rows if not name.startswith(("survive", "demand."))]
    # The routing after a loss is for the solver to find; all else is filled in.
    activity = np.bincount(
        formulation.model.row_of,
        formulation.model.value_of * values[formulation.model.column_of],
        minlength=len(formulation.model.rows),
    )
    for name, total, low, high in zip(
        formulation.model.rows, activity, formulation.model.row_lower, formulation.model.row_upper, strict=True
    ):
        if name in rows:
            assert low - 1e-9 <= total <= high + 1e-9, name
    assert formulation.decode(values) == placement
    first = tiers(space)[0]
    assert first.coefficients(formulation) @ values == pytest.approx(first.value(space, placement))


def test_code_and_document_cite_the_same_inequalities() -> None:
    """Each number that code cites is stated in the document, and each that the document states is cited in code."""
    root = Path(__file__).parents[2]
    stated = numbers((root / "docs" / "formulation.md").read_text())
    cited = {each for path in (root / "planner").glob("*.py") for each in numbers(path.read_text())}
    assert sorted(cited - stated) == []
    assert sorted(stated - cited) == []


def test_the_document_states_every_number_once() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formulation.md").read_text()
    stated = re.findall(r"^ {4}\((\d+\.\d+)\)", text, re.MULTILINE)
    assert len(stated) > 50
    assert [number for number, times in Counter(stated).items() if times > 1] == []


@pytest.mark.parametrize("module", CONSTRAINTS)
def test_every_method_that_adds_rows_cites_their_number_or_serves_one_that_does(module: str) -> None:
    path = Path(__file__).parents[2] / "planner" / f"{module}.py"
    methods = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    cites = {each.name for each in methods if numbers(ast.get_docstring(each) or "")}
    adds = {each.name for each in methods if "add_row" in called(each)}
    served = {name for each in methods if each.name in cites for name in called(each)}
    assert sorted(adds - cites - served) == []


def called(method: ast.FunctionDef) -> set[str]:
    """Return the names of the methods that ``method`` calls."""
    calls = (node.func for node in ast.walk(method) if isinstance(node, ast.Call))
    return {each.attr for each in calls if isinstance(each, ast.Attribute)}


@pytest.mark.parametrize("seed", range(4))
def test_the_model_over_classes_bounds_the_exact_one(seed: int) -> None:
    space = build_space(generated(seed, nodes=3, load=3.0))
    objectives = []
    for classes in (space.classes, space.singles):
        formulation = Formulation(space, classes)
        model = formulation.model.with_objective(formulation.goodput(), maximise=True)
        answer = solver("highs").solve(model, Budget(time_limit_s=20))
        objectives.append(answer.objective if isinstance(answer, Solution) else None)
    over_classes, exact = objectives
    assert over_classes is not None or exact is None
    if over_classes is not None and exact is not None:
        assert over_classes >= exact * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_packing_rows_cut_no_integer_solution(seed: int) -> None:
    space = build_space(generated(seed, services=4, nodes=1, load=2.0))
    formulation = Formulation(space, space.singles)
    model = formulation.model.with_objective(formulation.goodput(), maximise=True)
    keep = np.array([not name.startswith("packing") for name in model.rows])
    entries = keep[model.row_of]
    without = type(model)(
        variables=model.variables,
        lower=model.lower,
        upper=model.upper,
        integer=model.integer,
        rows=tuple(name for name, kept in zip(model.rows, keep, strict=True) if kept),
        row_lower=model.row_lower[keep],
        row_upper=model.row_upper[keep],
        row_of=(np.cumsum(keep) - 1)[model.row_of[entries]],
        column_of=model.column_of[entries],
        value_of=model.value_of[entries],
        objective=model.objective,
    )
    budget = Budget(time_limit_s=20)
    answers = [solver("highs").solve(each, budget) for each in (model, without)]
    relaxed = [solver("highs").solve(each.relaxed(), budget) for each in (model, without)]
    values = [answer.objective for answer in answers if isinstance(answer, Solution)]
    bounds = [answer.objective for answer in relaxed if isinstance(answer, Solution)]
    assert values[:1] == pytest.approx(values[1:], rel=1e-6)
    if len(bounds) == 2:
        assert bounds[0] <= bounds[1] * (1 + 1e-9)


def test_decode_after_encode_is_the_identity() -> None:
    space = build_space(town())
    placement = greedy(space)
    assert placement is not None
    formulation = Formulation(space, space.singles, ordered=False)
    values = formulation.encode(placement)
    assert formulation.decode(values) == placement
    assert formulation.model.violation(values) < 1e-6


def test_objectives_of_the_model_and_of_the_placement_agree() -> None:
    space = build_space(town())
    placement = greedy(space)
    assert placement is not None
    formulation = Formulation(space, space.singles, ordered=False)
    values = formulation.encode(placement)
    for objective in (GOODPUT, ACCURACY, GPU_COST, BYTES_MOVED):
        assert objective.coefficients(formulation) @ values == pytest.approx(objective.value(space, placement))


def test_a_hint_with_a_pair_that_the_model_lacks_is_refused() -> None:
    space = build_space(town())
    first = space.groups[0].options[0]
    narrow = Formulation(space, space.singles, [(0, first)])
    with pytest.raises(KeyError):
        narrow.encode((Placed(0, space.groups[0].options[1], 0.5),))


def test_kept_objectives_are_rows() -> None:
    formulation = small()
    model = with_kept(formulation, ACCURACY, (Kept(objective=GOODPUT, limit=10.0), Kept(objective=GPU_COST, limit=1.0)))
    assert model.rows[-2:] == ("keep.goodput", "keep.gpu-cost")
    assert model.row_lower[-2] == 10.0
    assert model.row_upper[-1] == 1.0


def test_the_exported_model_is_the_exact_one_with_goodput() -> None:
    model = exact_model(town())
    assert model.maximise
    assert model.integer.any()
    assert "served_detect" not in model.lp_text()
    assert "served(detect)" in model.lp_text()


def test_the_exported_model_has_the_objective_of_the_problem() -> None:
    problem = town()
    fewest = replace(problem, settings=replace(problem.settings, minimize="gpus", attainment=0.5))
    model = exact_model(fewest)
    assert not model.maximise
    assert {name for name, value in zip(model.variables, model.objective, strict=True) if value} == {
        name for name in model.variables if name.startswith("use[")
    }
