"""How far off is the interpolation? Batches that a profile does not hold are predicted from it, and compared.

Own profiles: six models, among them those of the examples, are timed at fourteen batches each, all models and batches
in turn, again and again over some minutes; of each batch the least of the rounds' medians counts, so that what else the
machine does in one round does no harm. From these numbers the profiler's own grid picks its batches (doubled, and
refined where they are not on a line); all others are predicted. Limits: median 3 %, 95th percentile 8 %. The same with
every batch left out in turn, and with every second one at once, is shown beside it.

`--profiles DIR` takes documents that exist in place of measuring. Then Proteus' published table, if `--proteus FILE` or
../shared/data has it: every second batch held out, all of them counted; limit: median 5 %.
MobileNetV2 at 6 batches is timed on the way, process start and model loads included; limit: 60 s.

It runs on one core (`--core`), for about five minutes, and says how busy the machine was.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from executor.runtime.torch_runtime import TorchModel, TorchRuntime
from foreplan.device import Device, processor_name
from foreplan.measure import measure
from profiles.document import LatencyStatistics, Profile, Row
from profiles.group import Grid
from profiles.holdout import HeldOut, hold_out, predict, summarise_errors
from profiles.importing import ImportOptions, import_profiles
from profiles.library import ProfileLibrary
from profiles.profiler import StopRule

MODELS = ("mobilenet-v2-0.5", "mobilenet-v2-1.0", "bert-small-16", "segformer-b0", "resnet-18", "vit-tiny")
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16)
RUNS, RUN_S, LEAST_ROUNDS = 3, 0.05, 3
TIMED_MODEL, TIMED_BATCHES, TIMED_LIMIT_S = "mobilenet-v2-1.0", (1, 2, 4, 8, 16, 32), 60.0
Seconds = dict[int, float]
"""Seconds of one batch, by its items."""

PROTEUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "proteus_profiled.csv"


def medians_s(model: TorchModel, batch: int) -> tuple[float, float]:
    """Return the medians of a few runs after one that does not count, seconds: by the clock, and of the processor."""
    inputs = model.example(batch)
    model.run(inputs)
    wall_s: list[float] = []
    cpu_s: list[float] = []
    start_s = time.perf_counter()
    while len(wall_s) < RUNS or time.perf_counter() - start_s < RUN_S:
        before_s, before_cpu_s = time.perf_counter(), time.process_time()
        model.run(inputs)
        wall_s.append(time.perf_counter() - before_s)
        cpu_s.append(time.process_time() - before_cpu_s)
    return statistics.median(wall_s), statistics.median(cpu_s)


def interleaved_s(models: Sequence[str], budget_s: float) -> tuple[dict[str, Seconds], dict[str, Seconds]]:
    """Return the seconds of every model and batch, by the clock and of the processor.

    They are the least of the medians of several rounds over all models and batches.
    """
    runtime = TorchRuntime()
    loaded = {model: runtime.load(model, max(BATCHES)) for model in models}
    wall_s, cpu_s = ({model: dict.fromkeys(BATCHES, float("inf")) for model in models} for _ in range(2))
    start_s, start_cpu_s, rounds = time.perf_counter(), time.process_time(), 0
    while rounds < LEAST_ROUNDS or (time.perf_counter() - start_s) * (rounds + 1) / rounds < budget_s:
        for model in models:
            for batch in BATCHES:
                for best_s, found_s in zip((wall_s, cpu_s), medians_s(loaded[model], batch), strict=True):
                    best_s[model][batch] = min(best_s[model][batch], found_s)
        rounds += 1
    taken_s = time.perf_counter() - start_s
    share = (time.process_time() - start_cpu_s) / taken_s
    print(
        f"{rounds} rounds in {taken_s:.0f} s; this process had {share:.0%} of its core; load {os.getloadavg()[0]:.1f}"
    )
    return wall_s, cpu_s


def profile_of(model: str, best_s: Mapping[int, float]) -> Profile:
    """Return a profile that knows these latencies."""
    rows = tuple(
        Row(
            batch=batch,
            latency_s=LatencyStatistics(mean=taken_s),
            stage_latency_s=(taken_s,),
            weight_bytes=(1,),
            peak_bytes=(1,),
        )
        for batch, taken_s in best_s.items()
    )
    return Profile(model=model, gpu_type="cpu", source="measured", rows=rows)


def unseen(profile: Profile) -> tuple[HeldOut, ...]:
    """Predict what the profiler would not have measured, from what it would."""
    rows = {row.batch: row for row in profile.rows}
    grid = Grid(max_batch=max(rows))
    seen = {batch: rows.pop(batch) for batch in grid.candidates}
    for _ in range(grid.most_refined):
        batch = grid.refined({batch: row.latency_s.mean for batch, row in seen.items()})
        if batch not in rows:
            break
        seen[batch] = rows.pop(batch)
    return predict(profile, tuple(seen.values()), tuple(rows.values()))


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


def time_a_profile() -> bool:
    """Time what `profile run` does for a standard model, and say whether that is within the limit."""
    start_s = time.perf_counter()
    (timed,) = measure(
        (TIMED_MODEL,), Device(gpu_type="cpu"), TIMED_BATCHES, StopRule(), progress=lambda progress: None
    )
    wall_s = time.perf_counter() - start_s
    assert [row.batch for row in timed.rows] == list(TIMED_BATCHES)
    met = wall_s < TIMED_LIMIT_S
    verdict = "met" if met else "MISSED"
    print(f"profiling {TIMED_MODEL} at 6 batches: {wall_s:.1f} s (limit {TIMED_LIMIT_S:.0f} s: {verdict})")
    return met


def own(folder: Path | None, budget_s: float) -> bool:
    """Report on own profiles; those of ``folder`` with every batch left out in turn."""
    if folder is not None:
        profiles = list(ProfileLibrary.read(folder))
        each = [point for profile in profiles for point in hold_out(profile, "each")]
        return report("own profiles, each batch in turn", each, 0.03, 0.08)
    wall_s, cpu_s = interleaved_s(MODELS, budget_s)
    by_processor = [point for model, best_s in cpu_s.items() for point in unseen(profile_of(model, best_s))]
    profiles = [profile_of(model, best_s) for model, best_s in wall_s.items()]
    points = {profile.model: unseen(profile) for profile in profiles}
    for model, held in points.items():
        report(f"  {model}", held, 0.03, 0.08)
    met = report("own profiles, batches not measured", [p for held in points.values() for p in held], 0.03, 0.08)
    report("the same by processor time, which a busy machine disturbs less", by_processor, 0.03, 0.08)
    each = [point for profile in profiles for point in hold_out(profile, "each")]
    report("own profiles, each batch in turn", each, 0.03, 0.08)
    second = [point for profile in profiles for point in hold_out(profile) if point.inside]
    report("own profiles, every second batch", second, 0.03, 0.08)
    return met


def main() -> int:
    """Measure, hold out, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--proteus", type=Path, default=PROTEUS)
    parser.add_argument("--core", type=int, help="core to run on; by default the last there is")
    parser.add_argument("--seconds", type=float, default=240.0, help="for timing the six models; three rounds at least")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    core = cores[-1] if arguments.core is None else arguments.core
    os.sched_setaffinity(0, {core})
    print(
        f"{processor_name()}, core {core} of {len(cores)}, {datetime.now(UTC):%Y-%m-%d}; load before "
        f"{os.getloadavg()[0]:.1f}"
    )
    met = [time_a_profile()] if arguments.profiles is None else []
    met.append(own(arguments.profiles, arguments.seconds))
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
