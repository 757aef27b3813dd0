from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pandas as pd
import pytest

from executor.control_client import GatewayClient
from executor.forwarding import Body
from executor.gateway import GatewayConfig, running_gateway
from executor.infer_header import group_mark, read_answer_header
from executor.latency_histogram import LatencyHistogram
from executor.load import LoadOptions, LoadProgress, replay
from executor.load_requests import example_inputs
from executor.load_run import LoadRun, Schedule
from executor.load_tokens import stream_answer
from executor.proto import open_inference_pb2 as inference
from executor.state import Backend, ReplicaKey, RoutingTable, ServiceRoutes, Target
from plans.errors import InvalidInput, RemoteFailure
from plans.service import Services
from tests.executor.fake_agent import FakeAgent
from traces.table import RequestTrace

Code = grpc.StatusCode
SERVICES = Services.model_validate(
    {
        "services": [
            {"name": "chat", "slo": {"deadline": "10s"}, "variants": [{"model": "a", "accuracy": 0.7}]},
            {"name": "unplanned", "slo": {"deadline": "10s"}, "variants": [{"model": "b"}]},
        ]
    }
)


def trace(*arrivals: tuple[float, str]) -> RequestTrace:
    return RequestTrace(pd.DataFrame(arrivals, columns=["arrival_s", "service"]))


def requests(count: int, service: str = "chat", gap_s: float = 0.002) -> RequestTrace:
    return trace(*((number * gap_s, service) for number in range(count)))


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(120):
            await scenario

    asyncio.run(limited())


class Bench:
    """A gateway in front of one fake agent that serves "chat"."""

    def __init__(self, folder: Path) -> None:
        self.agent = FakeAgent("a")
        self.config = GatewayConfig(listen="127.0.0.1:0", state_dir=folder, grace_s=0.0)
        self.address = ""

    async def __aenter__(self) -> Bench:
        await self.agent.start()
        self.agent.serve(ReplicaKey(group="a/0", service="chat", variant="a"))
        self.running = running_gateway(self.config)
        self.address = await self.running.__aenter__()
        await self.route()
        return self

    async def route(self) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            target = Target(group="a/0", node="a", weight=1.0, variant="a")
            table = RoutingTable(
                generation=1,
                placement_digest="d",
                backends=(Backend(node="a", address=self.agent.address),),
                services=(ServiceRoutes(service="chat", deadline_s=10.0, targets=(target,)),),
            )
            await GatewayClient(channel, self.address).set_routes(table, timeout_s=5)

    async def __aexit__(self, *_: object) -> None:
        await self.stop_gateway()
        await self.agent.kill()

    async def stop_gateway(self) -> None:
        if self.address:
            self.address = ""
            await self.running.__aexit__(None, None, None)


