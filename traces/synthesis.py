"""Arrivals that nobody recorded: counts expanded to requests, and load made from scratch.

Everything takes a seed or a numpy Generator and gives the same requests for the same seed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from plans.errors import Fault, InvalidInput
from traces.table import RateTrace, RequestTrace

__all__ = ["Diurnal", "Expansion", "Gamma", "Load", "Poisson", "Streams", "expand", "synthesise"]

Floats = npt.NDArray[np.float64]

Expansion = Literal["uniform", "poisson", "gamma", "even"]
"""How `expand` places requests in their window."""

_MAX_REQUESTS = 500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent requests at a constant rate."""

    rate_rps: float

    def __post_init__(self) -> None:
        _check(self, rate_rps=self.rate_rps)

    def arrivals(self, duration_s: float, generator: np.random.Generator) -> Floats:
        """Return sorted arrival times in [0, ``duration_s``)."""
        return _poisson(self.rate_rps, duration_s, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """A renewal process whose gaps are gamma distributed with mean 1/rate and coefficient of variation ``cv``.

    ``cv`` 1 is a Poisson process, above 1 bursts, below 1 is steadier; 0 is evenly spaced. The shape of the gaps is
    1/cv². Time 0 is nothing special: the wait for the first request is the residual of a length-biased gap, so that the
    process is stationary (Cox, Renewal Theory, 1962, section 5.2).
    """

    rate_rps: float
    cv: float

    def __post_init__(self) -> None:
        _check(self, rate_rps=self.rate_rps, cv=self.cv)

    def arrivals(self, duration_s: float, generator: np.random.Generator) -> Floats:
        """Return sorted arrival times in [0, ``duration_s``)."""
        if self.rate_rps == 0:
            return np.zeros(0)
        gap_s = 1 / self.rate_rps
        draw = max(16, math.ceil(1.1 * duration_s * self.rate_rps))
        clock_s = generator.random() * _length_biased_gap(self.cv, generator) * gap_s
        parts = [np.array([clock_s])]
        while clock_s < duration_s:
            parts.append(clock_s + np.cumsum(_gamma_gaps(self.cv, draw, generator)) * gap_s)
            clock_s = float(parts[-1][-1])
        times_s = np.concatenate(parts)
        return times_s[times_s < duration_s]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diurnal:
    """A Poisson process whose rate follows a sine and wobbles.

    The rate is ``mean_rps * (1 + amplitude_ratio * sin(2 pi (t + phase_s) / period_s)) * w``, where ``w`` is lognormal
    with mean 1 and standard deviation of its logarithm ``noise``, drawn anew every ``noise_window_s``. Sampled by
    thinning (Lewis and Shedler, 1979).
    """

    mean_rps: float
    amplitude_ratio: float = 0.5
    period_s: float = 86400.0
    phase_s: float = 0.0
    noise: float = 0.0
    noise_window_s: float = 60.0

    def __post_init__(self) -> None:
        _check(
            self,
            positive=("period_s", "noise_window_s"),
            mean_rps=self.mean_rps,
            amplitude_ratio=self.amplitude_ratio,
            period_s=self.period_s,
            phase_s=abs(self.phase_s),
            noise=self.noise,
            noise_window_s=self.noise_window_s,
        )
        if self.amplitude_ratio > 1:
            raise InvalidInput.of("at most 1", field="amplitude_ratio", found=self.amplitude_ratio)

    def rate_rps(self, time_s: Floats) -> Floats:
        """Return the rate without its noise at each time, requests per second."""
        wave = np.sin(2 * np.pi * (time_s + self.phase_s) / self.period_s)
        return np.asarray(self.mean_rps * (1 + self.amplitude_ratio * wave), dtype=np.float64)

    def arrivals(self, duration_s: float, generator: np.random.Generator) -> Floats:
        """Return sorted arrival times in [0, ``duration_s``)."""
        windows = max(1, math.ceil(duration_s / self.noise_window_s))
        wobble = generator.lognormal(-(self.noise**2) / 2, self.noise, windows)
        ceiling_rps = self.mean_rps * (1 + self.amplitude_ratio) * float(wobble.max())
        times_s = _poisson(ceiling_rps, duration_s, generator)
        window = np.minimum((times_s / self.noise_window_s).astype(np.int64), windows - 1)
        keep = generator.random(times_s.size) * ceiling_rps < self.rate_rps(times_s) * wobble[window]
        return times_s[keep]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """``streams`` cameras that each send ``fps`` frames a second.

    Each has a random phase, and each frame comes up to ``jitter_s`` before or after its time, uniformly.
    """

    streams: int
    fps: float
    jitter_s: float = 0.0

    def __post_init__(self) -> None:
        _check(self, positive=("fps",), streams=self.streams, fps=self.fps, jitter_s=self.jitter_s)

    def frames(self, duration_s: float, generator: np.random.Generator) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Return arrival times in [0, ``duration_s``) and the number of each one's stream, in any order."""
        period_s = 1 / self.fps
        per_stream = math.ceil(duration_s * self.fps)
        _check_size(per_stream * self.streams)
        phase_s = generator.random((self.streams, 1)) * period_s
        due_s = phase_s + np.arange(per_stream) * period_s
        shift_s = generator.uniform(-self.jitter_s, self.jitter_s, due_s.shape)
        # A frame keeps its place in [0, duration): what jitter pushes over an edge is reflected.
        times_s = np.abs(due_s + shift_s)
        times_s = np.where(times_s >= duration_s, 2 * duration_s - times_s, times_s)
        keep = (due_s < duration_s) & (times_s >= 0) & (times_s < duration_s)
        stream = np.broadcast_to(np.arange(self.streams)[:, None], due_s.shape)
        return times_s[keep], stream[keep]


Load = Poisson | Gamma | Diurnal | Streams
"""What one service is asked for."""


def synthesise(loads: Mapping[str, Load], *, duration_s: float, seed: int) -> RequestTrace:
    """Return a trace of ``duration_s`` in which each service gets its load.

    A service's arrivals depend on the seed, its name and its load alone, not on the other services.

    Raises:
        InvalidInput: The duration is not positive, a service's name is none, or there would be too many requests.
    """
    if not 0 < duration_s < math.inf:
        raise InvalidInput.of("a positive, finite number of seconds", field="duration_s", found=duration_s)
    parts = []
    for service, load in sorted(loads.items()):
        generator = np.random.default_rng([seed, zlib.crc32(service.encode())])
        if isinstance(load, Streams):
            times_s, stream = load.frames(duration_s, generator)
            columns = {"arrival_s": times_s, "stream": np.char.add(f"{service}-", stream.astype(str))}
        else:
            columns = {"arrival_s": load.arrivals(duration_s, generator)}
        frame = pd.DataFrame(columns)
        frame.insert(1, "service", pd.Series([service] * len(frame), dtype="str"))
        parts.append(RequestTrace.sorting(frame, duration_s=duration_s))
    if not parts:
        return RequestTrace(pd.DataFrame({"arrival_s": [], "service": []}), duration_s=duration_s)
    return RequestTrace.merge(parts)


def expand(
    rates: RateTrace, process: Expansion = "uniform", *, seed: int | np.random.Generator, cv: float | None = None
) -> RequestTrace:
    """Expand counts per window to single arrivals, each within its own window.

    Processes:
        uniform: each of a window's requests at a uniform time: a Poisson process, given its count.
        even: evenly spaced, the first half a gap after the window's start.
        gamma: gaps within a window drawn from a gamma distribution with coefficient of variation ``cv`` and stretched
            to fill it. Windows with few requests come out less bursty than ``cv``, since that ties them together.
        poisson: the count is taken as the mean of a Poisson draw, then as uniform. The only one that does not conserve
            the counts.

    Args:
        rates: Counts per window.
        process: One of the above.
        seed: Seed or generator.
        cv: For gamma alone: coefficient of variation of the gaps, > 0.

    Returns:
        A trace on the clock of ``rates`` that lasts to the end of the last window.

    Raises:
        InvalidInput: The process is unknown, or ``cv`` is missing or superfluous.
    """
    if process not in ("uniform", "poisson", "gamma", "even"):
        raise InvalidInput.of("uniform, poisson, gamma or even", field="process", found=repr(process))
    if (process == "gamma") != (cv is not None) or (cv is not None and not 0 < cv < math.inf):
        raise InvalidInput.of("a positive, finite number with gamma, nothing otherwise", field="cv", found=cv)
    generator = np.random.default_rng(seed)
    frame = rates.frame
    counts = frame["count"].to_numpy()
    if process == "poisson":
        counts = generator.poisson(counts)
    _check_size(int(counts.sum()))
    if cv is not None:
        place = _gamma_places(counts, cv, generator)
    elif process == "even":
        place = (_ranks(counts) + 0.5) / np.repeat(counts, counts)
    else:
        place = generator.random(int(counts.sum()))
    starts_s = frame["window_start_s"].to_numpy()
    ends_s = rates.start_s + (np.round((starts_s - rates.start_s) / rates.window_s) + 1) * rates.window_s
    first_s, end_s = np.repeat(starts_s, counts), np.repeat(np.minimum(ends_s, starts_s + rates.window_s), counts)
    arrival_s = np.minimum(first_s + place * rates.window_s, np.nextafter(end_s, -np.inf))
    service = np.repeat(np.array(rates.services, dtype=object)[rates.codes], counts) if len(rates) else np.zeros(0, "O")
    requests = pd.DataFrame({"arrival_s": arrival_s, "service": pd.Series(service, dtype="str")})
    return RequestTrace.sorting(requests, duration_s=rates.end_s)


def _poisson(rate_rps: float, duration_s: float, generator: np.random.Generator) -> Floats:
    """Draw the number of requests, then their places: given its count, a Poisson process is uniform."""
    _check_size(rate_rps * duration_s)
    times_s = generator.random(generator.poisson(rate_rps * duration_s)) * duration_s
    times_s.sort()
    return times_s[times_s < duration_s]


def _gamma_gaps(cv: float, size: int, generator: np.random.Generator) -> Floats:
    """Draw gaps with mean 1 and coefficient of variation ``cv``, shape (size,)."""
    _check_size(size)
    if cv == 0:
        return np.ones(size)
    shape = 1 / cv**2
    return generator.gamma(shape, 1 / shape, size)


def _length_biased_gap(cv: float, generator: np.random.Generator) -> float:
    """Draw the gap that holds a given instant: of shape 1/cv² + 1, and the scale of the others."""
    return 1.0 if cv == 0 else float(generator.gamma(1 / cv**2 + 1, cv**2))


def _gamma_places(counts: npt.NDArray[np.int64], cv: float, generator: np.random.Generator) -> Floats:
    """Return the place of each request in its window, in [0, 1): n requests cut it into n + 1 gamma gaps."""
    gaps = _gamma_gaps(cv, int(counts.sum()) + counts.size, generator) + np.finfo(float).tiny
    last = np.cumsum(counts + 1) - 1
    upto = np.cumsum(gaps)
    before = np.repeat(np.r_[0.0, upto[last[:-1]]] if counts.size else np.zeros(0), counts)
    total = np.add.reduceat(gaps, np.r_[0, last[:-1] + 1]) if counts.size else np.zeros(0)
    inner = np.ones(gaps.size, dtype=bool)
    inner[last] = False
    place = (upto[inner] - before) / np.repeat(total, counts)
    return np.asarray(np.clip(place, 0.0, np.nextafter(1.0, 0.0)), dtype=np.float64)


def _ranks(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0, 1, …, n - 1 for each count n, one after the other."""
    first = np.cumsum(counts) - counts
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(first, counts)


def _check(load: object, *, positive: tuple[str, ...] = (), **values: float) -> None:
    faults = [
        Fault(
            field=f"{type(load).__name__.lower()}.{name}",
            found=str(value),
            expected="a positive, finite number" if name in positive else "a finite number, not negative",
        )
        for name, value in values.items()
        if not (math.isfinite(value) and (value > 0 if name in positive else value >= 0))
    ]
    if faults:
        raise InvalidInput(faults)


def _check_size(requests: float) -> None:
    if requests > _MAX_REQUESTS:
        raise InvalidInput.of(
            f"at most {_MAX_REQUESTS} requests", found=f"{requests:.0f}", remedy="lower the rate or the duration"
        )
