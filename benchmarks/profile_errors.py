"""How far off is the interpolation? Points are held out of profiles, predicted from the rest, and compared.

Own profiles: six models, among them those of the examples, are measured here at eight batches. Each batch but the first
and the last is predicted from the others; limits: median 3 %, 95th percentile 8 %. The same is shown with every second
batch held out at once, which leaves gaps as wide as those of a grid that doubles.
`--profiles DIR` takes documents that exist in place of measuring. Then Proteus' published table, if `--proteus FILE` or
../shared/data has it: every second batch held out, all of them counted; limit: median 5 %.
MobileNetV2 at 6 batches is timed on the way, process start and model loads included; limit: 60 s.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from foreplan.device import Device, processor_name
from foreplan.measure import measure
from profiles.document import Profile
from profiles.holdout import HeldOut, hold_out, summarise_errors
from profiles.importing import ImportOptions, import_profiles
from profiles.library import ProfileLibrary
from profiles.profiler import StopRule

MODELS = ("mobilenet-v2-0.5", "mobilenet-v2-1.0", "bert-small-16", "segformer-b0", "resnet-18", "vit-tiny")
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
TIMED_MODEL, TIMED_BATCHES, TIMED_LIMIT_S = "mobilenet-v2-1.0", (1, 2, 4, 8, 16, 32), 60.0
PROTEUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "proteus_profiled.csv"


def own_profiles(folder: Path | None) -> list[Profile]:
    """Read the profiles of ``folder``, or measure."""
    if folder is not None:
        return list(ProfileLibrary.read(folder))
    device, stop = Device(gpu_type="cpu"), StopRule(point_s=3.0)
    return list(measure(MODELS, device, BATCHES, stop, progress=lambda progress: None))


def report(name: str, held: Iterable[HeldOut], median: float, p95: float | None) -> bool:
    """Print the errors and return whether they are within the limits."""
    summary = summarise_errors(tuple(held))
    worst = summary.worst
    within = summary.median <= median and (p95 is None or summary.p95 <= p95)
    limits = f"limit {median:.0%}" + (f" and {p95:.0%}" if p95 is not None else "")
    print(
        f"{name}: {summary.points} points, median {summary.median:.2%}, p95 {summary.p95:.2%} ({limits}: "
        f"{'met' if within else 'MISSED'}); worst {worst.error_ratio:.1%} at {worst.model}, batch {worst.row.batch}; "
        f"{summary.covered_ratio:.0%} within the error that the prediction stated"
    )
    return within


def main() -> int:
    """Measure, hold out, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--proteus", type=Path, default=PROTEUS)
    arguments = parser.parse_args()
    print(f"{processor_name()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}")
    met = []
    if arguments.profiles is None:
        start = time.perf_counter()
        stop = StopRule()
        (timed,) = measure((TIMED_MODEL,), Device(gpu_type="cpu"), TIMED_BATCHES, stop, progress=lambda progress: None)
        wall_s = time.perf_counter() - start
        assert [row.batch for row in timed.rows] == list(TIMED_BATCHES)
        met.append(wall_s < TIMED_LIMIT_S)
        verdict = "met" if met[-1] else "MISSED"
        print(f"profiling {TIMED_MODEL} at 6 batches: {wall_s:.1f} s (limit {TIMED_LIMIT_S:.0f} s: {verdict})")
    profiles = own_profiles(arguments.profiles)
    each = {profile.model: hold_out(profile, "each") for profile in profiles}
    for model, points in each.items():
        if points:
            report(f"  {model}", points, 0.03, 0.08)
    met.append(report("own profiles, each batch in turn", [p for points in each.values() for p in points], 0.03, 0.08))
    second = [point for profile in profiles for point in hold_out(profile) if point.inside]
    report("own profiles, every second batch", second, 0.03, 0.08)
    if arguments.proteus.is_file():
        imported = import_profiles("proteus", arguments.proteus, ImportOptions(weight_bytes=10**9))
        assert imported.rows == imported.taken + len(imported.rejected)
        held = [point for profile in imported.profiles for point in hold_out(profile)]
        met.append(report("Proteus, every second batch", held, 0.05, None))
        report("Proteus, those between points", [point for point in held if point.inside], 0.05, None)
    else:
        print(f"Proteus: {arguments.proteus} is not here")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
