"""The worker process of one GPU group, and the models in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from executor.errors import WorkerGone, WorkerRefused
from executor.reconcile import GroupView, ModelPhase, ModelView, WorkerPhase
from executor.worker_link import WorkerLink, WorkerSettings
from executor.worker_wire import Loaded

__all__ = ["GroupWorker", "backoff_s"]

_log = logging.getLogger("executor.agent")

_STEADY_S = 30.0
"""A worker that lived this long is not in a circle of crashes."""


def backoff_s(failures: int) -> float:
    """Return the seconds to wait after ``failures`` failures in a row (at least 1): 0.2, 0.4, 0.8, … up to 30."""
    return float(min(30.0, 0.2 * 2.0 ** min(failures - 1, 16)))


@dataclass(slots=True)
class _Model:
    phase: ModelPhase
    max_batch: int
    memory_bytes: tuple[int, ...]
    shape: tuple[int, int] = (1, 1)
    loaded: Loaded | None = None
    problem: str = ""
    failures: int = 0
    not_before_s: float = 0.0


class GroupWorker:
    """Starts, stops and loads; notes failures and when the next try is due.

    Args:
        group: Id of the group.
        gpus: Its devices; the worker owns them all.
        settings: How the worker is started.
        on_lost: Called with the reason when the worker ended by itself; its models are gone then.
        clock: The time in seconds.

    Attributes:
        phase: Where the process is in its life.
        link: The process, while it is ready.
        problem: Why it does not run; empty while it does.
    """

    def __init__(
        self,
        group: str,
        gpus: tuple[int, ...],
        settings: WorkerSettings,
        on_lost: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phase = WorkerPhase.ENDED
        self.link: WorkerLink | None = None
        self.problem = ""
        self._group = group
        self._gpus = gpus
        self._settings = settings
        self._on_lost = on_lost
        self._clock = clock
        self._models: dict[str, _Model] = {}
        self._failures = 0
        self._not_before_s = 0.0
        self._ready_since_s: float | None = None

    def view(self) -> GroupView:
        """Return what `executor.reconcile` must know."""
        return GroupView(
            id=self._group,
            gpus=self._gpus,
            worker=self.phase,
            not_before_s=self._not_before_s,
            models=tuple(
                ModelView(
                    variant=variant,
                    phase=model.phase,
                    max_batch=model.max_batch,
                    memory_bytes=model.memory_bytes,
                    shape=model.shape,
                    not_before_s=model.not_before_s,
                )
                for variant, model in self._models.items()
            ),
        )

    def loaded(self, variant: str) -> Loaded | None:
        """Return what the worker said when it loaded ``variant``, or None when it is not loaded."""
        model = self._models.get(variant)
        return model.loaded if model else None

    def load_problem(self, variant: str) -> str:
        """Return why the last load of ``variant`` failed; empty when it did not."""
        model = self._models.get(variant)
        return model.problem if model else ""

    def retry_now(self, variant: str) -> None:
        """Forget that loads of ``variant`` failed, so that the next try is due at once."""
        model = self._models.get(variant)
        if model is not None and model.phase is ModelPhase.FAILED:
            del self._models[variant]
        elif model is not None:
            model.problem, model.failures, model.not_before_s = "", 0, 0.0

    def begin_start(self) -> None:
        """Note that `start` is about to run."""
        self.phase = WorkerPhase.STARTING

    async def start(self, spare: WorkerLink | None) -> tuple[str, ...]:
        """Take the process ``spare``, or start one; return the variants that it knows.

        Raises:
            WorkerGone: It ended during its start; the next try is not due before a while.
            WorkerRefused: Its runtime could not be made; likewise.
        """
        self.phase = WorkerPhase.STARTING
        try:
            link = spare or await WorkerLink.start(self._settings, self._gpus, self._lost)
        except (WorkerGone, WorkerRefused) as error:
            self._note_failure(str(error))
            raise
        link.on_end = self._lost
        self.link = link
        self.phase = WorkerPhase.READY
        self.problem = ""
        self._ready_since_s = self._clock()
        _log.info("event=worker_ready group=%s worker=%d", self._group, link.process_id)
        return link.variants

    async def stop(self, grace_s: float) -> None:
        """Let the worker finish what runs, and end it."""
        link, self.link = self.link, None
        self.phase = WorkerPhase.STOPPING
        if link is not None:
            await link.stop(grace_s)
        self._models.clear()
        self.phase = WorkerPhase.ENDED

    async def load(
        self,
        variant: str,
        max_batch: int,
        memory_bytes: tuple[int, ...],
        shape: tuple[int, int] = (1, 1),
        *,
        kv_bytes: int = 0,
    ) -> Loaded:
        """Load a model, or load it again for larger batches or in another shape; it goes on running meanwhile.

        With ``kv_bytes`` it generates, where it can, within so much key-value memory.

        Raises:
            WorkerRefused: It could not be loaded; the next try is not due before a while.
            WorkerGone: The worker ended.
        """
        link = self._linked()
        model = self._models.setdefault(variant, _Model(ModelPhase.LOADING, max_batch, memory_bytes, shape))
        before = model.max_batch, model.memory_bytes, model.shape
        model.phase = ModelPhase.LOADING
        model.max_batch, model.memory_bytes, model.shape = max_batch, memory_bytes, shape
        model.problem = ""
        try:
            loaded = await link.load(variant, max_batch, shape, kv_bytes=kv_bytes)
        except WorkerRefused as error:
            model.failures += 1
            model.problem = str(error)
            model.not_before_s = self._clock() + backoff_s(model.failures)
            model.phase = ModelPhase.FAILED
            if model.loaded is not None:
                model.phase = ModelPhase.LOADED
                model.max_batch, model.memory_bytes, model.shape = before
            raise
        model.phase, model.loaded, model.failures = ModelPhase.LOADED, loaded, 0
        return loaded

    def charge(self, variant: str, memory_bytes: tuple[int, ...]) -> None:
        """Note the bytes on each GPU that a loaded model may use from now on."""
        self._models[variant].memory_bytes = memory_bytes

    async def unload(self, variant: str) -> None:
        """Take a model out of the worker.

        Raises:
            WorkerGone: The worker ended.
        """
        model = self._models[variant]
        if model.loaded is not None:
            model.phase = ModelPhase.UNLOADING
            await self._linked().unload(variant)
        self._models.pop(variant, None)

    def _linked(self) -> WorkerLink:
        if self.link is None:
            raise WorkerGone(self.problem or "the worker does not run")
        return self.link

    def _note_failure(self, reason: str) -> None:
        steady = self._ready_since_s is not None and self._clock() - self._ready_since_s > _STEADY_S
        self._failures = 1 if steady else self._failures + 1
        self._ready_since_s = None
        self.phase = WorkerPhase.ENDED
        self.link = None
        self.problem = reason
        self._not_before_s = self._clock() + backoff_s(self._failures)

    def _lost(self, reason: str) -> None:
        _log.error("event=worker_lost group=%s reason=%r", self._group, reason)
        self._note_failure(reason)
        self._models.clear()
        self._on_lost(reason)
