"""Write the sample of examples/azure_sample: two days in the format of the Azure Functions 2019 data set.

The figures are invented here and derived from no data set. They come from ``random.Random(seed).random()`` alone, whose
stream Python keeps the same in all versions, so that anybody gets the same bytes. With ``--check``, compare and write
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

SEED = 20190715
DAYS = 2
MINUTES = 1440
FOLDER = Path(__file__).parents[1] / "examples" / "azure_sample"

Rate = Callable[[int, random.Random], Iterator[float]]
"""From a day (from 0) and a random stream to the mean invocations of each of its minutes."""


def wave(minute: int, peak_minute: int, depth: float) -> float:
    """Return a daily wave with mean 1 that is highest at ``peak_minute``."""
    return 1 + depth * math.cos(2 * math.pi * (minute - peak_minute) / MINUTES)


def office(mean: float, peak_minute: int, depth: float) -> Rate:
    """A daily wave whose level wanders a little."""

    def rates(day: int, stream: random.Random) -> Iterator[float]:
        level = 1.0 + 0.08 * day
        for minute in range(MINUTES):
            level = max(0.6, min(1.6, level + 0.04 * (stream.random() - 0.5)))
            yield mean * level * wave(minute, peak_minute, depth)

    return rates


def bursty(mean: float, factor: float, bursts_per_day: float) -> Rate:
    """A low level with bursts of 2 to 12 minutes that fade out."""

    def rates(day: int, stream: random.Random) -> Iterator[float]:
        left = length = 0
        for minute in range(MINUTES):
            if left == 0 and stream.random() < bursts_per_day / MINUTES:
                left = length = 2 + int(11 * stream.random())
            burst = factor * left / length if left else 0.0
            left = max(0, left - 1)
            yield mean * wave(minute, 900, 0.4) * (1 + burst)

    return rates


def cron(count: float, every: int, width: int, offset: int) -> Rate:
    """A timer: ``count`` invocations in each of ``width`` minutes, every ``every`` minutes."""

    def rates(day: int, stream: random.Random) -> Iterator[float]:
        for minute in range(MINUTES):
            yield count if (minute - offset) % every < width else 0.0

    return rates


FUNCTIONS: tuple[tuple[str, str, str, Rate], ...] = (
    ("shop", "storefront", "http", office(180, 13 * 60, 0.65)),
    ("shop", "checkout", "http", office(70, 20 * 60, 0.8)),
    ("media", "thumbnails", "storage", bursty(30, 9.0, 30)),
    ("media", "transcode", "queue", bursty(12, 5.0, 60)),
    ("city", "cameras", "event", office(110, 17 * 60, 0.3)),
    ("city", "reports", "timer", cron(45, 5, 1, 2)),
    ("bank", "statements", "timer", cron(60, 60, 8, 10)),
    ("bank", "fraud-check", "queue", office(45, 11 * 60, 0.5)),
)
"""Owner, function, trigger and rate of every function."""


def poisson(mean: float, stream: random.Random) -> int:
    """Draw a Poisson count by multiplying uniforms (Knuth), in steps that keep exp() from underflowing."""
    count = 0
    while mean > 0:
        step = min(mean, 50.0)
        mean -= step
        floor, product = math.exp(-step), stream.random()
        while product > floor:
            count += 1
            product *= stream.random()
    return count


def anonymous(kind: str, name: str) -> str:
    """Return a name as the data set has them: 64 hexadecimal digits."""
    return hashlib.sha256(f"foreplan sample {kind} {name}".encode()).hexdigest()


def day_file(day: int) -> str:
    """Return the content of a day's file, ``day`` from 0."""
    lines = [",".join(["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, range(1, MINUTES + 1))])]
    for owner, function, trigger, rates in FUNCTIONS:
        stream = random.Random(f"{SEED} {function} {day}")
        counts = [poisson(rate, stream) for rate in rates(day, stream)]
        key = [anonymous("owner", owner), anonymous("app", owner), anonymous("function", function), trigger]
        lines.append(",".join([*key, *map(str, counts)]))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare with the files that are there; write nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    stale = []
    for day in range(DAYS):
        path = options.folder / f"invocations_per_function_md.anon.d{day + 1:02d}.csv"
        content = day_file(day).encode()
        if not options.check:
            options.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"wrote {path}")
        elif not path.exists() or path.read_bytes() != content:
            stale.append(path)
    for path in stale:
        print(f"{path} is not what this script writes", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
