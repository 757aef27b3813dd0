"""Views of memory by address, for compiled code.

The compiled functions take one argument, the world: a record of numbers and of the addresses of its arrays. A record is
a plain pointer to them, so a call costs nothing and no array is counted in and out. (With the arrays themselves as
arguments, counting references took most of the time: each function that is handed an array counts it twice.) Whoever
made the arrays must keep them alive and in place; `evaluator.state.World` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import types
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

from evaluator.linking import Part

__all__ = ["compiled", "featured", "inlined", "int64", "record_at", "view_of"]

int64: Any = np.int64
"""Widens the 32 bits of a record's field, so that compiled code has one type of index. Untyped: to all it is an int."""

_make_array: Any = make_array
_populate_array: Any = populate_array

_Function = TypeVar("_Function", bound=Callable[..., Any])


def record_at(dtype: np.dtype[Any]) -> Any:
    """Return the compiled function (base, index) -> record number ``index`` of the array of ``dtype`` at ``base``."""
    record = from_dtype(dtype)

    @intrinsic
    def at(typing_context: Any, base: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, index = arguments
            address = builder.add(base, builder.mul(index, base.type(dtype.itemsize)))
            return builder.inttoptr(address, context.get_value_type(record))

        return record(types.int64, types.int64), generate

    return at


def view_of(dtype: Any) -> Any:
    """Return the compiled function (base, length) -> one-dimensional array of ``dtype`` at ``base``, not counted."""
    item_bytes = np.dtype(dtype).itemsize
    array = types.Array(from_dtype(np.dtype(dtype)), 1, "C")

    @intrinsic
    def view(typing_context: Any, base: Any, length: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, length = arguments
            view = _make_array(array)(context, builder)
            _populate_array(
                view,
                data=builder.inttoptr(base, view.data.type),
                shape=[length],
                strides=[length.type(item_bytes)],
                itemsize=length.type(item_bytes),
                meminfo=None,
            )
            return view._getvalue()

        return array(types.int64, types.int64), generate

    return view


def compiled(function: _Function) -> _Function:
    """Compile a function that only compiled functions call (later, with what it is called with)."""
    return Part(function)  # type: ignore[return-value]  # it is called as what it was


def inlined(function: _Function) -> _Function:
    """The same, copied into its callers: for the few lines that a call would cost more than they do."""
    return Part(function, forceinline=True)  # type: ignore[return-value]  # it is called as what it was


def featured(marker: str, nothing: Any) -> Callable[[_Function], _Function]:
    """Compile a function for worlds that have the field ``marker``; for all others it is the constant ``nothing``.

    What only runs with some feature need is then not even compiled for the others. The world is the first argument.
    """

    def decorate(function: _Function) -> _Function:
        real = compiled(function)

        def choose(*arguments: Any) -> Any:
            raise AssertionError("only compiled functions call this")

        # No annotations: numba compares them with those of the functions that are returned.
        def choice(*arguments):  # type: ignore[no-untyped-def]
            if marker in arguments[0].fields:
                return lambda *arguments: real(*arguments)
            return lambda *arguments: nothing

        overload(choose, jit_options={"error_model": "numpy", "forceinline": True})(choice)
        return choose  # type: ignore[return-value]  # it is called as what it was

    return decorate
