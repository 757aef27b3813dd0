"""``profile run``, ``estimate``, ``calibrate`` and ``accuracy``: commands that run models, or count what they would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli import profile_documents
from foreplan.cli.command import command
from foreplan.cli.options import ProfilesDir, Seed
from foreplan.cli.output import Output, Step

if TYPE_CHECKING:
    from foreplan.colocation import Slowdowns
    from foreplan.device import Device
    from foreplan.resume import RowStore
    from profiles.document import Profile, ProfileMeta
    from profiles.group import Series
    from profiles.profiler import Progress
    from profiles.roofline import DeviceRates

__all__ = ["register"]

Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models of the registry or of --model-dir.")]
OutputDir = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the profile documents.")]
GpuTypeName = Annotated[str, typer.Option(help="Name of this device's type in cluster.yaml.")]
DeviceName = Annotated[str, typer.Option(help="torch device: cpu, cuda:0, ...")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Threads = Annotated[int, typer.Option(help="CPU threads of one worker.", min=1)]
InputSize = Annotated[
    str,
    typer.Option(
        "--input-size",
        "--sequence-tokens",
        metavar="N,...",
        help="Sizes of the input, as variants MODEL-N: side of the image in pixels, or tokens of the text.",
    ),
]
ModelDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of local models (safetensors).")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    group = typer.Typer(help="Measure, estimate and import profiles, and look at them.", no_args_is_help=True)
    app.add_typer(group, name="profile")
    command(group, "run")(run)
    command(group, "estimate")(estimate)
    command(group, "calibrate")(calibrate)
    command(group, "accuracy")(accuracy)
    profile_documents.register(group)


def run(
    out: Output,
    models: Models,
    output: OutputDir,
    gpu_type: GpuTypeName = "cpu",
    device: DeviceName = "cpu",
    dtype: Dtype = "fp32",
    threads: Threads = 1,
    tp: Annotated[int, typer.Option(help="Tensor parallelism: devices per stage.", min=1, max=64)] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallelism: stages.", min=1, max=64)] = 1,
    batches: Annotated[
        str | None,
        typer.Option(help="Batches, comma-separated. By default doubled until throughput is flat or memory ends."),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Doubling goes no further.", min=1, max=4096)] = 64,
    refine: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            help="After doubling, measure between batches where a line may be further off than this; 0 for nowhere.",
            min=0,
        ),
    ] = 5.0,
    concurrency: Annotated[
        str, typer.Option(help="Also measure this many copies at once on the device, comma-separated.")
    ] = "",
    pairs: Annotated[bool, typer.Option("--pairs", help="Also measure every two MODELs beside each other.")] = False,
    prompt_tokens: Annotated[
        str, typer.Option(help="Also measure prefill at these prompt lengths, for models that generate.")
    ] = "",
    context_tokens: Annotated[str, typer.Option(help="Also measure decode steps at these lengths of context.")] = "",
    input_size: InputSize = "",
    model_dir: ModelDir = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Run batches by torch.compile.")] = False,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Replay CUDA graphs.")] = False,
    point_seconds: Annotated[float, typer.Option(help="Most seconds for one batch size.", min=0.05)] = 2.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on where an interrupted run stopped.")] = False,
    seed: Seed = 0,
) -> None:
    """Measure latency, memory and load time of models on this machine."""
    from executor.runtime.names import check_names, local_model
    from foreplan.device import Device
    from foreplan.measure import measure
    from foreplan.resume import RowStore
    from profiles.group import Grid
    from profiles.profiler import StopRule

    models = _at_sizes(models, input_size, model_dir)
    where = Device(
        gpu_type=gpu_type,
        device=device,
        dtype=dtype,
        threads=threads,
        model_dir=model_dir,
        seed=seed,
        tp=tp,
        pp=pp,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
    )
    grid = Grid(
        batches=_numbers(batches, "--batches") if batches else None,
        max_batch=max_batch,
        series=_series(prompt_tokens, context_tokens),
    )
    grid = replace(grid, refine_error_ratio=refine / 100) if refine else replace(grid, most_refined=0)
    copies: tuple[int, ...] = _numbers(concurrency, "--concurrency", least=2) if concurrency else ()
    if pairs:
        _check_pairs(models, where)
    stop = StopRule(point_s=point_seconds)
    check_names(models, model_dir)
    if model_dir is not None:
        for model in models:
            if local_model(model, model_dir) is None:
                out.warn(f"{model} is not in {model_dir}: measuring the registry's model of that name")
    profile_documents.make_folder(output)
    store = RowStore(output, where, grid, stop)
    if fresh:
        for model in models:
            store.forget(model)
    done = _finished(models, store, output, gpu_type)
    left = [model for model in models if model not in {profile.model for profile in done}]
    _say_what_is_known(out, [profile.model for profile in done], [model for model in left if store.rows(model)])
    with out.progress(f"profiling {len(left)} models", total=len(models)) as step:
        for measured in measure(
            left,
            where,
            grid,
            stop,
            progress=lambda progress: _show(step, len(done), progress),
            known=store.rows,
            on_row=store.add,
        ):
            profile = _merged(out, output, measured)
            _write(output, profile)
            store.finish(profile.model)
            done.append(profile)
            profile_documents.print_profile(out, profile)
        if copies or pairs:
            done = _add_slowdowns(out, output, done, where, copies, pairs, step)
    for model in models:
        store.forget(model)
    paths = [output / f"{profile.model}.{profile.gpu_type}.json" for profile in done]
    out.result({"profiles": [str(path) for path in paths]})
    out.say(f"wrote {len(paths)} profiles to {output}")


def _say_what_is_known(out: Output, finished: list[str], begun: list[str]) -> None:
    if finished:
        out.note(f"measured already by a run that was interrupted (--fresh forgets it): {', '.join(finished)}")
    if begun:
        out.note(f"going on where an earlier run stopped: {', '.join(begun)}")


def _finished(models: list[str], store: RowStore, output: Path, gpu_type: str) -> list[Profile]:
    """Return the profiles that an interrupted run of the same command has written."""
    from plans.documents import read_document
    from profiles.document import Profile

    paths = [output / f"{model}.{gpu_type}.json" for model in models if store.is_finished(model)]
    return [read_document(path, Profile) for path in paths if path.exists()]


def _check_pairs(models: list[str], where: Device) -> None:
    from plans.errors import InvalidInput

    if len(set(models)) < 2 or len(where.devices) > 1:
        found = ", ".join(models) + (f" over {len(where.devices)} devices" if len(where.devices) > 1 else "")
        raise InvalidInput.of("two models or more, on one device", where="command line", field="--pairs", found=found)


def _series(prompt_tokens: str, context_tokens: str) -> tuple[Series, ...]:
    from profiles.group import Series

    prompts = _numbers(prompt_tokens, "--prompt-tokens", most=2**20) if prompt_tokens else ()
    contexts = _numbers(context_tokens, "--context-tokens", most=2**20) if context_tokens else ()
    prefill = [Series(phase="prefill", input_tokens=count) for count in prompts]
    decode = [Series(phase="decode", input_tokens=count) for count in contexts]
    return (*prefill, *decode) or (Series(),)


def _at_sizes(models: list[str], sizes: str, model_dir: Path | None) -> list[str]:
    """Return ``models``, or each of them at each of ``sizes``; a registered model's own size is the model itself."""
    from executor.runtime.registry import REGISTRY
    from executor.runtime.sizes import sized_name

    models = list(dict.fromkeys(models))
    if not sizes:
        return models
    registered = {model for model in models if model in REGISTRY and not (model_dir and (model_dir / model).is_dir())}
    return [
        model if model in registered and REGISTRY[model].size == size else sized_name(model, size)
        for model in models
        for size in _numbers(sizes, "--input-size")
    ]


