"""The engine as a thing that is advanced: pieces, pools, modes of keeping, repeatability."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

import evaluator
from evaluator import Run, Settings, linking, run, simulate_counts
from evaluator.state import DROPPED, FEATURED_WORLD, GOOD, LATE, WORLD, World
from tests.evaluator.arrays import arrivals, deadlines, finished, replicas

ALLOWED_S = (0.08, 0.2)


def some_replicas():
    """Two services on three groups, one of them shared, batches to 4."""
    table = np.array([[[0.01 * (1 + 0.4 * b)] for b in range(4)]] * 4)
    return replicas(table, group_of=(0, 1, 1, 2), service_of=(0, 0, 1, 1), weight=(0.6, 0.4, 0.3, 0.7))


def some_arrivals(seed=0, count=3_000, rate_rps=500.0):
    rng = np.random.default_rng(seed)
    return arrivals(np.cumsum(rng.exponential(1 / rate_rps, count)), rng.integers(0, 2, count))


def parts(seed=0, **changes):
    return some_replicas(), some_arrivals(seed, **changes), deadlines(*ALLOWED_S)


def log(one):
    return [one.world.array(name).copy() for name in ("log_code", "log_end_s", "log_replica", "log_batch")]


def same(left, right):
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(log(left), log(right), strict=True))


CHOICES = [
    Settings(),
    Settings(routing="weighted-random", seed=3),
    Settings(routing="shortest-queue", batch_delay_s=0.005),
    Settings(routing="least-finish", order="fifo", early_drop=False),
    Settings(routing="credits", latency="exponential"),
    Settings(routing="corrected", overhead_s=0.002),
    Settings(routing="round-robin", concurrency=3),
    Settings(routing="earliest-free", admission="arrival", order="fifo"),
]


@pytest.mark.parametrize("settings", CHOICES, ids=lambda s: s.routing)
def test_advancing_in_pieces_is_advancing_at_once(settings):
    whole = finished(settings, *parts())
    rng = np.random.default_rng(1)
    pieces = Run(*parts(), settings, keep_requests=True)
    for until_s in np.sort(rng.choice(whole.world.array("log_end_s"), 50)):
        pieces.advance(until_s, before=int(rng.integers(0, 6)))
    pieces.finish()
    assert same(whole, pieces)


@given(st.floats(0.01, 8.0))
@given_settings(max_examples=20, deadline=None)
def test_what_has_ended_by_a_time_is_what_the_whole_run_ends_by_then(until_s):
    whole = finished(Settings(), *parts())
    cut = finished(Settings(until_s=until_s), *parts())
    code, end_s = whole.world.array("log_code"), whole.world.array("log_end_s")
    assert np.array_equal(cut.world.array("log_code"), np.where(end_s <= until_s, code, 0))


def test_a_pool_that_grows_changes_nothing(monkeypatch):
    settings = Settings(early_drop=False)
    burst = some_replicas(), arrivals(np.linspace(0, 0.01, 6_000), np.arange(6_000) % 2), deadlines(*ALLOWED_S)
    roomy = finished(settings, *burst)
    monkeypatch.setattr(run, "_FIRST_SLOTS", 1)
    grown = finished(settings, *burst)
    assert grown.world["most_in_use"] > 5_000
    assert same(roomy, grown)


def test_memory_follows_the_requests_in_flight_not_the_trace():
    one = finished(Settings(), *parts(count=200_000), keep_requests=False)
    assert one.world["most_in_use"] < 200
    assert len(one.world.array("pool")) == run._FIRST_SLOTS
    assert len(one.world.array("log_code")) == 0


@pytest.mark.parametrize("settings", CHOICES, ids=lambda s: s.routing)
def test_requests_are_conserved_and_every_slot_comes_back(settings):
    one = finished(settings, *parts())
    assert one.world.array("counts").sum() == 3_000
    assert (one.world.array("log_code") > 0).all()
    assert one.world["in_use"] == 0
    assert (one.world.array("replicas")["open"] == 0).all()


def test_counting_alone_counts_the_same():
    counts = simulate_counts(*parts(), Settings())
    assert np.array_equal(counts, finished(Settings(), *parts()).world.array("counts")[:, GOOD])


def test_only_draws_depend_on_the_seed():
    assert same(finished(Settings(seed=1), *parts()), finished(Settings(seed=2), *parts()))
    drawn = [finished(Settings(seed=seed, latency="exponential"), *parts()) for seed in (1, 1, 2)]
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


def test_warm_up_is_simulated_and_not_counted():
    whole, counted = finished(Settings(), *parts()), finished(Settings(warmup_s=2.0), *parts())
    assert same(whole, counted)
    late = whole.arrivals.arrival_s >= 2.0
    for code in range(1, 9):
        assert counted.world.array("counts")[:, code].sum() == (whole.world.array("log_code")[late] == code).sum()
    assert counted.world.array("busy_s").sum() < whole.world.array("busy_s").sum()


def test_deadlines_that_vary_within_a_queue_do_not_make_it_slow():
    """Half of a long queue is overtaken by everything that comes; a list walked from its end would take minutes."""
    count = 200_000
    short = np.arange(count) >= count // 2
    table = np.full((1, 1, 1), 1.0)
    calls = arrivals(np.arange(count) * 1e-6, np.zeros(count))
    one = Run(replicas(table), calls, deadlines(1e9), Settings(early_drop=False, until_s=1.0), keep_requests=False)
    one.world.array("services")["allowed_per_token_s"] = 1.0
    tokens = np.where(short, count - np.arange(count), count + np.arange(count)).astype(np.float64)
    one.world.attach("output_tokens", tokens)
    one.finish()
    assert one.world["in_use"] == count - 1
    assert one.world.array("replicas")["heap"][0] >= 0


def test_an_overload_is_dropped_and_not_served_late():
    one = finished(Settings(), *parts(rate_rps=3_000.0))
    counts = one.world.array("counts").sum(axis=0)
    assert counts[list(DROPPED)].sum() > 1_000
    assert counts[LATE] == 0


def test_the_cache_is_keyed_by_every_module_that_the_kernel_is_compiled_from():
    folder = Path(evaluator.__file__).parent
    compiled, open_ = set(), {"kernel", "operations", "single_pass_kernel"}
    while open_:
        name = open_.pop()
        compiled.add(name)
        tree = ast.parse((folder / f"{name}.py").read_text())
        found = {
            node.module.split(".")[1]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evaluator.")
        }
        found |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "evaluator"
            for alias in node.names
        }
        open_ |= found - compiled
    assert compiled <= set(linking.COMPILED_MODULES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"group_of": np.array([1, 0], dtype=np.int32)}, "in the order of their groups"),
        ({"service_of": np.array([0, 1], dtype=np.int32)}, "services that exist"),
        ({"max_batch": np.array([0, 1], dtype=np.int32)}, "batches from 1"),
        ({"max_batch": np.array([1, 2], dtype=np.int32)}, "batches from 1"),
        ({"stages": np.array([1, 2], dtype=np.int32)}, "stages from 1"),
        ({"stages": np.array([1], dtype=np.int32)}, "groups that exist"),
        ({"weight": np.array([1.0])}, "one entry per replica"),
        ({"weight": np.array([1.0, np.nan])}, "weights that are numbers"),
        ({"stage_s": np.array([[[1.0]], [[np.nan]]])}, "latencies from 0 on"),
    ],
)
def test_replicas_that_compiled_code_would_trip_over_are_refused(changes, expected):
    hosts = replicas(np.ones((2, 1, 1)), group_of=(0, 1), service_of=(0, 0))
    broken = dataclasses.replace(hosts, **changes)
    with pytest.raises(ValueError, match=expected):
        Run(broken, arrivals([0.0]), deadlines(1.0), Settings())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arrival_s": np.array([1.0, 0.0])}, "arrivals in order"),
        ({"arrival_s": np.array([0.0, np.nan])}, "arrivals in order"),
        ({"code": np.array([0, 1])}, "one name per request"),
        ({"service_of_code": np.array([1], dtype=np.int32)}, "services that exist"),
        ({"stream": np.array([0, -1], dtype=np.int32)}, "streams that exist"),
        ({"output_tokens": np.ones(1)}, "tokens of every request"),
    ],
)
def test_arrivals_that_compiled_code_would_trip_over_are_refused(changes, expected):
    broken = dataclasses.replace(arrivals([0.0, 1.0]), **changes)
    with pytest.raises(ValueError, match=expected):
        Run(replicas(np.ones((1, 1, 1))), broken, deadlines(1.0), Settings())


def test_an_array_of_another_type_is_refused():
    world = World()
    with pytest.raises(ValueError, match="code: an array of int64 in C order, found int32"):
        world.attach("code", np.zeros(3, dtype=np.int32))
    with pytest.raises(ValueError, match="C order"):
        world.attach("free_s", np.zeros((3, 2)).T)


@pytest.mark.parametrize(("one", "other"), [(WORLD, FEATURED_WORLD), (FEATURED_WORLD, WORLD)])
def test_code_compiled_for_one_world_is_never_considered_for_the_other(one, other):
    assert numba.from_dtype(one).can_convert_to(None, numba.from_dtype(other)) is None
