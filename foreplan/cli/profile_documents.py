"""``profile show``, ``plot``, ``check``, ``import`` and ``gpu-types``: commands that only read and write documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreplan.cli.command import command
from foreplan.cli.options import ProfilesDir
from foreplan.cli.output import Output

if TYPE_CHECKING:
    from profiles.document import Profile
    from profiles.holdout import ErrorSummary, HeldOut
    from profiles.importing import Imported

__all__ = ["files_of", "make_folder", "print_profile", "register"]

EXIT_ERRORS_TOO_LARGE = 1

ModelName = Annotated[str | None, typer.Argument(help="A model; all when left out.")]


def register(group: typer.Typer) -> None:
    """Add the commands to ``group``."""
    command(group, "show")(show)
    command(group, "plot")(plot)
    command(group, "check")(check)
    command(group, "import")(import_)
    command(group, "gpu-types")(gpu_types)


def show(out: Output, profiles: ProfilesDir, model: ModelName = None) -> None:
    """Print profiles: latency, throughput and memory by batch."""
    shown = _read(profiles, model)
    out.result([profile.model_dump(mode="json", by_alias=True) for profile in shown])
    for profile in shown:
        print_profile(out, profile)


def _read(folder: Path, model: str | None) -> list[Profile]:
    from plans.errors import InvalidInput
    from profiles.library import ProfileLibrary

    library = ProfileLibrary.read(folder)
    shown = [profile for profile in library if model in (None, profile.model)]
    if not shown:
        known = ", ".join(sorted({profile.model for profile in library}))
        raise InvalidInput.of(f"one of {known}", where=folder, field="MODEL", found=repr(model))
    return shown


def files_of(folder: Path, model: str) -> dict[Path, Profile]:
    """Return the profiles of ``model`` in ``folder`` by the file that holds each.

    Raises:
        InvalidInput: As for `ProfileLibrary.read`.
    """
    from plans.documents import read_document
    from profiles.document import Profile
    from profiles.library import ProfileLibrary

    ProfileLibrary.read(folder)  # all faults at once
    paths = sorted(path for path in folder.rglob("*.json") if path.is_file())
    read = {path: read_document(path, Profile) for path in paths}
    return {path: profile for path, profile in read.items() if profile.model == model}


def make_folder(path: Path) -> None:
    """Make the folder ``path`` where there is none.

    Raises:
        InvalidInput: It cannot be made.
    """
    from plans.errors import InvalidInput

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput.of("a folder to write to", where=path, field="--output", found=error.strerror) from error


def print_profile(out: Output, profile: Profile) -> None:
    """Print one profile as a table."""
    from plans.units import format_bytes, format_seconds

    rows = sorted(profile.rows, key=lambda row: row.key)
    first = rows[0]
    load = format_seconds(first.load_s) if first.load_s else "not known"
    first_run = format_seconds(first.first_inference_s) if first.first_inference_s else "not known"
    optional: dict[str, Any] = {
        "phase": lambda row: None if row.phase == "whole" else row.phase,
        "tokens": lambda row: row.input_tokens,
        "out": lambda row: row.output_tokens,
        "at once": lambda row: None if row.concurrency == 1 else row.concurrency,
        "power (W)": lambda row: row.power_w,
    }
    shown = {name: value for name, value in optional.items() if any(value(row) is not None for row in rows)}
    power = {name: shown.pop(name) for name in ("power (W)",) if name in shown}
    columns: dict[str, Any] = {
        **shown,
        "tp": lambda row: row.tp,
        "pp": lambda row: row.pp,
        "batch": lambda row: row.batch,
        "mean (ms)": lambda row: row.latency_s.mean * 1000,
        "p50 (ms)": lambda row: _ms(row.latency_s.p50),
        "p99 (ms)": lambda row: _ms(row.latency_s.p99),
        "requests/s": lambda row: row.batch * row.concurrency / row.latency_s.mean,
        "peak per GPU": lambda row: format_bytes(max(row.peak_bytes)),
        **power,
        "samples": lambda row: row.samples,
    }
    accuracy = "" if profile.accuracy is None else f", {profile.accuracy.metric} {profile.accuracy.value:.4f}"
    out.table(
        list(columns),
        [[value(row) for value in columns.values()] for row in rows],
        title=f"{profile.model} on {profile.gpu_type} ({profile.source}): weights "
        f"{format_bytes(sum(first.weight_bytes))}, load {load}, first inference {first_run}{accuracy}",
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def plot(
    out: Output,
    profiles: ProfilesDir,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write (HTML).")],
    model: ModelName = None,
) -> None:
    """Draw latency, throughput and memory against the batch, with the fit and its band, as one HTML page."""
    from foreplan.profile_plot import profile_page
    from plans.documents import write_text

    shown = _read(profiles, model)
    write_text(output, profile_page(shown))
    out.result({"page": str(output), "profiles": len(shown)})
    out.say(f"wrote {output}")


def check(
    out: Output,
    profiles: ProfilesDir,
    model: ModelName = None,
    hold_out: Annotated[str, typer.Option(help="every-second batch of a series at once, or each in turn.")] = "each",
    max_median: Annotated[float, typer.Option(help="Largest median error that passes, in percent.", min=0)] = 3.0,
    max_p95: Annotated[float, typer.Option(help="Largest 95th percentile that passes, in percent.", min=0)] = 8.0,
) -> None:
    """Hold out measured points, predict them from the rest, and report the error; exit with 1 beyond the limits.

    The limits hold for all points together that lie between points that were seen.
    """
    from plans.errors import InvalidInput
    from profiles.holdout import hold_out as hold_out_points
    from profiles.holdout import summarise_errors

    if hold_out not in ("every-second", "each"):
        expected = "every-second or each"
        raise InvalidInput.of(expected, where="command line", field="--hold-out", found=repr(hold_out))
    shown = _read(profiles, model)
    held = {
        f"{profile.model} on {profile.gpu_type}": hold_out_points(profile, hold_out)  # type: ignore[arg-type]
        for profile in shown
    }
    every = [point for points in held.values() for point in points]
    inside = [point for point in every if point.inside]
    groups = {**{name: summarise_errors(points) for name, points in held.items() if points}}
    total = summarise_errors(inside)
    passed = total.median <= max_median / 100 and total.p95 <= max_p95 / 100
    parts = {"all, between points": total}
    if len(every) > len(inside):
        parts["all, beyond the grid"] = summarise_errors([point for point in every if not point.inside])
    summaries = {**groups, **parts}
    out.result(
        {
            "passed": passed,
            "profiles": [{"name": name, **_summary_json(each)} for name, each in groups.items()],
            "total": [{"name": name, **_summary_json(each)} for name, each in parts.items()],
        }
    )
    out.table(
        ["held out", "points", "median", "p95", "worst", "at", "within the stated error"],
        [
            [
                name,
                each.points,
                f"{each.median:.1%}",
                f"{each.p95:.1%}",
                f"{each.worst.error_ratio:.1%}",
                _place(each.worst),
                f"{each.covered_ratio:.0%}",
            ]
            for name, each in summaries.items()
        ],
    )
    for name in (name for name, points in held.items() if not points):
        out.note(f"{name}: fewer than three batches, nothing to hold out")
    if not passed:
        out.error(f"errors above {max_median:g} % (median) or {max_p95:g} % (p95)")
        raise typer.Exit(EXIT_ERRORS_TOO_LARGE)


def _summary_json(summary: ErrorSummary) -> dict[str, object]:
    return {
        "points": summary.points,
        "median": summary.median,
        "p95": summary.p95,
        "worst": summary.worst.error_ratio,
        "worst_at": _place(summary.worst),
        "covered": summary.covered_ratio,
    }


def _place(point: HeldOut) -> str:
    return f"{point.model} on {point.gpu_type}, batch {point.row.batch}"


def import_(
    out: Output,
    kind: Annotated[str, typer.Argument(metavar="FORMAT", help="One of the formats that `docs/profiles.md` lists.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the other tool wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the profile documents.")],
    model: Annotated[str | None, typer.Option(help="Name of the model; goes before the file's.")] = None,
    gpu_type: Annotated[str | None, typer.Option(help="Name of the GPU type; goes before the file's.")] = None,
    weights: Annotated[str | None, typer.Option(metavar="SIZE", help="Weights per GPU, such as 14GiB.")] = None,
    peak: Annotated[str | None, typer.Option(metavar="SIZE", help="Peak memory per GPU, weights included.")] = None,
    batch: Annotated[int, typer.Option(help="Items per request, where the file does not say.", min=1)] = 1,
    tp: Annotated[int, typer.Option(help="Tensor parallelism, where the file does not say.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallelism, where the file does not say.", min=1)] = 1,
    layers: Annotated[int | None, typer.Option(help="Layers of the model (vidur).", min=1)] = None,
    input_buckets: Annotated[str, typer.Option(help="Prompt tokens of a table's rows (melange).")] = "",
    output_buckets: Annotated[str, typer.Option(help="Answer tokens of its columns (melange).")] = "",
    max_rejected: Annotated[float, typer.Option(help="Most rows that may be rejected, percent.", min=0)] = 50.0,
) -> None:
    """Import profiles that another tool measured; say of every row whether it was taken, and why not.

    Rows are added to those of the same model and GPU type that were imported before.
    """
    from plans.documents import read_document, write_document
    from plans.errors import InvalidInput
    from profiles.document import Profile
    from profiles.importing import ImportOptions, import_profiles
    from profiles.merging import add_rows

    options = ImportOptions(
        model=model,
        gpu_type=gpu_type,
        weight_bytes=_size(weights, "--weights"),
        peak_bytes=_size(peak, "--peak"),
        batch=batch,
        tp=tp,
        pp=pp,
        layers=layers,
        input_buckets=_tokens(input_buckets, "--input-buckets"),
        output_buckets=_tokens(output_buckets, "--output-buckets"),
    )
    imported = import_profiles(kind, file, options)
    if len(imported.rejected) > max_rejected / 100 * imported.rows:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in list(imported.reasons.items())[:5])
        raise InvalidInput.of(
            f"at most {max_rejected:g} % of the rows rejected",
            where=file,
            found=f"{len(imported.rejected)} of {imported.rows}: {reasons}",
            remedy="--max-rejected allows more",
        )
    make_folder(output)
    paths = [output / f"{profile.model}.{profile.gpu_type}.json" for profile in imported.profiles]
    known = [read_document(path, Profile) if path.exists() else None for path in paths]
    joined = [new if old is None else add_rows(old, new) for old, new in zip(known, imported.profiles, strict=True)]
    for path, profile in zip(paths, joined, strict=True):
        write_document(path, profile)
    _report_import(out, imported, paths)


def _report_import(out: Output, imported: Imported, paths: list[Path]) -> None:
    for note in imported.notes:
        out.warn(note)
    for reason, count in imported.reasons.items():
        first = next(each.place for each in imported.rejected if each.reason == reason)
        out.note(f"left out {count} x {reason} (first: {first})")
    out.result(
        {
            "profiles": [str(path) for path in paths],
            "rows": imported.rows,
            "taken": imported.taken,
            "rejected": [{"place": each.place, "reason": each.reason} for each in imported.rejected],
            "notes": list(imported.notes),
        }
    )
    out.say(
        f"read {imported.rows} rows, took {imported.taken}, left out {len(imported.rejected)}; "
        f"wrote {len(paths)} profiles"
    )


def _size(text: str | None, option: str) -> int | None:
    from plans.errors import InvalidInput
    from plans.units import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise InvalidInput.of(str(error), where="command line", field=option, found=repr(text)) from error


def _tokens(text: str, option: str) -> tuple[int, ...]:
    from plans.errors import InvalidInput

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        expected = "numbers of tokens, comma-separated"
        raise InvalidInput.of(expected, where="command line", field=option, found=repr(text))
    return tuple(map(int, parts))


def gpu_types(out: Output) -> None:
    """List the catalogue of GPU types: memory, bandwidth and peak rates from datasheets."""
    from plans.catalogue import catalogue
    from plans.units import format_bytes

    out.result({name: entry.model_dump(mode="json") for name, entry in catalogue().items()})
    out.table(
        ["type", "memory", "GB/s", "fp32 TFLOP/s", "fp16 TFLOP/s", "interconnect GB/s", "W", "source"],
        [
            [
                name,
                format_bytes(entry.memory),
                entry.memory_bandwidth / 1e9,
                entry.flops_per_s["fp32"] / 1e12,
                entry.flops_per_s.get("fp16", 0.0) / 1e12 or None,
                None if entry.interconnect is None else entry.interconnect / 1e9,
                entry.power_w,
                entry.source,
            ]
            for name, entry in catalogue().items()
        ],
    )
