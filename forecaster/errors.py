"""What can go wrong in a forecast besides bad input.

::

    ForeplanError
    └── ForecastFailed            a method gave something that is no forecast; it is never replaced by a constant
"""

from __future__ import annotations

from plans.errors import ForeplanError

__all__ = ["ForecastFailed"]


class ForecastFailed(ForeplanError):
    """A forecasting method returned figures that cannot be a forecast."""

    def __init__(self, method: str, problem: str) -> None:
        self.method = method
        self.problem = problem
        super().__init__(f"the method {method} failed: {problem}; choose another --method")
