"""What the polish asks of a simulator: the planner owns the question, an evaluator answers, `foreplan` joins them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planner.linear import Floats, Integers

__all__ = ["Deployment", "Heat", "Scorer"]

Indices = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A candidate: where each service runs. The arrays are the search's own and change after the call.

    Attributes:
        count: Shape (service,): replicas of each service.
        slot: Shape (service, replica): the group, named by the cluster-wide position of its first GPU; rising.
        option: Shape (service, replica): position of the option in the planning space.
    """

    count: Indices
    slot: Indices
    option: Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """What a candidate served.

    Attributes:
        blocks: Blocks of arrivals that were run; fewer than there are when the candidate was given up.
        value: Shape (block,): value served in time; 0 where not run.
        good: Shape (service, replica): requests served in time in the blocks that were run, beside `Deployment.slot`.
    """

    blocks: int
    value: Floats
    good: Integers


class Scorer(Protocol):
    """Simulates candidates on blocks of arrivals that are the same for all of them (common random numbers)."""

    @property
    def name(self) -> str:
        """What simulates, in words for the plan."""
        ...

    @property
    def offered(self) -> Integers:
        """Requests of each service in each block, shape (block, service)."""
        ...

    @property
    def simulated_s(self) -> float:
        """Seconds that all blocks together last."""
        ...

    def race(
        self, deployment: Deployment, value: Floats, *, rival: Floats, needed: float, start: int, least: int
    ) -> Heat:
        """Run ``deployment`` block after block until it is improbable that it beats ``rival`` by what is needed.

        Args:
            deployment: The candidate.
            value: Shape (option,): what a request served in time counts.
            rival: Shape (block,): the value that the rival serves in each block.
            needed: Least gain in all blocks together that is of interest; -inf runs all, +inf only the first few.
            start: The block to begin with; after the last comes the first.
            least: Blocks to run at least.
        """
        ...
