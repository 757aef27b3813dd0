"""The curves of a profile: what a plot of it draws apart, and in which units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from profiles.document import Phase, Profile, Row

__all__ = ["UNITS", "series"]

UNITS: Mapping[Phase, tuple[str, str]] = {
    "whole": ("batch", "items"),
    "prefill": ("prefill", "prompts"),
    "decode": ("decode step", "tokens"),
}
"""By phase: what takes the time, and what comes out of it; each phase has axes of its own."""


def series(profile: Profile, phase: Phase) -> Iterable[tuple[str, list[Row]]]:
    """Yield the name and the rows, by batch, of every curve of ``phase``: rows that differ in their batch alone."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted((row for row in profile.rows if row.phase == phase), key=lambda row: row.key):
        found.setdefault(row.key[:-1], []).append(row)
    for rows in found.values():
        yield f"{profile.gpu_type}{_label(rows[0])}", rows


def _label(row: Row) -> str:
    parts = [
        row.phase if row.phase != "whole" else "",
        f"tp {row.tp}" if row.tp > 1 else "",
        f"pp {row.pp}" if row.pp > 1 else "",
        f"{row.input_tokens} tokens" if row.input_tokens else "",
        f"{row.output_tokens} out" if row.output_tokens else "",
        f"{row.concurrency} at once" if row.concurrency > 1 else "",
    ]
    text = ", ".join(part for part in parts if part)
    return f" ({text})" if text else ""
