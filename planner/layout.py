"""A placement that a search changes in place: groups opened and closed, services added and removed, and all undone.

`Layout` is the placement as arrays, and the functions on it are compiled, so that a search of thousands of candidates a
second runs through without the interpreter. A group is named by its *slot*, the cluster-wide position of its first GPU.
Every change is logged, and `rollback` returns to any earlier point. What is held hard is memory, budgets, one option
per service and group, and what `keeps` tells: minimum replicas, spreading, and two nodes where one may be lost. The
rule that keeps services apart whose batches would block each other is not: the simulation shows what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.linear import Floats
from planner.space import PlanningSpace
from profiles.linking import Part

__all__ = [
    "LOGGED",
    "OPEN",
    "Layout",
    "add_replica",
    "affordable",
    "clear",
    "close_group",
    "fits",
    "in_the_way",
    "keeps",
    "layout_of",
    "open_group",
    "remove_replica",
    "rollback",
    "spare",
    "touches",
]

_ROUNDING = 1e-9
_OPENED, _CLOSED, _ADDED, _REMOVED = range(4)
OPEN, LOGGED, ASIDE = range(3)
"""Entries of `Layout.tally`: groups in use, changes logged, slots in `Layout.aside`."""
_LOG_ROOM, _LOG_PER_GPU = 20_000, 70

Indices = NDArray[np.int32]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def inner(function: _Function) -> _Function:
    """Compile a function that only compiled code calls; the entry points are cached (`planner.arranged`)."""
    return Part(function)  # type: ignore[return-value]  # it is called as what it was


class Layout(NamedTuple):
    """A placement and what it may become. The first block never changes.

    Attributes:
        slot_of: Shape (group,).
        size_of: Shape (group,): its GPUs.
        covered: Shape (group, most GPUs): cluster-wide positions of its GPUs; -1 beyond the last.
        shape_of: Shape (group,): number of its parallelism.
        menu_of: Shape (group,): which menu lists its options.
        menu_first: Shape (menu, service + 1): a service's options there begin here in ``menu_options``.
        menu_options: The options of all menus; after them one unused.
        service_of: Shape (option,).
        memory: Shape (option, stage): share of a GPU's usable memory.
        min_replicas: Shape (service,).
        max_gpus: Shape (service,), infinite without a budget.
        kind_first: Shape (kind + 1,): where the groups of one GPU type and parallelism begin in ``kind_groups``.
        kind_groups: Groups by kind.
        place_first: Shape (place + 1,): the same by node and kind.
        place_groups: Groups by node and kind.
        head_first: Shape (GPU + 1,): the same by first GPU.
        head_groups: Groups by first GPU.
        node_of: Shape (GPU,): number of its node.
        spread_of: Shape (service,): number of its rule on spreading, -1 without one.
        domain_of: Shape (rule, group): failure domain, -1 where the service cannot run.
        spread: Shape (rule, 3): domains, largest difference of replicas, least domains.
        fewest_nodes: Shape (1,): nodes that every service with a replica has to be on.
        owner: Shape (GPU,): slot of the group in use that holds it, -1 without one.
        group_at: Shape (slot,): the group in use, -1 without one.
        used: Shape (slot, stage): memory taken.
        gpus_of: Shape (service,): GPUs of all its groups.
        replicas: Shape (service,): how many it has.
        slot: Shape (service, replica): where they are, rising.
        option: Shape (service, replica): what they are.
        tenants: Shape (slot,): services there.
        tenant: Shape (slot, tenant): which.
        option_at: Shape (slot, service): the option there, -1 without one.
        open_slots: Shape (slot,): the slots in use, in no order.
        open_at: Shape (slot,): where among them each is.
        aside: Shape (slot,): slots that a move sets aside to be filled.
        tally: Counts; see `OPEN`.
        log: Shape (change, 4): kind, slot, service or group, option.
        random: Shape (1,): state of the generator.
        lost: Shape (service,): value that it did not serve when last simulated.
        wanting: Shape (service,): cumulated, to draw services by what they lose.
        worth: Shape (slot, service): value that the replica there served when last simulated.
    """

    slot_of: Indices
    size_of: Indices
    covered: Indices
    shape_of: Indices
    menu_of: Indices
    menu_first: Indices
    menu_options: Indices
    service_of: Indices
    memory: Floats
    min_replicas: Indices
    max_gpus: Floats
    kind_first: Indices
    kind_groups: Indices
    place_first: Indices
    place_groups: Indices
    head_first: Indices
    head_groups: Indices
    node_of: Indices
    spread_of: Indices
    domain_of: Indices
    spread: Indices
    fewest_nodes: Indices
    owner: Indices
    group_at: Indices
    used: Floats
    gpus_of: Floats
    replicas: Indices
    slot: Indices
    option: Indices
    tenants: Indices
    tenant: Indices
    option_at: Indices
    open_slots: Indices
    open_at: Indices
    aside: Indices
    tally: Indices
    log: Indices
    random: NDArray[np.uint64]
    lost: Floats
    wanting: Floats
    worth: Floats


def layout_of(space: PlanningSpace, options: Iterable[int], seed: int = 0) -> Layout:
    """Return an empty layout; ``options`` are the only ones that moves will place. Costs services times GPUs."""
    groups, services = space.groups, len(space.names)
    nodes = space.problem.cluster.nodes
    sizes = [node.gpus.count for node in nodes]
    offset_of = dict(zip((node.name for node in nodes), np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    gpus = sum(sizes)
    node_of = np.repeat(np.arange(len(nodes)), sizes)
    covered = np.full((len(groups), max((len(group.gpus) for group in groups), default=1)), -1, dtype=np.int32)
    for position, group in enumerate(groups):
        covered[position, : len(group.gpus)] = sorted(offset_of[group.node] + gpu for gpu in group.gpus)
    menu_of, menu_first, menu_options = _menus(space, set(options))
    useful = [position for position in range(len(groups)) if np.ptp(menu_first[menu_of[position]]) > 0]
    kinds = [(group.gpu_type, group.tp, group.pp) for group in groups]
    places = [(group.node, *kind) for group, kind in zip(groups, kinds, strict=True)]
    shapes = {shape: number for number, shape in enumerate(dict.fromkeys(kind[1:] for kind in kinds))}
    kind_first, kind_groups = _by_key([kinds[position] for position in useful], useful)
    place_first, place_groups = _by_key([places[position] for position in useful], useful)
    order = sorted(useful, key=lambda position: (covered[position, 0], position))
    heads = np.bincount(covered[useful, 0], minlength=gpus) if useful else np.zeros(gpus, dtype=np.int64)
    rules = space.requirements.spreads
    spread_of = np.full(services, -1, dtype=np.int32)
    spread_of[[rule.service for rule in rules]] = np.arange(len(rules))
    stages = space.memory.shape[1]
    return Layout(
        slot_of=covered[:, 0].copy(),
        size_of=np.array([len(group.gpus) for group in groups], dtype=np.int32),
        covered=covered,
        shape_of=np.array([shapes[kind[1:]] for kind in kinds], dtype=np.int32),
        menu_of=menu_of,
        menu_first=menu_first,
        menu_options=menu_options,
        service_of=space.service_of.astype(np.int32),
        memory=np.ascontiguousarray(space.memory),
        min_replicas=space.min_replicas.astype(np.int32),
        max_gpus=np.ascontiguousarray(space.max_gpus),
        kind_first=kind_first,
        kind_groups=kind_groups,
        place_first=place_first,
        place_groups=place_groups,
        head_first=np.concatenate([[0], np.cumsum(heads)]).astype(np.int32),
        head_groups=np.array(order, dtype=np.int32),
        node_of=node_of.astype(np.int32),
        spread_of=spread_of,
        domain_of=np.array([rule.domain_of for rule in rules], dtype=np.int32).reshape(len(rules), len(groups)),
        spread=np.array(
            [(len(rule.domains), rule.max_skew, rule.min_domains) for rule in rules], dtype=np.int32
        ).reshape(-1, 3),
        fewest_nodes=np.array([2 if space.requirements.losses else 1], dtype=np.int32),
        owner=np.full(gpus, -1, dtype=np.int32),
        group_at=np.full(gpus, -1, dtype=np.int32),
        used=np.zeros((gpus, stages)),
        gpus_of=np.zeros(services),
        replicas=np.zeros(services, dtype=np.int32),
        slot=np.zeros((services, gpus), dtype=np.int32),
        option=np.zeros((services, gpus), dtype=np.int32),
        tenants=np.zeros(gpus, dtype=np.int32),
        tenant=np.zeros((gpus, services), dtype=np.int32),
        option_at=np.full((gpus, services), -1, dtype=np.int32),
        open_slots=np.zeros(gpus, dtype=np.int32),
        open_at=np.zeros(gpus, dtype=np.int32),
        aside=np.zeros(gpus, dtype=np.int32),
        tally=np.zeros(3, dtype=np.int32),
        log=np.zeros((_LOG_ROOM + _LOG_PER_GPU * gpus, 4), dtype=np.int32),
        random=np.array([seed], dtype=np.uint64),
        lost=np.ones(services),
        wanting=np.arange(1.0, services + 1.0),
        worth=np.zeros((gpus, services)),
    )


def _menus(space: PlanningSpace, wanted: set[int]) -> tuple[Indices, Indices, Indices]:
    """Return the menu of each group, and all menus: where each service's options begin, and the options."""
    known: dict[tuple[int, ...], int] = {}
    menu_of = np.array([known.setdefault(group.options, len(known)) for group in space.groups], dtype=np.int32)
    first = np.zeros((len(known), len(space.names) + 1), dtype=np.int32)
    flat: list[int] = []
    for menu, listed in enumerate(known):
        options = sorted((int(space.service_of[option]), option) for option in listed if option in wanted)
        services = np.array([service for service, _ in options], dtype=np.int64)
        first[menu, 0] = len(flat)
        first[menu, 1:] = len(flat) + np.cumsum(np.bincount(services, minlength=len(space.names)))
        flat.extend(option for _, option in options)
    return menu_of, first, np.array([*flat, -1], dtype=np.int32)


