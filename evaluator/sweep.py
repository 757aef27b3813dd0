"""Many runs at once: in processes on this machine or on Ray, resumable, each result kept as soon as it is there."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from plans.documents import write_text
from plans.errors import InvalidInput
from plans.interrupts import interrupts_held

__all__ = ["SIMULATOR", "Engine", "Job", "code_digest", "key_of", "run_jobs"]

SIMULATOR: Final = ("evaluator", "plans", "profiles", "traces")
"""The packages that the result of a simulation depends on."""

Engine = Literal["processes", "ray"]
"""Where jobs run: in processes here, or on the Ray cluster that the environment names (a local one without any)."""

Result = dict[str, Any]
"""What a job returns: a JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One unit of work.

    Attributes:
        key: What identifies it: the same key means the same result, so the code is part of it (`code_digest`). Used as
            a file name.
        work: A function that other processes can import, called with ``arguments``.
        arguments: Its arguments.
    """

    key: str
    work: Callable[..., Result]
    arguments: tuple[Any, ...]


def key_of(*parts: object) -> str:
    """Return a key for a job that depends on ``parts``, each by its text."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:24]


@functools.cache
def code_digest(*packages: str) -> str:
    """Return what changes with any source or table of ``packages``: results of other code are not taken for theirs.

    Args:
        packages: Names of packages that are installed; those of `SIMULATOR` always count.
    """
    found = hashlib.sha256()
    for name in sorted({*SIMULATOR, *packages}):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"no package {name}")
        folder = Path(spec.origin).parent
        for path in sorted(path for kind in ("*.py", "*.yaml") for path in folder.rglob(kind)):
            found.update(f"{name}/{path.relative_to(folder).as_posix()}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def run_jobs(
    jobs: Sequence[Job],
    *,
    engine: Engine = "processes",
    workers: int = 1,
    kept: Path | None = None,
    done: Callable[[str], None] = lambda key: None,
) -> dict[str, Result]:
    """Run every job and return the results by key.

    Args:
        jobs: What to do; keys are unique.
        engine: Where.
        workers: Jobs at a time; with 1 and processes they run in this process.
        kept: Folder that keeps the results: one JSON file per job, written when it ends. Jobs whose file is there are
            not run again, so that an interrupted sweep goes on where it was.
        done: Called with a job's key when its result is there.

    Raises:
        InvalidInput: Ray is asked for and not installed, ``kept`` is no folder and cannot be made, or a kept file is
            damaged.
    """
    if kept is not None:
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput.of("a folder, or a place for one", where=kept, found=error.strerror) from error
    results: dict[str, Result] = {}
    waiting: list[Job] = []
    for job in jobs:
        found = None if kept is None else _read(kept / f"{job.key}.json")
        if found is None:
            waiting.append(job)
        else:
            results[job.key] = found
            done(job.key)
    for key, result in _run(waiting, engine, workers):
        if kept is not None:
            write_text(kept / f"{key}.json", json.dumps(result) + "\n")
        results[key] = result
        done(key)
    return {job.key: results[job.key] for job in jobs}


def _read(path: Path) -> Result | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        remedy = "delete the file to run the job again"
        raise InvalidInput.of("the result of a job", where=path, found=str(error), remedy=remedy) from error
    if not isinstance(found, dict):
        raise InvalidInput.of("a JSON object", where=path, found=type(found).__name__, remedy="delete the file")
    return found


def _run(jobs: Sequence[Job], engine: Engine, workers: int) -> Iterator[tuple[str, Result]]:
    if not jobs:
        return
    if engine == "ray":
        yield from _run_on_ray(jobs, workers)
    elif workers <= 1:
        for job in jobs:
            yield job.key, job.work(*job.arguments)
    else:
        yield from _run_in_processes(jobs, workers)


def _run_in_processes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, Result]]:
    # Spawned: threads of libraries (OpenMP, gRPC) do not survive a fork.
    pool = ProcessPoolExecutor(max_workers=workers, mp_context=multiprocessing.get_context("spawn"))
    others = set(multiprocessing.active_children())
    try:
        with interrupts_held():  # Ctrl-C is this process's to answer
            futures = {pool.submit(job.work, *job.arguments): job.key for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:  # nobody waits for what still runs
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _run_on_ray(jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, Result]]:
    try:
        import ray
    except ImportError:
        raise InvalidInput.of(
            "the ray extra", where="--engine", found="ray is not installed", remedy="pip install 'foreplan[ray]'"
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        remote = ray.remote(max_retries=2)(_call)
        running: dict[Any, str] = {}
        queue = list(reversed(jobs))
        while queue or running:
            while queue and len(running) < workers:
                job = queue.pop()
                running[remote.remote(job.work, job.arguments)] = job.key
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                yield running.pop(reference), ray.get(reference)
    finally:
        if started:
            ray.shutdown()


def _call(work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    return work(*arguments)
