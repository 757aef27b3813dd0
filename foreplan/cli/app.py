"""The ``foreplan`` program: all commands, and nothing heavy until one of them runs."""

from __future__ import annotations

from typing import Annotated

import typer

from foreplan.cli import (
    apply_commands,
    certs_commands,
    cluster_commands,
    compare_commands,
    demo_commands,
    evaluate_commands,
    load_commands,
    plan_commands,
    profile_commands,
    server_commands,
    trace_commands,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="foreplan",
    help="Plan ahead which AI service runs on which GPU, apply the plan to real nodes, and prove it against traces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from foreplan import __version__

        typer.echo(f"foreplan {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Plan ahead which AI service runs on which GPU, apply the plan to real nodes, and prove it against traces."""


for _module in (
    profile_commands,
    trace_commands,
    plan_commands,
    evaluate_commands,
    compare_commands,
    server_commands,
    apply_commands,
    cluster_commands,
    load_commands,
    demo_commands,
    certs_commands,
):
    _module.register(app)


def main() -> None:
    """Run the program."""
    app()