class TestReplay:
    def test_every_request_has_one_row_in_the_order_of_the_trace(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                result = await replay(requests(20), bench.address, SERVICES, LoadOptions(gpus=2))
                frame = result.requests
                assert len(bench.agent.served) == 20
                assert list(frame["outcome"]) == ["good"] * 20
                assert list(frame["status"]) == ["OK"] * 20
                assert np.allclose(frame["scheduled_s"], np.arange(20) * 0.002)
                assert (frame["sent_s"] >= frame["scheduled_s"] - 0.001).all()  # timers may ring a little early
                assert (frame["latency_s"] > 0).all()
                assert set(frame["variant"]) == {"a"}
                assert set(frame["accuracy"]) == {0.7}
                assert set(frame["group"]) == {"a/0"}
                assert result.summary.requests == result.summary.good == 20
                assert result.summary.gpu_hours == pytest.approx(2 * result.summary.wall_s / 3600)
                assert [group.group for group in result.summary.groups] == ["a/0"]

        run(scenario())

    @pytest.mark.parametrize(("every", "told"), [(1, True), (2, False)])
    def test_how_busy_groups_were_is_told_only_where_every_answer_tells_of_its_batch(
        self, tmp_path: Path, every: int, told: bool
    ) -> None:
        class Batches(FakeAgent):
            async def _forwarded(self, body: Body, group: str, timeout_s: float) -> bytes:
                answer = inference.ModelInferResponse.FromString(await super()._forwarded(body, group, timeout_s))
                if len(self.served) % every == 0:  # the others are as those of workflows
                    answer.parameters["batch_size"].int64_param = 1
                    answer.parameters["run_s"].double_param = 0.001
                return answer.SerializeToString()

        async def scenario() -> None:
            bench = Bench(tmp_path)
            bench.agent = Batches("a")
            async with bench:
                summary = (await replay(requests(4), bench.address, SERVICES)).summary
                assert [group.utilisation is not None for group in summary.groups] == [told]

        run(scenario())

    def test_latency_counts_from_the_scheduled_arrival_and_sending_waits_for_no_answer(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                bench.agent.infer_waits_for = asyncio.Event()
                task = asyncio.create_task(replay(requests(10), bench.address, SERVICES))
                while len(bench.agent.served) < 10:
                    await asyncio.sleep(0.001)
                bench.agent.infer_waits_for.set()
                frame = (await task).requests
                ended_s = frame["scheduled_s"] + frame["latency_s"]
                assert (ended_s > frame["sent_s"].max()).all()

        run(scenario())

    def test_the_first_requests_are_sent_alike_for_the_same_seed_and_otherwise_not(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                for seed in (1, 1, 2):
                    await replay(requests(1), bench.address, SERVICES, LoadOptions(seed=seed))
                first, again, other = (body for _, body in bench.agent.served)
                assert first == again != other
                sent = inference.ModelInferRequest.FromString(first)
                assert (sent.model_name, sent.inputs[0].name, list(sent.inputs[0].shape)) == ("chat", "x", [1, 4])

        run(scenario())

    def test_payloads_replace_random_inputs(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                ones = {"chat": {"x": np.ones((2, 4), np.float32)}}
                await replay(requests(1), bench.address, SERVICES, LoadOptions(payloads=ones))
                sent = inference.ModelInferRequest.FromString(bench.agent.served[0][1])
                assert sent.raw_input_contents[0] == np.ones((2, 4), np.float32).tobytes()

        run(scenario())

    def test_speed_shortens_the_run_and_not_the_deadlines(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                options = LoadOptions(speed=1000.0, connections=2)
                frame = (await replay(requests(4, gap_s=20.0), bench.address, SERVICES, options)).requests
                assert list(frame["scheduled_s"]) == pytest.approx([0, 0.02, 0.04, 0.06])
                assert all(left and left > 5 for left in bench.agent.remaining_s)

        run(scenario())

    def test_a_client_that_is_late_itself_says_so(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                assert (await replay(requests(3), bench.address, SERVICES)).warnings == ()
                instant = {"services": [{"name": "chat", "slo": {"deadline": "1us"}, "variants": [{"model": "a"}]}]}
                result = await replay(requests(3), bench.address, Services.model_validate(instant))
                assert result.send_lag_p99_s > 0
                assert "fell behind" in result.warnings[0]

        run(scenario())

    def test_progress_ends_at_the_number_of_requests(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                seen: list[tuple[int, int]] = []
                options = LoadOptions(on_progress=lambda one: seen.append((one.done, one.total)))
                await replay(requests(5), bench.address, SERVICES, options)
                assert seen[-1] == (5, 5)

        run(scenario())


class TestOutcomes:
    @pytest.mark.parametrize(
        ("status", "outcome"),
        [
            (Code.RESOURCE_EXHAUSTED, "dropped"),
            (Code.DEADLINE_EXCEEDED, "dropped"),
            (Code.INVALID_ARGUMENT, "failed"),
            (Code.UNAVAILABLE, "failed"),
            (Code.INTERNAL, "failed"),
        ],
    )
    def test_a_status_makes_an_outcome_and_no_latency(self, tmp_path: Path, status: Code, outcome: str) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                bench.agent.infer_status = status
                result = await replay(requests(3), bench.address, SERVICES)
                assert set(result.requests["outcome"]) == {outcome}
                assert set(result.requests["status"]) <= {status.name}
                assert result.requests["latency_s"].isna().all()
                assert result.summary.attainment == 0.0

        run(scenario())

    def test_a_service_outside_the_plan_is_offered_all_the_same_and_fails(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                mixed = trace((0.0, "chat"), (0.001, "unplanned"))
                result = await replay(mixed, bench.address, SERVICES)
                assert list(result.requests["outcome"]) == ["good", "failed"]
                assert result.requests["status"].iloc[1] == "NOT_FOUND"
                assert result.summary.service("unplanned").offered == 1

        run(scenario())

    def test_a_replica_that_hangs_costs_each_request_its_deadline(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                bench.agent.infer_waits_for = asyncio.Event()
                brief = {"services": [{"name": "chat", "slo": {"deadline": "50ms"}, "variants": [{"model": "a"}]}]}
                result = await replay(requests(3), bench.address, Services.model_validate(brief))
                assert set(result.requests["outcome"]) == {"dropped"}
                assert set(result.requests["status"]) == {"DEADLINE_EXCEEDED"}

        run(scenario())

    def test_a_gateway_that_dies_in_the_middle_gives_failures_and_the_run_goes_on_to_its_end(
        self, tmp_path: Path
    ) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                task = asyncio.create_task(replay(requests(60, gap_s=0.005), bench.address, SERVICES))
                while len(bench.agent.served) < 10:
                    await asyncio.sleep(0.001)
                await bench.stop_gateway()
                result = await task
                counts = result.requests["outcome"].value_counts()
                assert counts["good"] >= 9
                assert counts["good"] + counts["failed"] == 60
                assert result.requests["outcome"].iloc[-1] == "failed"
                assert result.requests["status"].iloc[-1] == "UNAVAILABLE"

        run(scenario())


@pytest.mark.parametrize("processes", [1, 2])
class TestStopped:
    def test_what_was_sent_is_told_and_what_was_under_way_has_no_end(self, tmp_path: Path, processes: int) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                how = LoadOptions(processes=processes)
                task = asyncio.create_task(replay(requests(100_000, gap_s=0.01), bench.address, SERVICES, how))
                while len(bench.agent.served) < 10:
                    await asyncio.sleep(0)
                bench.agent.infer_waits_for = asyncio.Event()
                while len(bench.agent.served) < 20:
                    await asyncio.sleep(0)
                how.stop.set()
                result = await task
                counts = result.requests["outcome"].value_counts()
                assert counts["good"] >= 9
                assert counts["in_flight"] >= 1
                assert counts["good"] + counts["in_flight"] == len(result.requests) < 100_000
                assert result.summary.requests == len(result.requests)
                assert np.isfinite(result.requests["sent_s"]).all()
                assert 0 < result.summary.wall_s < 1000

        run(scenario())

    def test_before_anything_was_sent_there_is_an_empty_table(self, tmp_path: Path, processes: int) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                how = LoadOptions(processes=processes)
                how.stop.set()
                result = await replay(trace((50.0, "chat"), (60.0, "chat")), bench.address, SERVICES, how)
                assert (len(result.requests), result.summary.requests) == (0, 0)

        run(scenario())


class TestRefused:
    def test_a_gateway_that_is_not_there_is_named_at_the_start(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with Bench(tmp_path) as bench:
                address = bench.address
                await bench.stop_gateway()
                with pytest.raises(RemoteFailure, match=rf"{address}: .*foreplan gateway"):
                    await replay(requests(3), address, SERVICES)

        run(scenario())

    def test_every_wrong_input_is_named_at_once(self) -> None:
        async def scenario() -> None:
            with pytest.raises(InvalidInput) as caught:
                await replay(requests(1, "nobody"), "h:1", SERVICES, LoadOptions(speed=0.0, connections=0))
            assert [fault.where for fault in caught.value.faults] == ["trace", "--speed", "--connections"]

        run(scenario())

    def test_an_empty_trace_is_refused(self) -> None:
        async def scenario() -> None:
            with pytest.raises(InvalidInput, match="at least one"):
                await replay(trace(), "h:1", SERVICES)

        run(scenario())


class TestRequests:
    def test_inputs_have_the_datatype_and_shape_asked_for(self) -> None:
        metadata = inference.ModelMetadataResponse(name="m")
        wanted = {"FP32": np.float32, "FP16": np.float16, "INT64": np.int64, "UINT8": np.uint8, "BOOL": np.bool_}
        for datatype in wanted:
            metadata.inputs.add(name=datatype, datatype=datatype, shape=[-1, 3, 5])
        found = example_inputs(metadata, seed=1)
        assert {name: array.dtype.type for name, array in found.items()} == wanted
        assert {array.shape for array in found.values()} == {(1, 3, 5)}
        assert set(np.unique(found["INT64"])) <= {0, 1}

    def test_a_datatype_without_numpy_equivalent_is_refused(self) -> None:
        metadata = inference.ModelMetadataResponse(name="m")
        metadata.inputs.add(name="text", datatype="BYTES", shape=[1])
        with pytest.raises(InvalidInput, match="BYTES"):
            example_inputs(metadata, seed=1)


class TestAnswerHeader:
    def test_a_mark_appended_to_an_answer_adds_the_group_and_keeps_the_rest(self) -> None:
        answer = inference.ModelInferResponse(model_name="m", raw_output_contents=[b"12345"])
        answer.parameters["batch_size"].int64_param = 4
        answer.parameters["run_s"].double_param = 0.5
        marked = answer.SerializeToString() + group_mark("a/0-1")
        header = read_answer_header(marked)
        assert (header.batch_size, header.run_s, header.variant, header.group) == (4, 0.5, None, "a/0-1")
        whole = inference.ModelInferResponse.FromString(marked)
        assert (whole.model_name, list(whole.raw_output_contents)) == ("m", [b"12345"])
        assert set(whole.parameters) == {"batch_size", "run_s", "group"}

    def test_a_batch_without_end_is_none(self) -> None:
        answer = inference.ModelInferResponse()
        answer.parameters["batch_size"].double_param = math.inf
        assert read_answer_header(answer.SerializeToString()).batch_size is None

    def test_bytes_that_are_no_answer_are_refused(self) -> None:
        with pytest.raises(InvalidInput, match="ModelInferResponse"):
            read_answer_header(b"\xff\xff\xff")


class Broken:
    """A stream whose only answer cannot be read."""

    def __init__(self, _: object, timeout: float) -> None:
        self.is_cancelled = False

    async def write(self, _: bytes) -> None:
        return

    async def done_writing(self) -> None:
        return

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff"

    def cancel(self) -> None:
        self.is_cancelled = True


def test_a_token_that_cannot_be_read_fails_its_request_and_not_the_run() -> None:
    assert asyncio.run(stream_answer(Broken, b"", 1.0)).status == "INTERNAL"


@pytest.mark.parametrize("address", ["nope", ":8001", "127.0.0.1:0", "127.0.0.1:99999"])
def test_what_is_no_address_of_a_gateway_is_refused_before_it_is_dialled(address: str) -> None:
    with pytest.raises(InvalidInput, match=rf"--gateway: found '{address}', expected host:port"):
        asyncio.run(replay(requests(1), address, SERVICES))


class AtOnce:
    """A channel to a server that answers every request at once."""

    def unary_unary(self, *_: Any) -> Any:
        async def send(body: bytes, timeout: float) -> bytes:
            return group_mark("a/0")

        return send

    unary_stream = unary_unary


def test_a_request_that_leaves_before_its_time_is_measured_from_when_it_left() -> None:
    """Timers ring early by up to a millisecond; such an answer took longer than the time from the scheduled one."""
    seen: list[LoadProgress] = []
    count, gap_s = 200, 0.0003
    schedule = Schedule(
        due_s=np.arange(count) * gap_s,
        deadline_s=np.ones(count),
        body=np.zeros(count, np.int64),
        duration_s=count * gap_s,
    )
    channel: Any = AtOnce()
    load = LoadRun(schedule, [b""], [channel], seen.append)
    asyncio.run(load.replay())
    frame = load.frame()
    left_early = frame["sent_s"] < schedule.due_s
    assert left_early.any()
    assert (frame["latency_s"] >= frame["ended_s"] - frame["sent_s"]).all()
    assert (frame["latency_s"] >= frame["ended_s"] - schedule.due_s).all()
    counted = LatencyHistogram()
    for latency_s in frame["latency_s"]:
        counted.add(latency_s)
    np.testing.assert_array_equal(seen[-1].latency.counts, counted.counts)
