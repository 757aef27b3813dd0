"""What an interrupted ``profile run`` has measured already, kept beside its output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foreplan.device import Device, processor_name
from plans.documents import FORMAT_VERSION, Document, read_document, write_document
from plans.errors import InvalidInput
from profiles.document import Row
from profiles.group import Grid
from profiles.profiler import StopRule

__all__ = ["RowStore"]


class _Partial(Document):
    format_version: str = FORMAT_VERSION
    settings: str
    rows: tuple[Row, ...] = ()
    finished: str = ""


class RowStore:
    """The rows measured so far, one hidden file per model in the output folder, written atomically after each row.

    It goes when the whole command is done, so that one which was interrupted does not begin with its first model again.

    Rows that were measured with other settings, on another processor, or by a file that cannot be read, count as not
    measured: nothing is lost but time.
    """

    def __init__(self, folder: Path, device: Device, grid: Grid, stop: StopRule) -> None:
        self._folder = folder
        self._gpu_type = device.gpu_type
        self._settings = repr((processor_name(), device, grid.series, stop))
        self._grid = repr(grid)
        self._rows: dict[str, tuple[Row, ...]] = {}

    def rows(self, model: str) -> Sequence[Row]:
        """Return the rows of ``model`` that an earlier run left."""
        if model not in self._rows:
            self._rows[model] = self._read(model).rows
        return self._rows[model]

    def add(self, model: str, row: Row) -> None:
        """Keep one more row."""
        self._rows[model] = (*self.rows(model), row)
        write_document(self._path(model), _Partial(settings=self._settings, rows=self._rows[model]))

    def finish(self, model: str) -> None:
        """Keep that the whole grid of ``model`` is measured, and its profile written."""
        write_document(
            self._path(model), _Partial(settings=self._settings, rows=tuple(self.rows(model)), finished=self._grid)
        )

    def is_finished(self, model: str) -> bool:
        """Return whether an earlier run measured the same grid of ``model`` to its end."""
        return self._read(model).finished == self._grid

    def forget(self, model: str) -> None:
        """Drop what is kept of ``model``."""
        self._rows.pop(model, None)
        self._path(model).unlink(missing_ok=True)

    def _path(self, model: str) -> Path:
        return self._folder / f".{model}.{self._gpu_type}.partial"

    def _read(self, model: str) -> _Partial:
        nothing = _Partial(settings=self._settings)
        if not self._path(model).exists():
            return nothing
        try:
            partial = read_document(self._path(model), _Partial)
        except InvalidInput:
            return nothing
        return partial if partial.settings == self._settings else nothing
