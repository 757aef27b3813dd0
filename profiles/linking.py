"""How functions are compiled: those that only compiled functions call, and those that Python calls.

numba compiles a function once for every combination of argument types that it is called with, a constant and a 32-bit
number being types of their own, and it optimises each version with all that it calls linked in, down to machine code
that nobody runs: what lies ten calls deep is optimised ten times over. `Part` makes one version per type of world, and
leaves optimisation and machine code to the entry point that it is linked into, which sees it all. That takes a third of
the time; what it costs in speed, and what it ties us to, is in docs/decisions/0011. It stands here because the planner
and the evaluator both compile, and neither may know the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import event, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher

__all__ = ["Part", "digest_of", "entry_point_of", "on_compilation"]

# mypy: disable-error-code="misc,no-untyped-call"
# numba's classes have hardly any types.


class _Codegen:
    """The real one, which is not told of functions that it has no machine code of."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def set_env(self, name: str, env: Any) -> None:
        """Do nothing: what an environment is for (calling Python) is not done here."""


class _Library(JITCodeLibrary):
    """Code that is kept as it was written until something links it in."""

    @property
    def codegen(self) -> _Codegen:
        return _Codegen(self._codegen)

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0


class _Compiler(Compiler):
    def __init__(self, typing_context: Any, target_context: Any, library: Any, *others: Any) -> None:
        own = library or _Library(target_context.codegen(), "part")
        super().__init__(typing_context, target_context, own, *others)


class Part(CPUDispatcher):
    """A function to be linked into others.

    Args:
        function: Takes a world, floats, and whole numbers, which it is given as int64.
        forceinline: Whether it is copied into its callers.
    """

    def __init__(self, function: Any, *, forceinline: bool = False) -> None:
        options = {"nopython": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        super().__init__(function, targetoptions=options | {"forceinline": forceinline}, pipeline_class=_Compiler)

    def __call__(self, *arguments: Any) -> Any:
        """Run it in the interpreter, where Python calls it after all."""
        return self.py_func(*arguments)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Choose the version for a call: see `numba.core.dispatcher`."""
        return super().get_call_template(tuple(map(_widened, args)), kws)


def _widened(kind: Any) -> Any:
    plain: Any = types.unliteral(kind)
    return types.int64 if plain in types.signed_domain else plain


_Function = TypeVar("_Function", bound=Callable[..., Any])


def digest_of(paths: Iterable[Path]) -> str:
    """Return what changes with any of the sources at ``paths``."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def entry_point_of(*names: object, **options: Any) -> Callable[[_Function], _Function]:
    """Return a decorator that compiles a function for Python to call, and keeps the machine code on disk.

    numba's cache looks only at the file that the function stands in; and of versions that two processes add under one
    name at the same time, either may later be found in place of the other. So each has a name of its own, of ``names``:
    what tells the versions of one function apart, and the digest of the sources that it comes from.
    """

    def decorate(function: _Function) -> _Function:
        function.__qualname__ = "-".join(map(str, (function.__name__, *names)))
        compiled: _Function = numba.njit(cache=True, nogil=True, **options)(function)
        return compiled

    return decorate


class _Once(event.Listener):
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell: Callable[[], None] | None = tell

    def on_start(self, event: Any) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell()

    def on_end(self, event: Any) -> None:
        """Do nothing."""


@contextmanager
def on_compilation(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` when something has to be compiled in the block, before that takes its seconds; once at most."""
    with event.install_listener("numba:compile", _Once(tell)):
        yield
