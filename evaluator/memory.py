"""Views of memory by address, for compiled code.

The compiled functions take one argument, the world: a record of numbers and of the addresses of its arrays. A record is
a plain pointer to them, so a call costs nothing and no array is counted in and out. (With the arrays themselves as
arguments, counting references took most of the time: each function that is handed an array counts it twice.) Whoever
made the arrays must keep them alive and in place; `evaluator.state.World` does.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

__all__ = ["compiled", "inlined", "record_at", "view_of"]


def record_at(dtype: np.dtype[Any]) -> Any:
    """Return the compiled function (base, index) -> record number ``index`` of the array of ``dtype`` at ``base``."""
    record = from_dtype(dtype)

    @intrinsic  # type: ignore[untyped-decorator]
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

    @intrinsic  # type: ignore[untyped-decorator]
    def view(typing_context: Any, base: Any, length: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, length = arguments
            view = make_array(array)(context, builder)
            populate_array(
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


compiled: Any = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compile a function that only compiled functions call."""

inlined: Any = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
"""The same, copied into its callers: for the few lines that a call would cost more than they do."""
