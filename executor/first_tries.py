"""First tries of requests, which are given up when their node does not answer any more.

A process that dies breaks its connections, and what is under way over them fails at once. A machine that hangs breaks
nothing: requests would wait there until their deadlines, though another replica could answer in time. Inference may be
done twice, so such a request is sent to another replica, once, as any other that finds its replica unavailable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc

from executor.forwarding import CallFailed

__all__ = ["FirstTries", "FirstTry", "GivenUp"]


class GivenUp(CallFailed):
    """A try was given up, for its node does not answer; nothing is known of it that the routes do not know."""


class FirstTry:
    """A request at its first replica: a block that ends with `GivenUp` when its node is lost.

    Args:
        under_way: Where it is kept while it lasts.
        node: Of the replica.
        service: That it is a request for.
    """

    __slots__ = ("_cancelling", "_is_lost", "_task", "_under_way", "node", "service")

    def __init__(self, under_way: set[FirstTry], node: str, service: str) -> None:
        self.node = node
        self.service = service
        self._under_way = under_way
        self._is_lost = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._under_way.add(self)
        return self

    def keep(self) -> None:
        """From now on it is not given up: it has an answer, if not all of it."""
        self._under_way.discard(self)

    def give_up(self) -> None:
        """End the block, by a cancellation that goes no further."""
        self._under_way.discard(self)
        self._is_lost = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._under_way.discard(self)
        if self._is_lost and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            problem = f"the agent of node {self.node!r} does not answer any more"
            raise GivenUp(grpc.StatusCode.UNAVAILABLE, problem) from error


class FirstTries:
    """All that are under way from one gateway process, or from one agent to the next."""

    def __init__(self) -> None:
        self._under_way: set[FirstTry] = set()

    def at(self, node: str, service: str) -> FirstTry:
        """Return the block of a request for ``service`` on ``node``."""
        return FirstTry(self._under_way, node, service)

    def give_up(self, node: str, elsewhere: Callable[[str], bool]) -> None:
        """Give up what is on ``node``, of services that are served ``elsewhere``; the others may still be answered."""
        for one in tuple(self._under_way):
            if one.node == node and elsewhere(one.service):
                one.give_up()
