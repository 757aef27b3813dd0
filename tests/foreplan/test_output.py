from __future__ import annotations

import io
import re
import sys

from rich.console import Console
from rich.progress import Progress

from foreplan.cli.output import Output, Step


def test_off_a_terminal_a_step_tells_how_far_it_is_every_few_seconds():
    now_s, told = [0.0], []
    with Progress(console=Console(file=io.StringIO()), disable=True) as progress:
        step = Step(progress, progress.add_task("x"), told.append, every_s=5.0, clock=lambda: now_s[0])
        for now_s[0] in (0.1, 4.9, 5.0, 5.1, 9.9, 10.2, 11.0):
            step.update(now_s[0] * 10, total=200, text="all in time")
    assert told == ["50 of 200: all in time", "102 of 200: all in time"]


def test_lines_are_for_those_who_have_no_bar_and_asked(capsys):
    out = Output(as_json=True, color=False)
    for in_lines in (False, True):
        with out.progress("replaying", total=10, in_lines=in_lines) as step:
            assert (step.tell is not None) is in_lines
    assert capsys.readouterr().err == ""


def test_what_a_stream_cannot_encode_becomes_a_question_mark(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    out = Output(as_json=False, color=False)
    out.say("99 % ± 1")
    out.flush()
    assert written.getvalue() == b"99 % ? 1\n"


class _Gone(io.StringIO):
    """The end of a pipe that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_remarks_that_nobody_can_read_end_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", _Gone())
    out = Output(as_json=False, color=False)
    with out.progress("applying", in_lines=True) as step:
        out.note("stage a: done")
        step.update(1, text="stage b")
    out.warn("careful")
    out.error("lost")


def test_a_closed_stdout_takes_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    out = Output(as_json=False, color=False)
    out.say("nobody reads this")
    out.flush()
    sys.stdout.close()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _lines(monkeypatch, width, columns, rows, *, terminal=True):
    screen = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    Output(as_json=False, color=False).table(columns, rows, title="Times")
    return screen.getvalue().splitlines()


def test_a_table_too_wide_for_the_terminal_has_a_line_for_each_column(monkeypatch):
    columns, rows = [f"percentile {n}" for n in range(9)], [[n / 7 for n in range(9)], [n / 3 for n in range(9)]]
    lines = _lines(monkeypatch, 60, columns, rows)
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines) <= 60
    for n, column in enumerate(columns):
        (line,) = [line for line in lines if column in line]
        assert f"{n / 7:.4g}" in line
        assert f"{n / 3:.4g}" in line
    assert len(_lines(monkeypatch, 160, columns, rows)) == 7  # title, three rules, head, two rows


def test_a_piped_table_stays_as_it_is_however_wide(monkeypatch):
    columns = [f"percentile {n}" for n in range(30)]
    title, head, row = _lines(monkeypatch, 60, columns, [range(30)], terminal=False)
    assert (title.strip(), head.split("  ")[0], row.split()[-1]) == ("Times", "percentile 0", "29")


def test_a_long_table_is_not_turned(monkeypatch):
    lines = _lines(monkeypatch, 30, ["a long name of a column", "another one"], [[n, n] for n in range(40)])
    assert len(lines) > 40
