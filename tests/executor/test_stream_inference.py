from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from typing import Any

import pytest

from executor.stream_inference import interleaved

MOST = 64
MIB = 1 << 20


async def _echo(request: int) -> AsyncGenerator[int, None]:
    yield request
    yield -request


async def _numbers(count: int) -> AsyncGenerator[int, None]:
    for number in range(1, count + 1):
        yield number


def _answered(
    requests: AsyncIterable[int], answers: Callable[[int], AsyncGenerator[Any, None]], size_bytes: int = 1
) -> AsyncGenerator[Any, None]:
    """Interleave answers of ``size_bytes`` each; a failure is answered with its message."""
    return interleaved(requests, answers, failure=lambda _, error: str(error), size_bytes=lambda _: size_bytes)


async def _rest() -> None:
    """Let everything run that can."""
    for _ in range(20 * MOST):
        await asyncio.sleep(0)


def _run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_a_request_that_ends_with_an_exception_is_answered_with_it_and_the_others_are_too() -> None:
    async def failing(request: int) -> AsyncGenerator[int, None]:
        yield request
        if request == 2:
            raise ValueError("no more of the second")

    async def scenario() -> None:
        found = [answer async for answer in _answered(_numbers(3), failing)]
        assert sorted(found, key=str) == [1, 2, 3, "no more of the second"]

    _run(scenario())


async def _begun(size_bytes: Callable[[int], int], taken: int) -> int:
    """Return how many requests of one answer each have begun when a client has taken so many answers."""
    begun = 0

    async def counting(request: int) -> AsyncGenerator[int, None]:
        nonlocal begun
        begun += 1
        yield request

    answers = interleaved(_numbers(9 * MOST), counting, failure=lambda _, error: 0, size_bytes=size_bytes)
    for _ in range(taken):
        await anext(answers)
    await _rest()
    await answers.aclose()
    return begun


@pytest.mark.parametrize(("size_bytes", "most"), [(1, MOST), (MIB, MOST), (2 * MIB, 32), (16 * MIB, 4), (MIB << 10, 1)])
def test_fewer_requests_are_under_way_where_their_answers_are_large(size_bytes: int, most: int) -> None:
    async def scenario() -> None:
        found = await _begun(lambda _: size_bytes, taken=MOST)
        assert found == MOST - 1 + most  # the client may not have the last answer yet

    _run(scenario())


def test_one_large_answer_does_not_make_a_stream_serial_for_ever() -> None:
    async def scenario() -> None:
        found = await _begun(lambda answer: 64 * MIB if answer == 1 else 1, taken=3 * MOST)
        assert found == 4 * MOST - 1

    _run(scenario())


def test_few_requests_are_begun_before_it_is_known_how_large_answers_are() -> None:
    async def scenario() -> None:
        begun, go_on = 0, asyncio.Event()

        async def held(request: int) -> AsyncGenerator[int, None]:
            nonlocal begun
            begun += 1
            await go_on.wait()
            yield request

        answers = _answered(_numbers(3 * MOST), held)
        first = asyncio.ensure_future(anext(answers))
        await _rest()
        assert begun == 8
        go_on.set()
        assert await first == 1
        assert len([answer async for answer in answers]) == 3 * MOST - 1

    _run(scenario())


def test_a_request_with_many_answers_waits_for_a_client_that_takes_none() -> None:
    async def scenario() -> None:
        made = 0

        async def many(request: int) -> AsyncGenerator[int, None]:
            nonlocal made
            while made < 1000:
                made += 1
                yield request

        answers = _answered(_numbers(1), many, MIB)
        await anext(answers)
        await _rest()
        assert made == 64
        assert len([answer async for answer in answers]) == 999

    _run(scenario())


def test_nothing_is_kept_of_the_answers_to_a_client_that_is_gone() -> None:
    class Large:
        pass

    async def scenario() -> None:
        kept: weakref.WeakSet[Large] = weakref.WeakSet()

        async def large(_: int) -> AsyncGenerator[Large, None]:
            for _ in range(100):
                answer = Large()
                kept.add(answer)
                yield answer
            await asyncio.Event().wait()

        answers = _answered(_numbers(3), large, 16 * MIB)
        await anext(answers)
        await _rest()
        assert len(kept) > 3
        await answers.aclose()
        await _rest()
        assert not kept

    gc.disable()
    try:
        _run(scenario())
    finally:
        gc.enable()


def test_requests_of_a_client_that_takes_no_answers_are_not_read_without_end() -> None:
    async def scenario() -> None:
        read = 0

        async def requests() -> AsyncGenerator[int, None]:
            nonlocal read
            while read < 10 * MOST:
                read += 1
                yield read

        answers = _answered(requests(), _echo)
        first = await anext(answers)
        await _rest()
        assert read <= MOST + 1
        rest = [answer async for answer in answers]
        assert sorted([first, *rest]) == sorted([*range(1, read + 1), *range(-read, 0)])
        assert read == 10 * MOST

    _run(scenario())


def test_a_request_without_an_answer_gives_its_place_back() -> None:
    async def scenario() -> None:
        async def none(_: int) -> AsyncGenerator[int, None]:
            return
            yield 0

        assert [answer async for answer in _answered(_numbers(3 * MOST), none)] == []

    _run(scenario())
