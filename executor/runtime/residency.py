"""Who is on a device of limited memory: what was used longest ago goes when another needs its place. No models here."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["Residency"]

_Name = TypeVar("_Name")


class Residency(Generic[_Name]):
    """Names on a device, each with its bytes.

    Args:
        limit_bytes: Of all together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._sizes: OrderedDict[_Name, int] = OrderedDict()
        self._pinned: set[_Name] = set()

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is here."""
        return sum(self._sizes.values())

    def is_here(self, name: _Name) -> bool:
        """Say whether ``name`` is here."""
        return name in self._sizes

    def use(self, name: _Name) -> None:
        """Note that ``name``, which is here, is used now."""
        self._sizes.move_to_end(name)

    def leavers(self, size_bytes: int, name: _Name | None = None) -> tuple[_Name, ...] | None:
        """Return who must go, the first first, so that ``size_bytes`` fit; None when even that is not enough.

        ``name`` is who comes, or is to grow to that size: it does not go, and what it has counts for it.
        """
        free_bytes = self.limit_bytes - self.held_bytes
        if name is not None:
            free_bytes += self._sizes.get(name, 0)
        leaving = []
        for other, other_bytes in self._sizes.items():
            if free_bytes >= size_bytes:
                break
            if other != name and other not in self._pinned:
                leaving.append(other)
                free_bytes += other_bytes
        return tuple(leaving) if free_bytes >= size_bytes else None

    def enter(self, name: _Name, size_bytes: int, *, pinned: bool = False) -> None:
        """Note that ``name`` is here, of this size, used now; a pinned one never goes for another."""
        self._sizes[name] = size_bytes
        self._sizes.move_to_end(name)
        if pinned:
            self._pinned.add(name)

    def leave(self, name: _Name) -> None:
        """Note that ``name`` is not here any more; one that was not is fine."""
        self._sizes.pop(name, None)
        self._pinned.discard(name)
