"""A delay as it was lately, to be allowed for in decisions about deadlines."""

from __future__ import annotations

__all__ = ["Delay"]

_NEW_PART = 0.1
"""How much the latest of the delays counts; a change is followed within some twenty of them."""

_DEVIATIONS = 4.0
"""Mean deviations above the mean that are allowed for, as in RFC 6298: nearly every delay is shorter."""


class Delay:
    """Smoothed mean and mean deviation of delays, as in Jacobson's estimate of round trips (SIGCOMM 1988).

    No input or output here.
    """

    __slots__ = ("_deviation_s", "_mean_s")

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._deviation_s = 0.0

    @property
    def expected_s(self) -> float:
        """The delay to allow for, seconds, at least 0."""
        return self._mean_s + _DEVIATIONS * self._deviation_s

    def note(self, found_s: float, *, most_s: float) -> None:
        """Take in a delay; one above ``most_s`` is an accident, and counts as that."""
        error_s = min(max(found_s, 0.0), most_s) - self._mean_s
        self._mean_s += _NEW_PART * error_s
        self._deviation_s += _NEW_PART * (abs(error_s) - self._deviation_s)

    def doubt(self) -> None:
        """Allow for a little less: something was given up for this delay, so it will not be seen whether it holds."""
        self._mean_s *= 1.0 - _NEW_PART
        self._deviation_s *= 1.0 - _NEW_PART
