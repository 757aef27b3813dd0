"""The frame around every command: shared options, and errors turned into messages and exit codes.

Exit codes: 0 ok, 1 error, 2 changes (with ``--detailed-exitcode``) or wrong usage, 3 infeasible, 4 stale plan, 5 apply
failed and rolled back, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from foreplan.cli.output import Output

__all__ = ["EXIT_CHANGES", "EXIT_ERROR", "EXIT_INFEASIBLE", "EXIT_INTERRUPTED", "command"]

EXIT_ERROR = 1
EXIT_CHANGES = 2
EXIT_INFEASIBLE = 3
EXIT_STALE = 4
EXIT_ROLLED_BACK = 5
EXIT_INTERRUPTED = 130


class LogLevel(StrEnum):
    """How much goes to stderr."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


_SHARED = {
    "json_output": (Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")], False),
    "no_color": (Annotated[bool, typer.Option("--no-color", help="No colours.")], False),
    "log_level": (Annotated[LogLevel | None, typer.Option("--log-level", help="What to log on stderr.")], None),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show stack traces of errors.")], False),
}


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function ``f(out: Output, ...)`` as the command ``name`` with the shared options.

    A parameter whose type is a dataclass stands for the options that are its fields.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        declared = list(signature.parameters.values())[1:]
        groups = {each.name: each.annotation for each in declared if _is_group(each)}
        own = [option for parameter in declared for option in _options(parameter)]
        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in _SHARED.items()
        ]

        def run(**arguments: Any) -> None:
            chosen = {key: arguments.pop(key) for key in _SHARED}
            files = _files(arguments)
            level = chosen["log_level"]
            out = Output(as_json=chosen["json_output"], color=not chosen["no_color"], log_level=level)
            logging.basicConfig(
                level=(level or LogLevel.warning).upper(),
                format="%(asctime)s %(levelname)s %(name)s %(message)s",
                stream=sys.stderr,
            )
            for group, kind in groups.items():
                arguments[group] = kind(**{each.name: arguments.pop(each.name) for each in dataclasses.fields(kind)})
            _guarded(function, out, arguments, files, debug=chosen["debug"])

        run.__name__ = function.__name__
        run.__doc__ = function.__doc__
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = signature.replace(parameters=[*parameters, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *shared]}
        app.command(name)(run)
        return function

    return register


def _is_group(parameter: inspect.Parameter) -> bool:
    return dataclasses.is_dataclass(parameter.annotation)


def _options(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """Yield the fields of ``parameter`` where its type is a dataclass, else itself."""
    if _is_group(parameter):
        yield from inspect.signature(parameter.annotation, eval_str=True).parameters.values()
    else:
        yield parameter


def _files(arguments: dict[str, Any]) -> dict[str, str]:
    """Return the files among ``arguments`` by what a fault calls them, such as ``services``; of lists, lone files."""
    lists = {name: value for name, value in arguments.items() if isinstance(value, list)}
    alone = {name.removesuffix("s"): value[0] for name, value in lists.items() if len(value) == 1}
    return {name: str(value) for name, value in (arguments | alone).items() if isinstance(value, Path)}


def _guarded(
    function: Callable[..., None], out: Output, arguments: dict[str, Any], files: Mapping[str, str], *, debug: bool
) -> None:
    """Run a command; what Foreplan raises on purpose becomes a message, a bug becomes a request to report it."""
    try:
        function(out, **arguments)
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _interrupted(out, debug=debug)
    except BrokenPipeError:
        # The reader of stdout went away (`foreplan show | head`); nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_ERROR) from None
    except Exception as error:  # noqa: BLE001 - the edge of the process
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11 wraps what comes while a class is made
            _interrupted(out, debug=debug)
        text, code = _explain(error, files)
        out.error(text)
        _leave(code, debug=debug)


def _interrupted(out: Output, *, debug: bool) -> NoReturn:
    out.error("interrupted")
    _leave(EXIT_INTERRUPTED, debug=debug)


def _leave(code: int, *, debug: bool) -> NoReturn:
    if debug:
        logging.getLogger("foreplan").error("stack trace", exc_info=True)
    raise typer.Exit(code) from None


def _explain(error: Exception, files: Mapping[str, str]) -> tuple[str, int]:
    from plans.errors import ApplyRolledBack, ForeplanError, InvalidInput, StalePlan

    if isinstance(error, StalePlan):
        return str(error), EXIT_STALE
    if isinstance(error, ApplyRolledBack):
        return str(error), EXIT_ROLLED_BACK
    if isinstance(error, InvalidInput):
        # What works on documents does not know which files they came from.
        named = (dataclasses.replace(fault, where=files.get(fault.where, fault.where)) for fault in error.faults)
        return str(InvalidInput(named)), EXIT_ERROR
    if isinstance(error, ForeplanError):
        return str(error), EXIT_ERROR
    if isinstance(error, OSError):
        return f"{error.filename or 'operating system'}: {error.strerror or error}", EXIT_ERROR
    return f"a bug in Foreplan: {type(error).__name__}: {error}; run again with --debug and report it", EXIT_ERROR
