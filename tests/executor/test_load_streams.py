"""Frames of a trace's streams, as the gateway and its agents see them."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from executor.infer_header import read_infer_header
from executor.load import LoadOptions, replay
from executor.load_run import Schedule
from plans.service import Services
from tests.executor.front_door import agents, door, run, table
from traces.table import RequestTrace

CLASSES = {"latency": {"deadline": "10s"}, "frequency": {"fps": 1, "jitter": "9s"}}


def services(request_class: str) -> Services:
    service = {"name": "chat", "class": request_class, "slo": CLASSES[request_class], "variants": [{"model": "v"}]}
    return Services.model_validate({"services": [service]})


def frames(streams: Iterable[str | None]) -> RequestTrace:
    labels = list(streams)
    rows = {"arrival_s": np.arange(len(labels)) * 0.002, "service": "chat", "stream": pd.Series(labels, dtype="object")}
    return RequestTrace(pd.DataFrame(rows))


async def sent(
    folder: Path, trace: RequestTrace, known: Services, options: LoadOptions | None = None, runs: int = 1
) -> list[list[tuple[str, str]]]:
    """Replay ``trace`` on two agents; return of each run the group and the stream of each request."""
    async with agents("a", "b") as both, door(folder) as front:
        await front.control.set_routes(table(*both, deadline_s=10.0), timeout_s=5)
        found = []
        for _ in range(runs):
            for agent in both:
                agent.served.clear()
            assert set((await replay(trace, front.address, known, options)).requests["outcome"]) == {"good"}
            found.append([(group, read_infer_header(body).stream) for agent in both for group, body in agent.served])
    return found


def test_requests_of_other_classes_are_of_no_stream_as_in_the_evaluator(tmp_path: Path) -> None:
    async def scenario() -> None:
        streams = {}
        for request_class in CLASSES:
            (found,) = await sent(tmp_path / request_class, frames("xyxy"), services(request_class))
            streams[request_class] = {stream for _, stream in found}
        assert streams["latency"] == {""}
        assert len(streams["frequency"] - {""}) == 2

    run(scenario())


def test_frames_without_a_stream_are_marked_as_of_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        (found,) = await sent(tmp_path, frames([None, "x", None, "x"]), services("frequency"))
        counts = collections.Counter(stream for _, stream in found)
        assert counts.pop("") == 2
        assert list(counts.values()) == [2]

    run(scenario())


@pytest.mark.parametrize(("processes", "connections"), [(1, 1), (1, 3), (2, 2)])
def test_the_frames_of_a_stream_carry_its_mark_and_go_to_one_group(
    tmp_path: Path, processes: int, connections: int
) -> None:
    async def scenario() -> None:
        options = LoadOptions(processes=processes, connections=connections)
        (found,) = await sent(tmp_path, frames("abcdef" * 8), services("frequency"), options)
        groups = collections.defaultdict(list)
        for group, stream in found:
            groups[stream].append(group)
        assert [len(places) for places in groups.values()] == [8] * 6
        assert {len(set(places)) for places in groups.values()} == {1}
        assert {group for group, _ in found} == {"a/0", "b/0"}

    run(scenario())


def test_the_streams_of_a_run_are_not_those_of_the_run_before(tmp_path: Path) -> None:
    """Else a gateway would keep to the places of the earlier ones, and not follow the plan's routes."""

    async def scenario() -> None:
        first, second = await sent(tmp_path, frames("xyxy"), services("frequency"), runs=2)
        assert not {stream for _, stream in first} & {stream for _, stream in second}

    run(scenario())


def test_a_stream_has_one_sender_and_all_other_requests_take_turns() -> None:
    stream = np.array([0, 9, 8, 0, 7, 9, 0, 8, 6, 0, 7, 6])
    count = len(stream)
    schedule = Schedule(
        due_s=np.arange(count, dtype=float),
        deadline_s=np.ones(count),
        body=np.zeros(count, np.int64),
        duration_s=1.0,
        stream=stream,
    )
    turns = schedule.turns(2)
    alone = stream == 0
    assert list(turns[alone]) == [0, 1, 0, 1]
    senders = {int(each): set(turns[stream == each].tolist()) for each in stream[~alone]}
    assert sorted(map(tuple, senders.values())) == [(0,), (0,), (1,), (1,)]
    part = schedule.part(np.flatnonzero(turns == 0))
    assert part.stream is not None
    again = part.turns(2)[part.stream != 0]
    assert set(again.tolist()) == {0, 1}  # its streams are shared out among its connections anew