def _by_key(keys: Sequence[tuple[object, ...]], groups: Sequence[int]) -> tuple[Indices, Indices]:
    """Return where each key's groups begin, keys in order of first appearance, and the groups."""
    found: dict[tuple[object, ...], list[int]] = {}
    for key, group in zip(keys, groups, strict=True):
        found.setdefault(key, []).append(group)
    first = np.cumsum([0, *map(len, found.values())]).astype(np.int32)
    return first, np.array([group for each in found.values() for group in each], dtype=np.int32)


@inner
def _push(w: Layout, change: int, slot: int, which: int, option: int) -> None:
    at = w.tally[LOGGED]
    if at == len(w.log):
        raise RuntimeError("more changes than a move can make")
    w.log[at, 0], w.log[at, 1], w.log[at, 2], w.log[at, 3] = change, slot, which, option
    w.tally[LOGGED] = at + 1


@inner
def affordable(w: Layout, slot: int, service: int) -> bool:
    """Return whether the budget of ``service`` covers one more replica at ``slot``."""
    return bool(w.gpus_of[service] + w.size_of[w.group_at[slot]] <= w.max_gpus[service])


@inner
def fits(w: Layout, slot: int, option: int) -> bool:
    """Return whether ``option`` may join the group at ``slot``, which does not run its service yet."""
    if not affordable(w, slot, w.service_of[option]):
        return False
    for stage in range(w.memory.shape[1]):  # noqa: SIM110 - compiled code knows no generators
        if w.used[slot, stage] + w.memory[option, stage] > 1.0 + _ROUNDING:
            return False
    return True


