"""Requests counted per service and window: `RateTrace`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from plans.errors import InvalidInput
from traces.checks import (
    check_dense,
    check_factor,
    check_known,
    check_window,
    check_window_length,
    checked,
    row_faults,
    stacked,
)
from traces.columns import RATE_COLUMNS, duplicated_windows, off_grid

__all__ = ["RateTrace"]

_ROUNDING = 1e-12  # relative error of a running sum that may not cost a request


@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class RateTrace:
    """Requests counted per service and window.

    Columns of ``frame``: ``window_start_s`` (float64, finite, >= 0, on one grid of ``window_s``), ``service`` (str),
    ``count`` (int64, >= 0); sorted by window, then service, each pair at most once. A pair that is absent is a *gap*:
    nobody counted there; `counts` fills it with zero.

    Args:
        frame: The table, in any order; copied.
        window_s: Length of every window, seconds.

    Raises:
        InvalidInput: Columns, cells, the grid or the window are wrong, or a pair is there twice; all faults at once.
    """

    _frame: pd.DataFrame
    services: tuple[str, ...]
    """Names of the services present, sorted."""
    codes: npt.NDArray[np.int64]
    """For each row the index of its service in ``services``; read-only."""
    window_s: float
    """Length of every window, seconds."""
    windows: int
    """Number of windows from the first to the last, gaps included."""

    def __init__(self, frame: pd.DataFrame, window_s: float) -> None:
        check_window_length(window_s)
        table = checked(frame, RATE_COLUMNS)
        faults = [
            *row_faults(
                off_grid(table["window_start_s"].to_numpy(), window_s), table, f"a start on the {window_s} s grid"
            ),
            *row_faults(duplicated_windows(table), table, "every service once per window"),
        ]
        if faults:
            raise InvalidInput(faults)
        table = table.sort_values(["window_start_s", "service"], kind="stable", ignore_index=True)
        codes, services = pd.factorize(table["service"], sort=True)
        codes.flags.writeable = False
        object.__setattr__(self, "_frame", table)
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "services", tuple(map(str, services)))
        object.__setattr__(self, "window_s", float(window_s))
        starts_s = table["window_start_s"].to_numpy()
        object.__setattr__(self, "windows", round((starts_s[-1] - starts_s[0]) / window_s) + 1 if starts_s.size else 0)

    @classmethod
    def from_counts(
        cls,
        window_start_s: npt.ArrayLike,
        services: Iterable[str],
        counts: npt.ArrayLike,
        *,
        window_s: float,
    ) -> RateTrace:
        """Return the trace of a matrix of counts.

        Args:
            window_start_s: Shape (window,), seconds.
            services: Names, shape (service,).
            counts: Shape (service, window), requests.
            window_s: Length of every window, seconds.

        Raises:
            InvalidInput: As for the class.
        """
        starts_s = np.asarray(window_start_s, dtype=np.float64)
        names = list(services)
        matrix = np.asarray(counts).reshape(len(names), starts_s.size)
        frame = pd.DataFrame(
            {
                "window_start_s": np.repeat(starts_s, len(names)),
                "service": pd.Series(np.tile(np.array(names, dtype=object), starts_s.size), dtype="str"),
                "count": matrix.T.ravel(),
            }
        )
        return cls(frame, window_s)

    @property
    def frame(self) -> pd.DataFrame:
        """The table; a shallow copy, so that adding or replacing columns does not touch the trace."""
        return self._frame.copy(deep=False)

    @property
    def start_s(self) -> float:
        """Start of the first window, seconds; 0 for an empty trace."""
        return float(self._frame["window_start_s"].iloc[0]) if len(self._frame) else 0.0

    @property
    def end_s(self) -> float:
        """End of the last window, seconds."""
        return self.start_s + self.duration_s

    @property
    def duration_s(self) -> float:
        """The time from the start of the first window to the end of the last, seconds."""
        return self.windows * self.window_s

    @property
    def gaps(self) -> int:
        """Number of (service, window) pairs between the first and the last window that have no row."""
        return self.windows * len(self.services) - len(self._frame)

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the counts, shape (service, window), requests; a gap counts zero.

        Raises:
            InvalidInput: The grid has more than 2e8 cells.
        """
        check_dense(self.windows, len(self.services))
        dense = np.zeros((len(self.services), self.windows), dtype=np.int64)
        dense[self.codes, self._columns()] = self._frame["count"].to_numpy()
        return dense

    def _columns(self) -> npt.NDArray[np.int64]:
        steps = (self._frame["window_start_s"].to_numpy() - self.start_s) / self.window_s
        return np.asarray(np.round(steps), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._frame)

    def __repr__(self) -> str:
        return f"RateTrace({self.windows} windows of {self.window_s:g} s, {len(self.services)} services)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RateTrace):
            return NotImplemented
        return self.window_s == other.window_s and self._frame.equals(other._frame)

    __hash__ = None  # type: ignore[assignment]  # compared by content, too large to hash

    def window(self, start_s: float, end_s: float, *, rebase: bool = True) -> RateTrace:
        """Return the windows that lie wholly within [``start_s``, ``end_s``).

        Args:
            start_s: Start, seconds, >= 0.
            end_s: End, seconds, excluded.
            rebase: Whether ``start_s`` becomes time 0.

        Raises:
            InvalidInput: The range is empty or starts before 0.
        """
        check_window(start_s, end_s)
        tolerance_s = 1e-6 * self.window_s
        starts_s = self._frame["window_start_s"].to_numpy()
        keep = (starts_s >= start_s - tolerance_s) & (starts_s + self.window_s <= end_s + tolerance_s)
        part = self._frame[keep]
        if rebase:
            part = part.assign(window_start_s=np.maximum(part["window_start_s"].to_numpy() - start_s, 0.0))
        return RateTrace(part, self.window_s)

    def select(self, services: Iterable[str]) -> RateTrace:
        """Return the windows of ``services`` alone.

        Raises:
            InvalidInput: A service is not in the trace.
        """
        wanted = tuple(services)
        check_known(wanted, self.services)
        keep = np.isin(self.codes, [self.services.index(name) for name in wanted])
        return RateTrace(self._frame[keep], self.window_s)

    def rename(self, names: Mapping[str, str]) -> RateTrace:
        """Return the trace with services renamed; the counts of two that get one name are added.

        Raises:
            InvalidInput: A key is not in the trace, or a new name is no service name.
        """
        check_known(names, self.services)
        renamed = np.array([names.get(name, name) for name in self.services], dtype=object)
        service = pd.Series(renamed[self.codes] if len(self) else [], dtype="str")
        return RateTrace(_added(self._frame.assign(service=service)), self.window_s)

    def scaled(self, rate_factor: float | Mapping[str, float]) -> RateTrace:
        """Return the trace with counts times ``rate_factor``, rounded so that nothing is lost on the way.

        The rounding error of a window is carried into the service's next one: each count is within one of the exact
        product, and so is each sum from the first window on. There is no randomness.

        Args:
            rate_factor: One factor, or one per service (1 where it names none); finite, >= 0.

        Raises:
            InvalidInput: A factor is negative or not finite, or names a service that is not in the trace.
        """
        factors = (
            dict.fromkeys(self.services, rate_factor) if isinstance(rate_factor, int | float) else dict(rate_factor)
        )
        check_known(factors, self.services)
        for factor in factors.values():
            check_factor(factor)
        factor_of_row = np.array([factors.get(name, 1.0) for name in self.services])[self.codes]
        frame = self._frame
        exact = pd.Series(frame["count"].to_numpy() * factor_of_row)
        total = exact.groupby(self.codes).cumsum()
        upto = pd.Series(np.floor(total + _ROUNDING * np.maximum(total, 1.0)))
        scaled = upto.groupby(self.codes).diff().fillna(upto)
        return RateTrace(frame.assign(count=scaled.to_numpy()), self.window_s)

    def capped(self, peak_rps: float) -> RateTrace:
        """Return the trace with each service scaled down, if need be, until its busiest window is at most ``peak_rps``.

        Raises:
            InvalidInput: Not even one request per window is allowed.
        """
        limit = math.floor(peak_rps * self.window_s + 1e-9) if math.isfinite(peak_rps) else 0
        if limit < 1:
            least_rps = 1 / self.window_s
            raise InvalidInput.of(
                f"a finite rate of at least {least_rps:g} requests/s", field="peak_rps", found=peak_rps
            )
        return self.scaled(self.cap_factors(peak_rps))

    def cap_factors(self, peak_rps: float) -> dict[str, float]:
        """Return the factor by which `capped` scales each service, in (0, 1]."""
        limit = math.floor(peak_rps * self.window_s + 1e-9)
        busiest = pd.Series(self._frame["count"].to_numpy()).groupby(self.codes).max()
        return {name: min(1.0, limit / max(int(busiest.iloc[i]), 1)) for i, name in enumerate(self.services)}

    @staticmethod
    def merge(traces: Iterable[RateTrace]) -> RateTrace:
        """Return the counts of ``traces`` added on one clock.

        Raises:
            InvalidInput: There is no trace, their windows differ in length, or they lie on different grids.
        """
        parts = list(traces)
        lengths = sorted({part.window_s for part in parts})
        if len(lengths) != 1:
            raise InvalidInput.of(
                "rate traces with windows of one length", field="window_s", found=lengths or "no trace"
            )
        return RateTrace(_added(stacked([part._frame for part in parts])), lengths[0])

    @staticmethod
    def concat(traces: Iterable[RateTrace]) -> RateTrace:
        """Return ``traces`` one after the other: each starts where the one before ends.

        Raises:
            InvalidInput: As for `merge`.
        """
        offset_s: float | None = None
        shifted = []
        for trace in traces:
            start_s = trace.start_s if offset_s is None else offset_s
            moved_s = trace._frame["window_start_s"].to_numpy() - trace.start_s + start_s
            shifted.append(RateTrace(trace._frame.assign(window_start_s=moved_s), trace.window_s))
            offset_s = start_s + trace.duration_s
        return RateTrace.merge(shifted)


def _added(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.groupby(["window_start_s", "service"], sort=True)["count"].sum().reset_index()
