"""A batch on its way through the worker of a group: its inputs into shared memory, its outputs back to its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from executor.segment import aligned, place_all
from executor.state import ReplicaKey
from executor.whole_requests import Answer, Pending
from executor.worker_link import WorkerLink
from executor.worker_wire import Done, FromWorker, Loaded, TensorPlace

__all__ = ["Batch", "Regions", "deliver"]


@dataclass(slots=True, eq=False)
class Batch:
    """What holds a device: a batch, or the sequences of an iteration, which have no ``pending``.

    Attributes:
        key: The replica.
        pending: Its requests.
        items: Items in all of them.
        started_s: When it was sent, on the clock.
        expected_free_s: When the device, or the first stage of a pipeline, should be free again.
        input_s: How long it took from its start until its inputs were where the worker reads them.
    """

    key: ReplicaKey
    pending: list[Pending]
    items: int
    started_s: float
    expected_free_s: float
    input_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tensors of a batch of a model, as it was loaded, lie."""

    loaded: Loaded
    inputs: tuple[TensorPlace, ...]
    output_offset_bytes: int
    output_bytes: int


@dataclass(slots=True)
class _Region:
    """A place in the shared memory, and what lies where in it, by variant and items."""

    offset_bytes: int = 0
    size_bytes: int = 0
    layouts: dict[tuple[str, int], _Layout] = field(default_factory=dict)

    def layout(self, link: WorkerLink, loaded: Loaded, variant: str, items: int) -> _Layout:
        """Return the layout of a batch; the region moves to the end of a larger segment when it is too small."""
        known = self.layouts.get((variant, items))
        if known is not None and known.loaded is loaded:
            return known
        input_bytes = sum(aligned(items * spec.item_bytes) for spec in loaded.inputs)
        output_bytes = sum(aligned(items * spec.item_bytes) for spec in loaded.outputs)
        if input_bytes + output_bytes > self.size_bytes:
            offset_bytes = aligned(link.segment.size_bytes)
            size_bytes = max(input_bytes + output_bytes, 2 * self.size_bytes)
            link.segment.grow(offset_bytes + size_bytes)
            self.offset_bytes, self.size_bytes = offset_bytes, size_bytes
            self.layouts.clear()
        inputs = {spec.name: (spec.datatype, (items, *spec.shape)) for spec in loaded.inputs}
        layout = _Layout(loaded, place_all(inputs, self.offset_bytes), self.offset_bytes + input_bytes, output_bytes)
        self.layouts[variant, items] = layout
        return layout


class Regions:
    """Places in the shared memory of a new worker, which batches take in turn.

    Args:
        gpus: Devices of the group. There is a place for each batch that a pipeline over all of them holds, and one
            more: the next batch starts before the answers of the last one are taken out.
    """

    def __init__(self, gpus: int) -> None:
        self._regions = tuple(_Region() for _ in range(gpus + 1))
        self._turn = 0

    def send(
        self, link: WorkerLink, loaded: Loaded, batch: Batch, on_freed: Callable[[], None]
    ) -> asyncio.Future[FromWorker]:
        """Copy the inputs of ``batch`` and have it run; ``on_freed`` is called when it has left the first stage.

        Raises:
            OSError: There is no memory.
            ValueError: An input is not as its model says.
        """
        turn = (self._turn + 1) % len(self._regions)
        layout = self._regions[turn].layout(link, loaded, batch.key.variant, batch.items)
        parts = {place.name: [one.inputs[place.name] for one in batch.pending] for place in layout.inputs}
        link.segment.write(parts, layout.inputs)
        self._turn = turn  # only now: a batch that was not sent leaves the place free, and the next one holds answers
        return link.run(batch.key.variant, layout.inputs, layout.output_offset_bytes, layout.output_bytes, on_freed)


def deliver(batch: Batch, done: Done, link: WorkerLink) -> Iterator[Pending]:
    """Give every request of ``batch`` that still wants it its outputs; yield each that got them.

    Raises:
        OSError: The memory cannot be read.
        ValueError: An output is not there.
    """
    outputs = {place.name: link.segment.array(place) for place in done.outputs}
    start = 0
    for pending in batch.pending:
        end = start + pending.waiting.items
        if not pending.answer.done():
            pending.answer.set_result(
                Answer(
                    outputs={name: array[start:end].copy() for name, array in outputs.items()},
                    variant=batch.key.variant,
                    batch_items=batch.items,
                    queue_s=batch.started_s - pending.arrived_s,
                    run_s=done.run_s,
                )
            )
            yield pending
        start = end