def _merged(out: Output, output: Path, profile: Profile) -> Profile:
    """Return ``profile`` with what the document on disk knows of other parallelisms and phases."""
    from plans.documents import read_document
    from profiles.document import Profile
    from profiles.merging import is_same_way, merge_profiles

    path = output / f"{profile.model}.{profile.gpu_type}.json"
    if not path.exists():
        return profile
    old = read_document(path, Profile)
    if not is_same_way(old, profile):
        out.warn(f"{path}: what it held was not measured the same way (source, dtype or options), and is replaced")
    return merge_profiles(old, profile)


def _numbers(text: str, option: str, least: int = 1, most: int = 4096) -> tuple[int, ...]:
    from plans.errors import InvalidInput

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and least <= int(part) <= most for part in parts):
        expected = f"numbers from {least} to {most}, comma-separated"
        raise InvalidInput.of(expected, where="command line", field=option, found=repr(text))
    return tuple(sorted({int(part) for part in parts}))


def _show(step: Step, done: int, progress: Progress) -> None:
    from plans.units import format_seconds

    at = "loading" if progress.batch is None else f"batch {progress.batch}, {progress.samples} samples"
    left = "" if progress.left_s is None else f", at most {format_seconds(progress.left_s)} left"
    step.update(done + progress.done_ratio, text=f"{progress.model}: {at}{left}")


