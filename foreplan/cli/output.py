"""What a command says, and where: results on stdout (tables, or one JSON value), everything else on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Output", "Step"]

_UNCUT = 100_000


class Step:
    """A running progress bar; `update` moves it.

    Args:
        progress: The bars.
        task: Which of them it is.
        tell: Told how far it is, now and then; None where nobody is.
        every_s: How often, seconds.
        clock: The time in seconds.
    """

    def __init__(
        self,
        progress: Progress,
        task: Any,
        tell: Callable[[str], None] | None = None,
        *,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._task = task
        self.tell = tell
        self._every_s = every_s
        self._clock = clock
        self._told_s = clock()

    def update(self, done: float, *, total: float | None = None, text: str | None = None) -> None:
        """Set how much is done, and optionally of how much and what is going on."""
        fields: dict[str, Any] = {"completed": done}
        if total is not None:
            fields["total"] = total
        if text is not None:
            fields["description"] = text
        self._progress.update(self._task, **fields)
        if self.tell is not None and self._clock() - self._told_s >= self._every_s:
            self._told_s = self._clock()
            self.tell(f"{done:g} of {total:g}: {text}" if text and total is not None else text or f"{done:g}")


class _Remarks:
    """A stream that takes every text, and loses what the one below cannot write: nothing ends for want of a reader."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Output:
    """Where a command's words go.

    Args:
        as_json: Print one JSON value on stdout and no tables.
        color: Allow colour when the stream is a terminal.
        log_level: The level that the user asked for; None leaves it to the command.
    """

    def __init__(self, *, as_json: bool, color: bool, log_level: str | None = None) -> None:
        self.as_json = as_json
        self.log_level = log_level
        _make_writable()
        piped = not sys.stdout.isatty()
        width = _UNCUT if piped else None  # never cut what a script reads
        self._stdout = Console(no_color=not color, highlight=False, soft_wrap=piped, width=width)
        self._stderr = Console(
            no_color=not color, highlight=False, file=cast(IO[str], _Remarks(sys.stderr)), soft_wrap=True
        )

    def result(self, data: Any) -> None:
        """Print the command's result as JSON, when JSON was asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
            sys.stdout.flush()

    def flush(self) -> None:
        """Push out what was said, for whoever reads the other end of a pipe."""
        sys.stdout.flush()

    def say(self, text: str = "") -> None:
        """Print a line of the human answer; nothing with ``--json``."""
        if not self.as_json:
            self._stdout.print(Text(text))

    def note(self, text: str) -> None:
        """Print a remark on stderr."""
        self._stderr.print(Text(text))

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self._stderr.print(Text.assemble(("warning: ", "yellow"), text))

    def error(self, text: str) -> None:
        """Print an error on stderr."""
        self._stderr.print(Text.assemble(("error: ", "bold red"), text))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
        """Print a table: framed on a terminal, plain columns when piped; nothing with ``--json``.

        One that is too wide for the terminal and has fewer rows than columns is turned: a line for each column.
        """
        if self.as_json:
            return
        cells = [[_cell(value) for value in row] for row in rows]
        table = self._table(columns, cells, title)
        if self._stdout.is_terminal and 0 < len(cells) < len(columns):
            uncut = self._stdout.options.update(max_width=_UNCUT)
            if self._stdout.measure(table, options=uncut).maximum > self._stdout.width:
                head, *turned = [[column, *(row[position] for row in cells)] for position, column in enumerate(columns)]
                table = self._table(head, turned, title)
        self._stdout.print(table)

    def _table(self, columns: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> Table:
        on_terminal = self._stdout.is_terminal
        frame = box.ROUNDED if on_terminal else None
        table = Table(title=title or None, title_justify="left", box=frame, pad_edge=on_terminal)
        for position, column in enumerate(columns):
            numeric = bool(cells) and all(_numeric(row[position]) for row in cells)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=not on_terminal)
        for row in cells:
            table.add_row(*(Text(text) for text in row))
        return table

    @contextmanager
    def progress(self, text: str, total: float | None = None, *, in_lines: bool = False) -> Iterator[Step]:
        """Show a progress bar on stderr for as long as the block runs.

        Off a terminal there is its title, not with ``--json``; and where ``in_lines`` is wanted, a line every 5 s.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        terminal = self._stderr.is_terminal
        if not terminal and not self.as_json:
            self.note(text)
        with Progress(*columns, console=self._stderr, transient=True, disable=not terminal) as progress:
            tell = self.note if in_lines and not terminal else None
            yield Step(progress, progress.add_task(text, total=total), tell)


def _make_writable() -> None:
    """Have both streams take every text: what a stream cannot encode becomes ``?``, a closed stream takes all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _numeric(text: str) -> bool:
    try:
        float(text.rstrip("%"))
    except ValueError:
        return text == "-"
    return True
