"""The two tables that everything about load works on: requests one by one, and counts per window.

Both are frozen and are checked once, when they are made; whoever holds one can rely on its columns, types and order.
Every method returns a new table. This module holds `RequestTrace`; `RateTrace` is `traces.rates`'.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from plans.errors import Fault, InvalidInput
from traces.checks import check_dense, check_factor, check_known, check_window, check_window_length, checked, stacked
from traces.columns import REQUEST_COLUMNS
from traces.rates import RateTrace

__all__ = ["RateTrace", "RequestTrace"]


@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class RequestTrace:
    """Requests in order of arrival.

    Columns of ``frame``: ``arrival_s`` (float64, sorted, finite, >= 0), ``service`` (str), and optionally ``stream``
    (str or missing), ``size_bytes``, ``input_tokens``, ``output_tokens`` (Int64, >= 0 or missing).

    Args:
        frame: The table; copied. Its index is ignored.
        duration_s: The time that the trace covers, from 0; it may end with silence. The last arrival when left out.

    Raises:
        InvalidInput: Columns, cells, the order or the duration are wrong; all faults at once.
    """

    _frame: pd.DataFrame
    services: tuple[str, ...]
    """Names of the services present, sorted."""
    codes: npt.NDArray[np.int64]
    """For each request the index of its service in ``services``; read-only."""
    duration_s: float
    """The time that the trace covers, from 0, in seconds; never before the last arrival."""

    def __init__(self, frame: pd.DataFrame, *, duration_s: float | None = None) -> None:
        table = checked(frame, REQUEST_COLUMNS)
        arrival_s = table["arrival_s"].to_numpy()
        if (fault := _order_fault(arrival_s)) is not None:
            raise InvalidInput([fault])
        last_s = float(arrival_s[-1]) if arrival_s.size else 0.0
        if duration_s is not None and not (math.isfinite(duration_s) and duration_s >= last_s):
            raise InvalidInput.of(
                f"a finite time not before the last arrival ({last_s} s)", field="duration_s", found=duration_s
            )
        codes, services = pd.factorize(table["service"], sort=True)
        codes.flags.writeable = False
        object.__setattr__(self, "_frame", table)
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "services", tuple(map(str, services)))
        object.__setattr__(self, "duration_s", last_s if duration_s is None else float(duration_s))

    @classmethod
    def sorting(cls, frame: pd.DataFrame, *, duration_s: float | None = None) -> RequestTrace:
        """Return the trace of the rows of ``frame``, which may be in any order; equal times keep theirs.

        Raises:
            InvalidInput: As for the class.
        """
        table = checked(frame, REQUEST_COLUMNS)
        return cls(table.sort_values("arrival_s", kind="stable", ignore_index=True), duration_s=duration_s)

    @property
    def frame(self) -> pd.DataFrame:
        """The table; a shallow copy, so that adding or replacing columns does not touch the trace."""
        return self._frame.copy(deep=False)

    @property
    def arrival_s(self) -> npt.NDArray[np.float64]:
        """Arrival times, shape (request,), sorted; read-only."""
        values: npt.NDArray[np.float64] = self._frame["arrival_s"].to_numpy().view()
        values.flags.writeable = False
        return values

    def numbers(self, column: str) -> npt.NDArray[np.float64]:
        """Return an optional numeric column, shape (request,), with NaN where it says nothing or does not exist."""
        if column not in self._frame:
            return np.full(len(self), np.nan)
        return self._frame[column].to_numpy(dtype=np.float64, na_value=np.nan)

    def __len__(self) -> int:
        return len(self._frame)

    def __repr__(self) -> str:
        return f"RequestTrace({len(self)} requests, {len(self.services)} services, {self.duration_s:g} s)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RequestTrace):
            return NotImplemented
        return self.duration_s == other.duration_s and self._frame.equals(other._frame)

    __hash__ = None  # type: ignore[assignment]  # compared by content, too large to hash

    @property
    def digest(self) -> str:
        """Identify the content: ``sha256:…`` over every row and the duration."""
        rows = pd.util.hash_pandas_object(self._frame, index=False).to_numpy()
        text = f"{list(self._frame.columns)} {len(self)} {self.duration_s!r}"
        return f"sha256:{hashlib.sha256(rows.tobytes() + text.encode()).hexdigest()}"

    def window(self, start_s: float, end_s: float, *, rebase: bool = True) -> RequestTrace:
        """Return the requests with ``start_s <= arrival_s < end_s``.

        The result covers the whole window, even where that reaches beyond this trace.

        Args:
            start_s: Start of the window, seconds, >= 0.
            end_s: End of the window, seconds, excluded.
            rebase: Whether the window's start becomes time 0.

        Raises:
            InvalidInput: The window is empty or starts before 0.
        """
        check_window(start_s, end_s)
        first, last = np.searchsorted(self.arrival_s, [start_s, end_s], side="left")
        part = self._frame.iloc[first:last]
        if not rebase:
            return RequestTrace(part, duration_s=end_s)
        shifted = np.minimum(part["arrival_s"].to_numpy() - start_s, end_s - start_s)
        return RequestTrace(part.assign(arrival_s=shifted), duration_s=end_s - start_s)

    def select(self, services: Iterable[str]) -> RequestTrace:
        """Return the requests of ``services`` alone; the duration stays.

        Raises:
            InvalidInput: A service is not in the trace.
        """
        wanted = tuple(services)
        check_known(wanted, self.services)
        keep = np.isin(self.codes, [self.services.index(name) for name in wanted])
        return RequestTrace(self._frame[keep], duration_s=self.duration_s)

    def rename(self, names: Mapping[str, str]) -> RequestTrace:
        """Return the trace with services renamed; two that get one name become one service.

        Raises:
            InvalidInput: A key is not in the trace, or a new name is no service name.
        """
        check_known(names, self.services)
        renamed = np.array([names.get(name, name) for name in self.services], dtype=object)
        service = pd.Series(renamed[self.codes] if len(self) else [], dtype="str")
        return RequestTrace(self._frame.assign(service=service), duration_s=self.duration_s)

    def scaled(self, rate_factor: float, seed: int | np.random.Generator) -> RequestTrace:
        """Return the trace at ``rate_factor`` times its rate, over the same time.

        Every request is kept ``floor(rate_factor)`` times, and once more with the probability that remains. A copy
        lands uniformly between its original and the next request of the same service (or the trace's end), so that
        the shape of the load over time stays; the fine burstiness within such a gap does not.

        Args:
            rate_factor: Factor on the rate, finite, >= 0.
            seed: Seed or generator.

        Raises:
            InvalidInput: The factor is negative or not finite.
        """
        check_factor(rate_factor)
        generator = np.random.default_rng(seed)
        arrival_s = self.arrival_s
        whole = math.floor(rate_factor)
        copies = whole + (generator.random(len(self)) < rate_factor - whole)
        index = np.repeat(np.arange(len(self)), copies)
        first = np.r_[True, index[1:] != index[:-1]] if index.size else np.zeros(0, dtype=bool)
        gap_s = self._gap_to_next_s()[index]
        shift_s = np.where(first, 0.0, generator.random(index.size) * gap_s)
        moved_s = np.minimum(arrival_s[index] + shift_s, self.duration_s)
        frame = self._frame.take(index).assign(arrival_s=moved_s)
        return RequestTrace.sorting(frame, duration_s=self.duration_s)

    def _gap_to_next_s(self) -> npt.NDArray[np.float64]:
        next_s = pd.Series(self.arrival_s).groupby(self.codes).shift(-1).fillna(self.duration_s)
        return next_s.to_numpy() - self.arrival_s

    def rates(self, window_s: float, *, start_s: float = 0.0) -> RateTrace:
        """Return the requests counted per service and window of ``window_s``, windows without requests included.

        The windows start at ``start_s`` and cover the whole duration; every request from ``start_s`` on is counted
        exactly once.

        Raises:
            InvalidInput: ``window_s`` is not positive, the start is negative, or there would be too many windows.
        """
        check_window_length(window_s)
        check_window(start_s, start_s + window_s)
        last_s = float(self.arrival_s[-1]) if len(self) else start_s
        span_s = self.duration_s - start_s
        windows = max(math.ceil(span_s / window_s - 1e-9), math.floor((last_s - start_s) / window_s) + 1, 1)
        check_dense(windows, len(self.services))
        edges_s = start_s + np.arange(windows + 1) * window_s
        if last_s >= edges_s[-1]:  # rounding of the last edge must not lose a request
            edges_s = start_s + np.arange(windows + 2) * window_s
        starts_s = edges_s[:-1]
        window = np.searchsorted(edges_s, self.arrival_s, side="right") - 1
        inside = window >= 0
        shape = (len(starts_s), len(self.services))
        cells = window[inside] * shape[1] + self.codes[inside]
        counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
        return RateTrace.from_counts(starts_s, self.services, counts.T, window_s=window_s)

    @staticmethod
    def merge(traces: Iterable[RequestTrace]) -> RequestTrace:
        """Return all requests of ``traces`` on one clock, covering the longest of their durations."""
        parts = list(traces)
        if not parts:
            return RequestTrace(pd.DataFrame({"arrival_s": [], "service": []}))
        frame = stacked([part._frame for part in parts])
        return RequestTrace.sorting(frame, duration_s=max(part.duration_s for part in parts))

    @staticmethod
    def concat(traces: Iterable[RequestTrace]) -> RequestTrace:
        """Return ``traces`` one after the other: each starts where the one before ends."""
        offset_s = 0.0
        shifted = []
        for trace in traces:
            end_s = offset_s + trace.duration_s
            frame = trace._frame.assign(arrival_s=np.minimum(trace.arrival_s + offset_s, end_s))
            shifted.append(RequestTrace(frame, duration_s=end_s))
            offset_s = end_s
        return RequestTrace.merge(shifted)


def _order_fault(arrival_s: npt.NDArray[np.float64]) -> Fault | None:
    falls = np.flatnonzero(np.diff(arrival_s) < 0)
    if not falls.size:
        return None
    row = int(falls[0]) + 1
    return Fault(
        field=f"arrival_s[{row}]",
        found=f"{arrival_s[row]} after {arrival_s[row - 1]}",
        expected="arrivals in order",
        remedy="sort the table by arrival_s",
    )