def _write(output: Path, profile: Profile) -> None:
    from plans.documents import write_document

    write_document(output / f"{profile.model}.{profile.gpu_type}.json", profile)


def _add_slowdowns(
    out: Output, output: Path, profiles: list[Profile], where: Device, copies: tuple[int, ...], pairs: bool, step: Step
) -> list[Profile]:
    """Measure co-location and write the profiles again with it."""
    from foreplan.colocation import measure_slowdowns, middle_batch, with_slowdowns

    batches = {profile.model: middle_batch(profile, where) for profile in profiles}
    found = measure_slowdowns(batches, where, copies, pairs=pairs, progress=lambda text: step.update(0, text=text))
    extended = [with_slowdowns(profile, found[profile.model], batches[profile.model], where) for profile in profiles]
    for profile in extended:
        _write(output, profile)
    _print_slowdowns(out, profiles, found, batches)
    for model, slowdowns in found.items():
        for count in (count for count in copies if count not in slowdowns.interference):
            out.warn(f"{model}: {count} copies do not fit on the device together")
        missing = {other for other in found if pairs and other > model} - {n.model for n in slowdowns.neighbours}
        for other in sorted(missing):
            out.warn(f"{model} and {other} do not fit on the device together")
    return extended


def _print_slowdowns(
    out: Output, profiles: list[Profile], found: Mapping[str, Slowdowns], batches: Mapping[str, int]
) -> None:
    from profiles.interference import InterferenceModel

    measured = [
        profile.model_copy(
            update={"interference": found[profile.model].interference, "neighbours": found[profile.model].neighbours}
        )
        for profile in profiles
    ]
    fitted = InterferenceModel.of(measured)
    rows = [
        [profile.model, batches[profile.model], beside, factor, fitted.sensitivity[profile.model]]
        for profile in measured
        for beside, factor in [
            *((f"{count} at once", factor) for count, factor in profile.interference.items()),
            *((f"beside {other.model}", other.factor) for other in profile.neighbours),
        ]
    ]
    title = "Slow-downs" if fitted.error_ratio is None else f"Slow-downs (the fit is off by {fitted.error_ratio:.1%})"
    out.table(["model", "batch", "together", "factor", "sensitivity"], rows, title=title)


def estimate(
    out: Output,
    models: Models,
    output: OutputDir,
    gpu_type: Annotated[str, typer.Option(help="A type of the catalogue, or the one that --rates are of.")] = "cpu",
    rates: Annotated[Path | None, typer.Option(metavar="FILE", help="Rates from `profile calibrate`.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; fp32 on a CPU and fp16 else.")] = None,
    threads: Threads = 1,
    batches: Annotated[str, typer.Option(help="Batches, comma-separated.")] = "1,2,4,8,16,32",
    input_size: InputSize = "",
    model_dir: ModelDir = None,
) -> None:
    """Write profiles of models that nobody measured, from their operations and bytes and the device's rates."""
    from executor.runtime.cost import count_costs
    from executor.runtime.names import check_names
    from profiles.roofline import modelled_profile

    models = _at_sizes(models, input_size, model_dir)
    number = dtype or ("fp32" if gpu_type == "cpu" else "fp16")
    check_names(models, model_dir)
    grid = _numbers(batches, "--batches")
    kind = gpu_type if rates is None else _read_rates(rates).gpu_type
    _check_places([output / f"{model}.{kind}.json" for model in models])
    known = _rates(out, gpu_type, rates, number, threads)
    profile_documents.make_folder(output)
    written = []
    with out.progress(f"counting the operations of {len(models)} models", total=len(models)) as step:
        for position, model in enumerate(models):
            step.update(position, text=model)
            costs = count_costs(model, grid, dtype=known.dtype, model_dir=model_dir)
            profile = modelled_profile(model, known.gpu_type, costs, known, meta=_roofline_meta(known))
            _write(output, profile)
            profile_documents.print_profile(out, profile)
            written.append(str(output / f"{model}.{known.gpu_type}.json"))
    out.warn("these profiles are modelled, not measured: expect latencies within a factor of two, and measure soon")
    out.result({"profiles": written, "rates": known.model_dump(mode="json")})


