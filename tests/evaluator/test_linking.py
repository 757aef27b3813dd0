"""Compiled functions are compiled once per type of world, and found again under names of their own."""

import time

import numba
import numpy as np
import pytest
from numba.core import event, types

from evaluator.linking import Part, entry_point, on_compilation, source_digest, working_clock

FIELDS = np.dtype([("narrow", np.int32), ("wide", np.int64), ("flag", np.int8), ("time_s", np.float64)], align=True)


def _sum(number, flag, time_s):
    return number // 2 + time_s * (1.0 if flag else 2.0)


def test_narrow_numbers_and_constants_share_one_version():
    part = Part(_sum)

    @numba.njit
    def total(world):
        w = world[0]
        return part(w.narrow, True, w.time_s) + part(w.wide, w.flag != 0, 1.0) + part(7, False, w.time_s)

    world = np.array([(-3, 2**40 + 1, 1, 0.5)], FIELDS)
    assert total(world) == (-2 + 0.5) + (2**39 + 1.0) + (3 + 1.0)
    assert list(part.overloads) == [(types.int64, types.boolean, types.float64)]


def test_numbers_without_a_sign_stay_as_they_are():
    def halved(number):
        return number >> np.uint64(1)

    part = Part(halved)

    @numba.njit
    def through(number):
        return part(number)

    assert through(np.uint64(2**64 - 1)) == 2**63 - 1


def test_versions_of_a_function_are_kept_in_files_of_their_own():
    """Else what two processes add at once may get each other's place (numba's index is not locked)."""

    def version(number):
        def inner(x):
            return x + number

        return entry_point("version", number)(inner)

    one, other = version(1), version(2)
    paths = {each._cache._cache_file._index_path for each in (one, other)}
    assert len(paths) == 2
    assert all(source_digest() in path for path in paths)
    assert (one.py_func(1), other.py_func(1)) == (2, 3)


def test_compilation_is_told_once_and_only_where_there_is_some():
    told = []

    @numba.njit
    def add(x):
        return x + 1

    with on_compilation(lambda: told.append("compiled")):
        assert told == []
        assert add(1) == 2
        assert add(1.5) == 2.5
        assert told == ["compiled"]
    with on_compilation(lambda: told.append("again")):
        add(3)
    add(1j)
    assert told == ["compiled"]


def test_nothing_is_swallowed_on_the_way():
    with pytest.raises(ZeroDivisionError), on_compilation(lambda: None):
        raise ZeroDivisionError


def test_a_working_clock_leaves_compilation_out():
    """Law: what the clock has moved is at most the time that passed less the time that compilation took."""
    spent = event.TimingListener()

    @numba.njit
    def times(x):
        return x * 3

    with event.install_listener("numba:compile", spent), working_clock() as clock:
        started_s, before_s = time.perf_counter(), clock()
        times(2)
        moved_s = clock() - before_s
        passed_s = time.perf_counter() - started_s
    assert spent.duration > 0
    assert 0 <= moved_s <= passed_s - 0.9 * spent.duration
