"""``diff``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli.command import EXIT_CHANGES, command
from foreplan.cli.output import Output

if TYPE_CHECKING:
    from plans.diff import EntryChange, PlanDiff

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    command(app, "diff")(diff)


def diff(
    out: Output,
    before: Annotated[Path, typer.Argument(metavar="A", help="The plan before.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The plan after.")],
    detailed_exitcode: Annotated[
        bool, typer.Option("--detailed-exitcode", help="Exit 2 when the placement changes.")
    ] = False,
) -> None:
    """Show what changes from plan A to plan B."""
    from plans.codec import read_plan
    from plans.diff import diff as compare

    change = compare(read_plan(before), read_plan(after))
    out.result(
        {
            "changes": change.changes_placement,
            "entries": [
                {
                    "action": entry.action,
                    "group": entry.group,
                    "service": entry.service,
                    "reloads": entry.reloads,
                    "before": None if entry.before is None else entry.before.model_dump(mode="json", by_alias=True),
                    "after": None if entry.after is None else entry.after.model_dump(mode="json", by_alias=True),
                }
                for entry in change.entries
            ],
            "routes": [
                {
                    "service": route.service,
                    "before": [r.model_dump() for r in route.before or ()],
                    "after": [r.model_dump() for r in route.after or ()],
                }
                for route in change.routes
            ],
            "workflows": [asdict(one) for one in change.workflows],
        }
    )
    _print_diff(out, change)
    if detailed_exitcode and change.changes_placement:
        raise typer.Exit(EXIT_CHANGES)


def _print_diff(out: Output, change: PlanDiff) -> None:
    if not change.changes_placement:
        out.say("no changes")
        return
    signs = {"create": "+", "update": "~", "delete": "-"}
    counts = dict.fromkeys(signs, 0)
    for entry in change.entries:
        counts[entry.action] += 1
        out.say(f"{signs[entry.action]} {entry.group} {entry.service}: {_entry_change(entry)}")
    for route in change.routes:
        before, after = ({r.group: r.weight for r in routes or ()} for routes in (route.before, route.after))
        moved = [
            f"{group} {before.get(group, 0):.0%} -> {after.get(group, 0):.0%}"
            for group in sorted(before.keys() | after.keys())
            if before.get(group) != after.get(group)
        ]
        out.say(f"~ routes {route.service}: {', '.join(moved)}")
    for one in change.workflows:
        out.say(f"~ {one.subject}: {one.before} -> {one.after}")
    if "workflows" in change.record and not change.workflows:
        out.say("~ workflows: the same in another order")
    out.say(
        f"{counts['create']} to create, {counts['update']} to update, {counts['delete']} to delete, "
        f"{len(change.routes)} services to route anew"
        + (f", {len({one.workflow for one in change.workflows})} workflows to change" if change.workflows else "")
    )


def _entry_change(entry: EntryChange) -> str:
    if entry.before is None or entry.after is None:
        known = entry.after or entry.before
        assert known is not None  # what is nowhere does not change
        return f"{known.variant}, batch {known.max_batch}, {known.rate_rps:.4g} rps"
    parts = [
        f"{name} {old} -> {new}"
        for name, old, new in (
            ("variant", entry.before.variant, entry.after.variant),
            ("batch", entry.before.max_batch, entry.after.max_batch),
            ("rate", f"{entry.before.rate_rps:.4g}", f"{entry.after.rate_rps:.4g} rps"),
            ("deadline", entry.before.deadline_s, entry.after.deadline_s),
        )
        if str(old) != str(new).removesuffix(" rps")
    ]
    return ", ".join(parts or ["profile figures"]) + ("; loads weights" if entry.reloads else "")
