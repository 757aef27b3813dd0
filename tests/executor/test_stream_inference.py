from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from executor.stream_inference import interleaved

MOST = 64


async def _echo(request: int) -> AsyncGenerator[int, None]:
    yield request
    yield -request


def test_requests_of_a_client_that_takes_no_answers_are_not_read_without_end() -> None:
    async def scenario() -> None:
        read = 0

        async def requests() -> AsyncGenerator[int, None]:
            nonlocal read
            while read < 10 * MOST:
                read += 1
                yield read

        answers = interleaved(requests(), _echo)
        first = await anext(answers)
        for _ in range(100 * MOST):
            await asyncio.sleep(0)
        assert read <= MOST + 1
        rest = [answer async for answer in answers]
        assert sorted([first, *rest]) == sorted([*range(1, read + 1), *range(-read, 0)])
        assert read == 10 * MOST

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_request_without_an_answer_gives_its_place_back() -> None:
    async def scenario() -> None:
        async def requests() -> AsyncGenerator[int, None]:
            for number in range(3 * MOST):
                yield number

        async def none(_: int) -> AsyncGenerator[int, None]:
            return
            yield 0

        assert [answer async for answer in interleaved(requests(), none)] == []

    asyncio.run(asyncio.wait_for(scenario(), 60))