@inner
def spare(w: Layout, service: int) -> bool:
    """Return whether ``service`` has more replicas than it must have."""
    return bool(w.replicas[service] > w.min_replicas[service])


@inner
def in_the_way(w: Layout, group: int) -> bool:
    """Return whether a GPU of ``group`` is in use."""
    for gpu in w.covered[group]:  # noqa: SIM110 - compiled code knows no generators
        if gpu >= 0 and w.owner[gpu] >= 0:
            return True
    return False


@inner
def _open(w: Layout, group: int) -> None:
    slot = w.slot_of[group]
    for gpu in w.covered[group]:
        if gpu >= 0:
            w.owner[gpu] = slot
    w.group_at[slot] = group
    w.used[slot] = 0.0
    w.open_at[slot] = w.tally[OPEN]
    w.open_slots[w.tally[OPEN]] = slot
    w.tally[OPEN] += 1


@inner
def _close(w: Layout, slot: int) -> None:
    for gpu in w.covered[w.group_at[slot]]:
        if gpu >= 0:
            w.owner[gpu] = -1
    w.group_at[slot] = -1
    w.tally[OPEN] -= 1
    last = w.open_slots[w.tally[OPEN]]
    w.open_slots[w.open_at[slot]] = last
    w.open_at[last] = w.open_at[slot]


@inner
def _add(w: Layout, slot: int, option: int) -> None:
    service = w.service_of[option]
    w.option_at[slot, service] = option
    w.tenant[slot, w.tenants[slot]] = service
    w.tenants[slot] += 1
    for stage in range(w.memory.shape[1]):
        w.used[slot, stage] += w.memory[option, stage]
    w.gpus_of[service] += w.size_of[w.group_at[slot]]
    place = w.replicas[service]
    while place > 0 and w.slot[service, place - 1] > slot:
        w.slot[service, place] = w.slot[service, place - 1]
        w.option[service, place] = w.option[service, place - 1]
        place -= 1
    w.slot[service, place] = slot
    w.option[service, place] = option
    w.replicas[service] += 1