def _read_rates(path: Path) -> DeviceRates:
    from plans.documents import read_document
    from profiles.roofline import DeviceRates

    return read_document(path, DeviceRates)


def _check_places(paths: list[Path]) -> None:
    """Refuse to estimate what was measured."""
    from plans.documents import read_document
    from profiles.document import Profile
    from profiles.merging import check_trust

    for path in paths:
        if path.exists():
            check_trust(read_document(path, Profile), "modelled")


def _rates(out: Output, gpu_type: str, path: Path | None, dtype: str, threads: int) -> DeviceRates:
    from executor.runtime.cost import measure_rates
    from profiles.roofline import datasheet_rates

    if path is not None:
        return _read_rates(path)
    if gpu_type == "cpu":
        out.note("measuring the rates of this processor")
        return measure_rates(gpu_type, dtype, threads)
    return datasheet_rates(gpu_type, dtype)


def _roofline_meta(rates: DeviceRates) -> ProfileMeta:
    from foreplan import __version__
    from profiles.document import ProfileMeta

    return ProfileMeta(
        device_name=rates.gpu_type,
        dtype=rates.dtype,
        tool_version=__version__,
        options={"method": "roofline", "rates": rates.source},
    )


def calibrate(
    out: Output,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the rates.")],
    gpu_type: GpuTypeName = "cpu",
    dtype: Dtype = "fp32",
    threads: Threads = 1,
) -> None:
    """Measure this processor's rates of arithmetic and memory, for `profile estimate --rates`."""
    from executor.runtime.cost import measure_rates
    from plans.documents import write_document

    rates = measure_rates(gpu_type, dtype, threads)
    write_document(output, rates)
    out.result(rates.model_dump(mode="json"))
    rows = [[kind, rate / 1e9, "GFLOP/s"] for kind, rate in rates.flops_per_s.items()]
    rows += [["memory", rates.bytes_per_s / 1e9, "GB/s"], ["cache", rates.cache_bytes_per_s / 1e9, "GB/s"]]
    rows += [["start of an operation", rates.operation_s * 1e6, "us"]]
    out.table(["", "rate", "unit"], rows, title=f"Rates of {gpu_type} ({dtype}, {threads} threads)")


def accuracy(
    out: Output,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the registry or of --model-dir.")],
    profiles: ProfilesDir,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of images.")] = None,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="CSV with the columns file and label.")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="A function that gets the model and returns (right, all)."),
    ] = None,
    device: DeviceName = "cpu",
    dtype: Dtype = "fp32",
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1)] = 8,
    model_dir: ModelDir = None,
    seed: Seed = 0,
) -> None:
    """Measure how often a model is right, and note it in its profiles."""
    from executor.runtime.torch_runtime import TorchRuntime
    from foreplan.accuracy import LabelledImages, accuracy_by_function, accuracy_on_images, load_function
    from plans.documents import write_document
    from plans.errors import InvalidInput

    by_images = images is not None and labels is not None
    if by_images == (data is not None) or (images is None) != (labels is None):
        raise InvalidInput.of("either --images with --labels, or --data", where="command line")
    files = profile_documents.files_of(profiles, model)
    if not files:
        remedy = f"run `profile run {model} -o {profiles}` first"
        raise InvalidInput.of(f"a profile of {model}", where=profiles, found="none", remedy=remedy)
    runtime = TorchRuntime(device=device, dtype=dtype, threads=threads, model_dir=model_dir, seed=seed)
    loaded = runtime.load(model, batch)
    if data is not None:
        measured = accuracy_by_function(loaded, load_function(data), data)
    else:
        assert images is not None
        assert labels is not None
        listed = LabelledImages.read(images, labels, model_dir / model if model_dir else None)
        with out.progress(f"running {len(listed.labels)} images", total=len(listed.labels)) as step:
            measured = accuracy_on_images(loaded, listed, batch, step.update)
    for path, profile in files.items():
        write_document(path, profile.model_copy(update={"accuracy": measured}))
    out.result(measured.model_dump(mode="json"))
    out.say(f"{model}: {measured.metric} {measured.value:.4f} on {measured.samples} items of {measured.dataset}")
    out.note(f"state it in services.yaml: variants: [{{model: {model}, accuracy: {measured.value:.4f}}}]")
