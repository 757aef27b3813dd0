"""``profile run`` and ``profile show``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreplan.cli.command import command
from foreplan.cli.options import ProfilesDir, Seed
from foreplan.cli.output import Output

if TYPE_CHECKING:
    from profiles.document import Profile
    from profiles.profiler import Progress

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    group = typer.Typer(help="Measure models, and look at what was measured.", no_args_is_help=True)
    app.add_typer(group, name="profile")
    command(group, "run")(run)
    command(group, "show")(show)


def run(
    out: Output,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models of the registry or of --model-dir.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the profile documents.")],
    gpu_type: Annotated[str, typer.Option(help="Name of this device's type in cluster.yaml.")] = "cpu",
    device: Annotated[str, typer.Option(help="torch device: cpu, cuda:0, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    threads: Annotated[int, typer.Option(help="CPU threads of one worker.", min=1)] = 1,
    batches: Annotated[str, typer.Option(help="Batches to measure, comma-separated.")] = "1,2,4,8",
    model_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of local models (safetensors).")] = None,
    point_seconds: Annotated[float, typer.Option(help="Most seconds for one batch size.", min=0.05)] = 2.0,
    seed: Seed = 0,
) -> None:
    """Measure latency, memory and load time of models on this machine."""
    from foreplan.measure import Device, measure
    from plans.documents import write_document
    from profiles.profiler import StopRule

    where = Device(gpu_type=gpu_type, device=device, dtype=dtype, threads=threads, model_dir=model_dir, seed=seed)
    grid = _batches(batches)
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with out.progress(f"profiling {len(models)} models", total=len(models)) as step:

        def show_progress(progress: Progress) -> None:
            at = "loading" if progress.batch is None else f"batch {progress.batch}, {progress.samples} samples"
            step.update(len(written) + progress.done_ratio, text=f"{progress.model}: {at}")

        for profile in measure(models, where, grid, StopRule(point_s=point_seconds), progress=show_progress):
            path = output / f"{profile.model}.{profile.gpu_type}.json"
            write_document(path, profile)
            written.append(path)
            _print_profile(out, profile)
    out.result({"profiles": [str(path) for path in written]})
    out.say(f"wrote {len(written)} profiles to {output}")


def _batches(text: str) -> list[int]:
    from plans.errors import InvalidInput

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= 4096 for part in parts):
        raise InvalidInput.of(
            "batches from 1 to 4096, comma-separated", where="command line", field="--batches", found=repr(text)
        )
    return sorted({int(part) for part in parts})


def show(
    out: Output,
    profiles: ProfilesDir,
    model: Annotated[str | None, typer.Argument(help="A model; all when left out.")] = None,
) -> None:
    """Print profiles: latency, throughput and memory by batch."""
    from plans.errors import InvalidInput
    from profiles.library import ProfileLibrary

    library = ProfileLibrary.read(profiles)
    shown = [profile for profile in library if model in (None, profile.model)]
    if not shown:
        known = ", ".join(sorted({profile.model for profile in library}))
        raise InvalidInput.of(f"one of {known}", where=profiles, field="MODEL", found=repr(model))
    out.result([_profile_json(profile) for profile in shown])
    for profile in shown:
        _print_profile(out, profile)


def _profile_json(profile: Profile) -> Any:
    return profile.model_dump(mode="json", by_alias=True)


def _print_profile(out: Output, profile: Profile) -> None:
    from plans.units import format_bytes, format_seconds

    rows = sorted(profile.rows, key=lambda row: row.key)
    first = rows[0]
    load, first_run = format_seconds(first.load_s), format_seconds(first.first_inference_s)
    out.table(
        ["tp", "pp", "batch", "mean (ms)", "p50 (ms)", "p99 (ms)", "requests/s", "peak per GPU", "samples"],
        [
            [
                row.tp,
                row.pp,
                row.batch,
                row.latency_s.mean * 1000,
                None if row.latency_s.p50 is None else row.latency_s.p50 * 1000,
                None if row.latency_s.p99 is None else row.latency_s.p99 * 1000,
                row.batch / row.latency_s.mean,
                format_bytes(max(row.peak_bytes)),
                row.samples,
            ]
            for row in rows
        ],
        title=f"{profile.model} on {profile.gpu_type} ({profile.source}): weights "
        f"{format_bytes(sum(first.weight_bytes))}, load {load}, first inference {first_run}",
    )
