"""The entry point to the compiled moves, and `Arrangement`, through which the interpreter uses them.

The arrays of a layout travel as one reference (a numba structure), because compiling takes long where every call passes
forty arrays. The entry point is cached on disk under a digest of every source file that it is compiled from: numba
itself looks at its file alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from numba.core import types
from numba.experimental import structref

from planner.layout import (
    ASIDE,
    LOGGED,
    Layout,
    add_replica,
    clear,
    fits,
    in_the_way,
    keeps,
    layout_of,
    open_group,
    rollback,
)
from planner.moves import admit_wanting, aim, draw, large, make_complete, open_all, small
from planner.polish_limits import Pairs
from planner.space import PlanningSpace
from profiles.linking import digest_of, entry_point_of

__all__ = ["Arrangement", "Operation", "source_digest"]

_COMPILED = ("arranged", "layout", "moves", "worth")


class Operation(IntEnum):
    """What `Arrangement.operate` does, with the arguments that it takes; all return a whole number, 0 for no."""

    SMALL = 0
    """A small move; tell whether it led anywhere and keeps what `planner.layout.keeps` tells."""
    LARGE = 1
    """A large move; the slots to be filled are set aside."""
    OPEN_ALL = 2
    """Open all groups of a kind (argument), and set their slots aside; return how many are."""
    ADMIT_WANTING = 3
    """Fill the slots set aside by one service each, as far as any fits; return how many found one."""
    COMPLETE = 4
    """Add what is missing of minimum replicas; tell whether everything is kept."""
    KEEPS = 5
    """Tell whether everything is kept."""
    ROLLBACK = 6
    """Undo all but the first changes (argument: how many)."""
    CLEAR = 7
    """Close all groups, for good."""
    AIM = 8
    """Take in `Layout.lost`."""
    PLACE = 9
    """Place an option (the second argument) on a group (the first), opening it; tell whether there was room."""

    DRAW = 10
    """Return a random number below 2^53."""


def source_digest(paths: Iterable[Path] = ()) -> str:
    """Return what changes with any source of the compiled moves, and with ``paths``."""
    return digest_of([*(Path(__file__).with_name(f"{name}.py") for name in _COMPILED), *paths])


@structref.register
class _LayoutType(types.StructRef):
    """`Layout` as compiled code knows it."""


class _Handle(structref.StructRefProxy):
    """A reference to the arrays of a `Layout`."""


structref.define_proxy(_Handle, _LayoutType, list(Layout._fields))  # type: ignore[no-untyped-call]  # numba's


@entry_point_of(source_digest())
def _handle_of(arrays: Any) -> Any:
    return _Handle(*arrays)  # type: ignore[no-untyped-call]  # numba's


@entry_point_of(source_digest(), error_model="numpy")
def _operate(w: Any, operation: int, one: int, other: int) -> int:  # noqa: C901 - the same list
    if operation == 0:
        return int(small(w) and keeps(w))
    if operation == 1:
        return int(large(w))
    if operation == 2:
        open_all(w, one)
        return int(w.tally[ASIDE])
    if operation == 3:
        return int(admit_wanting(w))
    if operation == 4:
        return int(make_complete(w) and keeps(w))
    if operation == 5:
        return int(keeps(w))
    if operation == 6:
        rollback(w, one)
    elif operation == 7:
        clear(w)
    elif operation == 8:
        aim(w)
    elif operation == 10:
        return int(draw(w) * 9007199254740992.0)
    else:
        slot = w.slot_of[one]
        if w.group_at[slot] != one:
            if in_the_way(w, one):
                return 0
            open_group(w, one)
        if w.option_at[slot, w.service_of[other]] >= 0 or not fits(w, slot, other):
            return 0
        add_replica(w, slot, other)
    return 1


class Arrangement:
    """A layout that a search changes in place.

    Attributes:
        now: The layout's arrays. They change with every operation.
        handle: The same for compiled code.
        kinds: GPU type and (tp, pp) of each kind of group that anything fits on, as `Operation.OPEN_ALL` counts them.
        shapes: The (tp, pp) of the kinds of each GPU type.
    """

    def __init__(self, space: PlanningSpace, options: Iterable[int], seed: int = 0) -> None:
        """Start empty. ``options`` are the only ones that moves will place."""
        self.now = layout_of(space, options, seed)
        self.handle: Any = _handle_of(tuple(self.now))
        firsts = [space.groups[self.now.kind_groups[first]] for first in self.now.kind_first[:-1]]
        self.kinds = tuple((group.gpu_type, (group.tp, group.pp)) for group in firsts)
        self.shapes = {
            gpu_type: tuple(shape for each, shape in self.kinds if each == gpu_type) for gpu_type, _ in self.kinds
        }

    def operate(self, operation: Operation, one: int = 0, other: int = 0) -> int:
        """Do ``operation`` with its arguments; see there."""
        return _operate(self.handle, int(operation), one, other)

    @property
    def mark(self) -> int:
        """The point in time to which `Operation.ROLLBACK` returns."""
        return int(self.now.tally[LOGGED])

    def draw(self) -> float:
        """Return a number in [0, 1) from the layout's generator."""
        return self.operate(Operation.DRAW) * 2.0**-53

    def forget(self) -> None:
        """Drop the log: what stands can no longer be undone."""
        self.now.tally[LOGGED] = 0

    def restore(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Make ``pairs`` stand, whatever stood before, for good; pairs that do not fit are left out."""
        self.operate(Operation.CLEAR)
        for group, option in pairs:
            self.operate(Operation.PLACE, group, option)
            self.forget()

    def pairs(self) -> Pairs:
        """Return what stands as sorted (group, option) pairs."""
        now = self.now
        found = [
            (int(now.group_at[now.slot[service, replica]]), int(now.option[service, replica]))
            for service in range(len(now.replicas))
            for replica in range(now.replicas[service])
        ]
        return tuple(sorted(found))
