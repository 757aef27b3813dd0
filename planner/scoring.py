"""What the polish asks of a simulator: the planner owns the question, an evaluator answers, `foreplan` joins them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from planner.linear import Floats, Integers

if TYPE_CHECKING:
    from planner.arranged import Arrangement

__all__ = ["Scorer"]


class Scorer(Protocol):
    """Simulates arrangements on blocks of arrivals that are the same for all of them (common random numbers).

    It knows the *standing* arrangement, block by block, and what it lost and served (`Layout.lost`, `Layout.worth`).
    """

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

    @property
    def score(self) -> Floats:
        """What the standing arrangement is worth in each block, shape (block,)."""
        ...

    def settle(self, arrangement: Arrangement, mark: int | None) -> None:
        """Simulate all blocks and let ``arrangement`` stand.

        Args:
            arrangement: What to simulate.
            mark: Point in its log at which it was the standing one, so that only what changed since has to be
                simulated; None simulates all of it.
        """
        ...

    def glance(self, arrangement: Arrangement, mark: int | None) -> None:
        """Simulate a few blocks and tell the layout what services lose in them; what stands stays."""
        ...

    def walk(self, arrangement: Arrangement, temperature: float, moves: int) -> tuple[int, int]:
        """Try up to ``moves`` small moves one after the other, from what stands.

        Return how many were tried, and how many of them led to a candidate. At least one is tried, where any is asked
        for; then as many as are worth an amount of simulation that takes a fraction of a second, so that whoever asks
        may look at the clock.

        A candidate is accepted by the rule of Metropolis at ``temperature``, in the units of ``score`` summed, and is
        given up as soon as the blocks run so far make it improbable that it will be.
        """
        ...

    def standing(self, arrangement: Arrangement) -> object:
        """Return what `resume` brings back."""
        ...

    def resume(self, arrangement: Arrangement, standing: object) -> None:
        """Let stand what did when ``standing`` was returned; the layout has to be as it was then."""
        ...

    def good(self, arrangement: Arrangement) -> Integers:
        """Return the requests served in time in all blocks, shape (service, replica), beside `Layout.slot`."""
        ...