@inner
def _remove(w: Layout, slot: int, service: int) -> int:
    option = int(w.option_at[slot, service])
    w.option_at[slot, service] = -1
    w.tenants[slot] -= 1
    place = 0
    while w.tenant[slot, place] != service:
        place += 1
    w.tenant[slot, place] = w.tenant[slot, w.tenants[slot]]
    for stage in range(w.memory.shape[1]):
        w.used[slot, stage] -= w.memory[option, stage]
    w.gpus_of[service] -= w.size_of[w.group_at[slot]]
    w.replicas[service] -= 1
    place = 0
    while w.slot[service, place] != slot:
        place += 1
    for replica in range(place, w.replicas[service]):
        w.slot[service, replica] = w.slot[service, replica + 1]
        w.option[service, replica] = w.option[service, replica + 1]
    return option


@inner
def open_group(w: Layout, group: int) -> int:
    """Put ``group``, none of whose GPUs is in use, to use; return its slot."""
    _open(w, group)
    _push(w, _OPENED, w.slot_of[group], group, 0)
    return int(w.slot_of[group])


@inner
def add_replica(w: Layout, slot: int, option: int) -> None:
    """Let the group at ``slot`` run ``option``, which must fit."""
    _add(w, slot, option)
    _push(w, _ADDED, slot, w.service_of[option], option)


@inner
def remove_replica(w: Layout, slot: int, service: int) -> None:
    """Take ``service`` off the group at ``slot``."""
    _push(w, _REMOVED, slot, service, w.option_at[slot, service])
    _remove(w, slot, service)


@inner
def close_group(w: Layout, slot: int) -> None:
    """Take the group at ``slot`` out of use, with all that it runs."""
    while w.tenants[slot] > 0:
        remove_replica(w, slot, w.tenant[slot, w.tenants[slot] - 1])
    _push(w, _CLOSED, slot, w.group_at[slot], 0)
    _close(w, slot)


@inner
def rollback(w: Layout, mark: int) -> None:
    """Undo every change after the first ``mark`` ones; only the order of lists may differ from before."""
    while w.tally[LOGGED] > mark:
        w.tally[LOGGED] -= 1
        at = w.tally[LOGGED]
        change, slot, which, option = w.log[at, 0], w.log[at, 1], w.log[at, 2], w.log[at, 3]
        if change == _ADDED:
            _remove(w, slot, which)
        elif change == _REMOVED:
            _add(w, slot, option)
        elif change == _OPENED:
            _close(w, slot)
        else:
            _open(w, which)


@inner
def clear(w: Layout) -> None:
    """Close all groups, which can not be undone."""
    while w.tally[OPEN] > 0:
        w.tally[LOGGED] = 0
        close_group(w, w.open_slots[w.tally[OPEN] - 1])
    w.tally[LOGGED] = w.tally[ASIDE] = 0


@inner
def touches(w: Layout, at: int) -> tuple[int, int]:
    """Return the slot and the service that entry ``at`` of the log changed; service -1 where it is a group."""
    replica = w.log[at, 0] == _ADDED or w.log[at, 0] == _REMOVED
    return w.log[at, 1], w.log[at, 2] if replica else -1


@inner
def keeps(w: Layout) -> bool:
    """Return whether minimum replicas, spreading and the least number of nodes are kept."""
    for service in range(len(w.replicas)):
        if w.replicas[service] < w.min_replicas[service]:
            return False
        rule = w.spread_of[service]
        if rule >= 0 and not _spread(w, service, rule):
            return False
        if w.fewest_nodes[0] > 1 and w.replicas[service] > 0:
            first = w.node_of[w.slot[service, 0]]
            if w.node_of[w.slot[service, w.replicas[service] - 1]] == first:
                return False  # replicas are in the order of their GPUs, and so in that of their nodes
    return True


@inner
def _spread(w: Layout, service: int, rule: int) -> bool:
    domains = w.spread[rule, 0]
    held = np.zeros(domains, dtype=np.int32)
    for replica in range(w.replicas[service]):
        held[w.domain_of[rule, w.group_at[w.slot[service, replica]]]] += 1
    used = 0
    for domain in range(domains):
        used += held[domain] > 0
    return bool(used >= w.spread[rule, 2] and held.max() - held.min() <= w.spread[rule, 1])
