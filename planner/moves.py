"""Moves of the polish, compiled: small ones within the loadouts, large ones that cut groups of GPUs anew.

Moves are aimed by what the last simulation showed: services that lose are added more often, replicas that serve little
go first. A move that returns False may have changed the layout: roll back.
"""

from __future__ import annotations

import numpy as np

from planner.layout import (
    ASIDE,
    LOGGED,
    OPEN,
    Layout,
    add_replica,
    affordable,
    close_group,
    fits,
    in_the_way,
    inner,
    open_group,
    remove_replica,
    rollback,
    spare,
    touches,
)

__all__ = ["admit_wanting", "aim", "draw", "large", "make_complete", "open_all", "small"]

_MOST_EVICTED = 5
_TRIES = 6


@inner
def draw(w: Layout) -> float:
    """Return a number in [0, 1): SplitMix64 (G. Steele et al., OOPSLA 2014), the same on every machine."""
    w.random[0] += np.uint64(0x9E3779B97F4A7C15)
    z = w.random[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@inner
def _below(w: Layout, count: int) -> int:
    """Return a whole number from 0 to below ``count``, which is above 0."""
    return min(int(draw(w) * count), count - 1)


@inner
def aim(w: Layout) -> None:
    """Let services be drawn by what they lose, and everyone now and then."""
    floor = 0.02 * w.lost.sum() / max(1, len(w.lost)) + 1e-12
    upto = 0.0
    for service in range(len(w.lost)):
        upto += w.lost[service] + floor
        w.wanting[service] = upto


@inner
def _wanting(w: Layout) -> int:
    found = int(np.searchsorted(w.wanting, draw(w) * w.wanting[-1], side="right"))
    return min(found, len(w.wanting) - 1)


@inner
def small(w: Layout) -> bool:
    """Change a few replicas; False when the draw leads nowhere."""
    if w.tally[OPEN] == 0:
        return False
    mark = w.tally[LOGGED]
    if not _change(w):
        return False
    # What was freed beside is filled: a large model against several small ones is one move, not a sequence.
    if draw(w) < 0.5:
        changed = w.tally[LOGGED]
        for at in range(mark, changed):
            slot, service = touches(w, at)
            if service >= 0 and w.option_at[slot, service] < 0:
                _top_up(w, slot)
    return True


@inner
def _change(w: Layout) -> bool:
    kind = draw(w)
    if kind < 0.4:
        service = _wanting(w)
        for _ in range(_TRIES):  # noqa: SIM110 - compiled code knows no generators
            if _squeeze(w, _slot(w), service):
                return True
        return False
    if kind < 0.5:
        return _drop(w)
    if kind < 0.7:
        return _shift(w)
    if kind < 0.95:
        return _swap(w)
    return _exchange(w)


@inner
def _slot(w: Layout) -> int:
    return int(w.open_slots[_below(w, w.tally[OPEN])])


@inner
def _choices(w: Layout, slot: int, service: int) -> tuple[int, int]:
    """Return where the options of ``service`` at ``slot`` begin and end in `Layout.menu_options`."""
    menu = w.menu_of[w.group_at[slot]]
    return w.menu_first[menu, service], w.menu_first[menu, service + 1]


@inner
def _admit(w: Layout, slot: int, service: int) -> bool:
    """Let ``slot`` run ``service`` with one of its options that fits, if any."""
    first, last = _choices(w, slot, service)
    if first == last or w.option_at[slot, service] >= 0:
        return False
    begin = _below(w, last - first) if last - first > 1 else 0
    for offset in range(last - first):
        option = w.menu_options[first + (begin + offset) % (last - first)]
        if fits(w, slot, option):
            add_replica(w, slot, option)
            return True
    return False


@inner
def _squeeze(w: Layout, slot: int, service: int) -> bool:
    """Let ``slot`` run ``service``, evicting others while it does not fit."""
    first, last = _choices(w, slot, service)
    if first == last or w.option_at[slot, service] >= 0 or not affordable(w, slot, service):
        return False
    option = w.menu_options[first + (_below(w, last - first) if last - first > 1 else 0)]
    mark = w.tally[LOGGED]
    for _ in range(_MOST_EVICTED):
        if fits(w, slot, option):
            break
        victim = _weakest(w, slot)
        if victim < 0:
            break
        remove_replica(w, slot, victim)
    if fits(w, slot, option):
        add_replica(w, slot, option)
        return True
    rollback(w, mark)
    return False


@inner
def _top_up(w: Layout, slot: int) -> None:
    """Let ``slot`` run services that lose, as long as a few draws find one that fits."""
    misses = 0
    while misses < _TRIES:
        if not _admit(w, slot, _wanting(w)):
            misses += 1


@inner
def _weakest(w: Layout, slot: int) -> int:
    """Return the less serving of two random tenants that may go, so that the idle go first; -1 without one."""
    found = -1
    for _ in range(2):
        drawn = _loose(w, slot)
        if drawn >= 0 and (found < 0 or w.worth[slot, drawn] < w.worth[slot, found]):
            found = drawn
    return found


@inner
def _loose(w: Layout, slot: int) -> int:
    """Return a random tenant of ``slot`` that may go; -1 without one."""
    count = w.tenants[slot]
    begin = _below(w, count) if count > 0 else 0
    for offset in range(count):
        service = int(w.tenant[slot, (begin + offset) % count])
        if spare(w, service):
            return service
    return -1


@inner
def _drop(w: Layout) -> bool:
    slot = _slot(w)
    victim = _weakest(w, slot)
    if victim < 0:
        return False
    remove_replica(w, slot, victim)
    return True


@inner
def _shift(w: Layout) -> bool:
    source, target = _slot(w), _slot(w)
    if source == target or w.tenants[source] == 0:
        return False
    service = w.tenant[source, _below(w, w.tenants[source])]
    if w.option_at[target, service] >= 0:
        return False
    remove_replica(w, source, service)
    return _squeeze(w, target, service)


@inner
def _foreign(w: Layout, slot: int, other: int) -> int:
    """Return a random tenant of ``slot`` that ``other`` does not run; -1 without one."""
    count = w.tenants[slot]
    begin = _below(w, count) if count > 0 else 0
    for offset in range(count):
        service = int(w.tenant[slot, (begin + offset) % count])
        if w.option_at[other, service] < 0:
            return service
    return -1


@inner
def _swap(w: Layout) -> bool:
    one, two = _slot(w), _slot(w)
    if one == two:
        return False
    here, there = _foreign(w, one, two), _foreign(w, two, one)
    if here < 0 or there < 0:
        return False
    remove_replica(w, one, here)
    remove_replica(w, two, there)
    return _squeeze(w, one, there) and _squeeze(w, two, here)


@inner
def _exchange(w: Layout) -> bool:
    """Give one replica another option: another variant or batch."""
    slot = _slot(w)
    if w.tenants[slot] == 0:
        return False
    service = w.tenant[slot, _below(w, w.tenants[slot])]
    first, last = _choices(w, slot, service)
    if last - first < 2:
        return False
    old, drawn = w.option_at[slot, service], w.menu_options[first + _below(w, last - first)]
    remove_replica(w, slot, service)
    if drawn == old or not fits(w, slot, drawn):
        return False
    add_replica(w, slot, drawn)
    return True


@inner
def large(w: Layout) -> bool:
    """Cut some GPUs anew and set the slots that need loadouts aside; False when the draw leads nowhere."""
    places, kinds = len(w.place_first) - 1, len(w.kind_first) - 1
    if kinds == 0:
        return False
    if places > 1 and draw(w) < 0.3:
        place = _below(w, places)
        first, last = w.place_first[place], w.place_first[place + 1]
        if last - first > 1 and draw(w) < 0.5:
            half = (last - first) // 2
            if draw(w) < 0.5:
                last = first + half
            else:
                first += half
        return _recut(w, w.place_groups[first:last])
    kind = _below(w, kinds)
    at = w.kind_first[kind] + _below(w, w.kind_first[kind + 1] - w.kind_first[kind])
    group = w.kind_groups[at]
    if w.group_at[w.slot_of[group]] == group:
        return False
    return _recut(w, w.kind_groups[at : at + 1])


@inner
def _recut(w: Layout, groups: np.ndarray) -> bool:
    """Open ``groups`` in place of what overlaps them, fill the gaps, and give them the tenants that were there."""
    mark = w.tally[LOGGED]
    worth = np.zeros(len(w.replicas))
    for group in groups:
        for gpu in w.covered[group]:
            if gpu >= 0 and w.owner[gpu] >= 0:
                slot = w.owner[gpu]
                for tenant in range(w.tenants[slot]):
                    service = w.tenant[slot, tenant]
                    worth[service] += w.worth[slot, service] + 1e-9
                close_group(w, slot)
    closed = w.tally[LOGGED]
    w.tally[ASIDE] = 0
    for group in groups:
        if not in_the_way(w, group):
            _set_aside(w, open_group(w, group))
    for at in range(mark, closed):
        slot, service = touches(w, at)
        if service < 0:
            _close_gaps(w, w.log[at, 2])
    heavy = np.argsort(-worth, kind="mergesort")
    for each in range(w.tally[ASIDE]):
        for service in heavy:
            if worth[service] <= 0:
                break
            _admit(w, w.aside[each], service)
    return bool(w.tally[ASIDE] > 0)


@inner
def _set_aside(w: Layout, slot: int) -> None:
    w.aside[w.tally[ASIDE]] = slot
    w.tally[ASIDE] += 1


@inner
def _close_gaps(w: Layout, closed: int) -> None:
    """Open groups on the GPUs of ``closed`` that none holds, of its own parallelism where possible."""
    for gpu in w.covered[closed]:
        if gpu < 0 or w.owner[gpu] >= 0:
            continue
        found, alike, seen = -1, False, 0
        for at in range(w.head_first[gpu], w.head_first[gpu + 1]):
            group = w.head_groups[at]
            same = w.shape_of[group] == w.shape_of[closed]
            if in_the_way(w, group) or (alike and not same):
                continue
            if same and not alike:
                alike, seen = True, 0
            seen += 1
            if _below(w, seen) == 0:
                found = group
        if found >= 0:
            _set_aside(w, open_group(w, found))


@inner
def open_all(w: Layout, kind: int) -> None:
    """Open every group of ``kind`` that overlaps none in use, and set their slots aside with those already there."""
    for at in range(w.kind_first[kind], w.kind_first[kind + 1]):
        group = w.kind_groups[at]
        if not in_the_way(w, group):
            _set_aside(w, open_group(w, group))


@inner
def admit_wanting(w: Layout) -> int:
    """Give each slot set aside the service that loses most of those that fit; return how many found one."""
    order = np.argsort(-w.lost, kind="mergesort")
    found = 0
    for each in range(w.tally[ASIDE]):
        for offset in range(len(order)):
            # Slots begin at different services, so that one round does not give all of them the same.
            service = order[(each + offset) % len(order)]
            if w.lost[service] > 0 and _admit(w, w.aside[each], service):
                found += 1
                break
    return found


@inner
def make_complete(w: Layout) -> bool:
    """Add replicas until every service has its minimum; False when one finds no place."""
    for service in range(len(w.replicas)):
        while w.replicas[service] < w.min_replicas[service]:
            begin = _below(w, w.tally[OPEN]) if w.tally[OPEN] > 0 else 0
            placed = False
            for offset in range(w.tally[OPEN]):
                if _squeeze(w, w.open_slots[(begin + offset) % w.tally[OPEN]], service):
                    placed = True
                    break
            if not placed:
                return False
    return True
