"""Why the plan treats a service as it does: what binds, and what speaks against the alternatives."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from planner.backend import Budget, solver
from planner.board import Board
from planner.deadline_split import as_planned
from planner.option import Option, Rejection
from planner.problem import Problem, check
from planner.space import Placed, Placement, PlanningSpace, build_space
from planner.unserved import binding, closest
from planner.whynot import budget_price, price_of
from plans.errors import InvalidInput
from plans.plan import Confidence, Plan
from plans.units import format_bytes, format_seconds
from profiles.latency import worst

__all__ = ["Alternative", "Explanation", "Replica", "explain"]

_MOST_LINES = 6
"""Alternatives of one kind that are listed, so that the answer fits a screen."""

_SCREEN_LINES, _SCREEN_COLUMNS = 40, 120
"""What a screen holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Where the service runs, and how: ``utilisation`` is that of the whole group.

    A batch of ``max_batch`` holds the group for ``hold_s``, so at most ``utilisation_limit * max_batch / hold_s``
    requests per second, ``most_rps``, are served.
    """

    group: str
    variant: str
    max_batch: int
    rate_rps: float
    most_rps: float
    utilisation: float
    utilisation_limit: float
    hold_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Something the plan does not do, and the reason with its numbers."""

    what: str
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The answer to ``explain SERVICE``.

    Attributes:
        service: Name of the service.
        offered_rps: Rate that was planned for.
        served_rps: Rate that the plan serves within the utilisation that it is planned for.
        predicted_rps: Rate that the plan predicts to be served in time, simulated where it was; it may be more.
        binding: What keeps the service from more; ``served in full`` when nothing does.
        replicas: Where it runs.
        parallelisms: The other parallelisms, and why not those.
        places: The nodes and GPU types where it does not run, and why not there.
        variants: The other variants, and why not those.
        confidence: The least trustworthy profile that the answer rests on; None when the service runs nowhere.
        shadow_prices: Weighted requests per second that one more GPU of each type adds to the linear relaxation.
        budget_price: The same for one more GPU of ``max_gpus``; None without one.
        solved_again: What the node that was asked for, and the next smaller and larger parallelism, would cost.
    """

    service: str
    offered_rps: float
    served_rps: float
    predicted_rps: float
    binding: str
    replicas: tuple[Replica, ...]
    parallelisms: tuple[Alternative, ...]
    places: tuple[Alternative, ...]
    variants: tuple[Alternative, ...]
    confidence: Confidence | None
    shadow_prices: dict[str, float]
    budget_price: float | None = None
    solved_again: tuple[Alternative, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the explanation as plain data."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the explanation as lines of text that fit a screen: at most 40 of at most 120 characters."""
        for shown in range(_MOST_LINES, 0, -1):
            found = [line for text in self._texts(shown) for line in _wrapped(text)]
            if len(found) <= _SCREEN_LINES:
                break
        yield from found[:_SCREEN_LINES]

    def _texts(self, shown: int) -> Iterator[str]:
        """Yield the explanation with at most ``shown`` entries of each kind, one text each."""
        yield (
            f"{self.service}: {self.served_rps:.4g} of {self.offered_rps:.4g} rps are served within the planned "
            f"utilisation; {self.predicted_rps:.4g} rps are predicted to be in time"
        )
        yield f"what binds: {self.binding}"
        for replica in self.replicas[:shown]:
            yield (
                f"  on {replica.group}: {replica.variant}, {replica.rate_rps:.4g} of {replica.most_rps:.4g} rps "
                f"({replica.utilisation_limit:.1%} of batch {replica.max_batch} in {format_seconds(replica.hold_s)}); "
                f"the group is used to {replica.utilisation:.1%}"
            )
        if len(self.replicas) > shown:
            yield f"  and on {len(self.replicas) - shown} more groups"
        for title, alternatives in (
            ("why not another variant", self.variants),
            ("why not another parallelism or GPU type", self.parallelisms),
            ("why not another node", self.places),
            ("if it had to (solved again)", self.solved_again),
        ):
            if alternatives:
                yield f"{title}:"
                yield from (f"  {each.what}: {each.why_not}" for each in alternatives[:shown])
        if self.budget_price is not None:
            yield f"one more GPU of max_gpus adds {self.budget_price:.4g} weighted rps to the relaxation's goodput"
        if self.shadow_prices:
            prices = ", ".join(f"{gpu_type} {price:.4g}" for gpu_type, price in sorted(self.shadow_prices.items()))
            yield (
                f"one more GPU adds to the relaxation's goodput, in weighted rps: {prices} "
                "(whole plans gain in steps: `plan --add` solves again)"
            )
        if self.confidence is not None:
            yield f"this rests on profiles that are {self.confidence}"


def _wrapped(text: str) -> list[str]:
    """Return ``text`` in lines of a screen's width."""
    return textwrap.wrap(text, _SCREEN_COLUMNS, subsequent_indent="      ")


def explain(
    problem: Problem, plan: Plan, service: str, *, node: str | None = None, time_limit_s: float = 0.0
) -> Explanation:
    """Explain what ``plan``, made from ``problem``, does about ``service``.

    Args:
        problem: The documents and settings.
        plan: A plan made from them.
        service: Name of the service.
        node: A node to price: what would be lost if the service had to run there too.
        time_limit_s: Seconds for solving again with that node, and with the next smaller and larger parallelism; 0
            leaves all of that out.

    Raises:
        InvalidInput: There is no such service or node, or the documents contradict each other.
    """
    problem = replace(problem, current=plan)
    check(problem)
    problem = as_planned(problem, plan)
    if service not in {each.name for each in problem.services.services}:
        known = ", ".join(each.name for each in problem.services.services)
        raise InvalidInput.of(f"one of the services {known}", where="explain", field="service", found=repr(service))
    nodes = [each.name for each in problem.cluster.nodes]
    if node is not None and node not in nodes:
        expected = f"one of the nodes {', '.join(nodes)}"
        raise InvalidInput.of(expected, where="explain", field="node", found=repr(node))
    space = build_space(problem)
    placement = placement_of(space, plan)
    index = space.names.index(service)
    mine = [placed for placed in placement if space.service_of[placed.option] == index]
    served = float(space.served_rps(placement)[index])
    offered = float(space.offered_rps[index])
    full = served >= offered * (1 - 1e-6)
    running = [space.options[placed.option] for placed in mine]
    return Explanation(
        service=service,
        offered_rps=offered,
        served_rps=served,
        predicted_rps=next((each.goodput_rps for each in plan.predicted if each.service == service), 0.0),
        binding="served in full" if full else _binding(space, placement, index),
        replicas=tuple(_replica(space, placement, placed) for placed in mine),
        parallelisms=_parallelisms(space, index, running, full),
        places=_places(space, placement, index, mine, first=node),
        variants=_variants(space, index, running, full),
        confidence=worst(*(option.confidence for option in running)) if running else None,
        shadow_prices=dict(plan.shadow_prices),
        budget_price=_budget_price(space, index),
        solved_again=_solved_again(space, placement, index, running, node, time_limit_s) if time_limit_s > 0 else (),
    )


def _budget_price(space: PlanningSpace, service: int) -> float | None:
    settings = space.problem.settings
    return budget_price(space, service, solver(settings.backend), Budget(time_limit_s=5.0, seed=settings.seed))


def _solved_again(
    space: PlanningSpace,
    placement: Placement,
    service: int,
    running: list[Option],
    node: str | None,
    time_limit_s: float,
) -> tuple[Alternative, ...]:
    """Price the node asked for, and the next smaller and larger parallelism that the service has options for."""
    shapes = sorted({(o.gpus, o.tp, o.pp) for o in space.options if space.names[service] == o.service})
    used = {(option.gpus, option.tp, option.pp) for option in running}
    smaller = [shape for shape in shapes if used and shape < min(used)][-1:]
    larger = [shape for shape in shapes if used and shape > max(used)][:1]
    hosts = {space.groups[placed.group].node for placed in placement if int(space.service_of[placed.option]) == service}
    asked: list[tuple[str, str | None, tuple[int, int] | None]] = []
    if node is not None:
        asked.append((node, node, None))
    asked += [(f"tp {tp}, pp {pp}", None, (tp, pp)) for _, tp, pp in (*smaller, *larger)]
    found = []
    for what, place, shape in asked:
        part_s = time_limit_s / len(asked)
        if place is not None and place in hosts:
            found.append(Alternative(what=what, why_not="it runs there already"))
            continue
        price = price_of(space, placement, service, node=place, parallelism=shape, time_limit_s=part_s)
        why = f"no answer within {part_s:.2g} s" if price is None else str(price)
        found.append(Alternative(what=what, why_not=why))
    return tuple(found)


def placement_of(space: PlanningSpace, plan: Plan) -> Placement:
    """Return ``plan`` as a placement.

    Raises:
        InvalidInput: The plan runs something that the documents do not offer: it was made from others.
    """
    place_of = {(group.node, group.gpus, group.tp, group.pp): index for index, group in enumerate(space.groups)}
    option_of = {option.key: index for index, option in enumerate(space.options)}
    placement = []
    for group in plan.groups:
        place = place_of.get((group.node, group.gpus, group.tp, group.pp))
        kind = None if place is None else space.groups[place].gpu_type
        for entry in group.loadout:
            key = (entry.service, entry.variant, str(kind), group.tp, group.pp, entry.max_batch)
            if place is None or key not in option_of:
                raise InvalidInput.of(
                    "a plan made from these documents",
                    where="plan",
                    field=f"groups ({group.id}).{entry.service}",
                    found=f"{entry.variant} at batch {entry.max_batch}, which they do not offer",
                    remedy="pass the documents and settings that the plan was made from",
                )
            option = option_of[key]
            placement.append(Placed(place, option, entry.rate_rps / float(space.sustained_rps[option])))
    return tuple(sorted(placement))


def _binding(space: PlanningSpace, placement: Placement, service: int) -> str:
    found = binding(space, placement, service)
    return f"{found.reason}: {found.detail}"


def _replica(space: PlanningSpace, placement: Placement, placed: Placed) -> Replica:
    option = space.options[placed.option]
    together = [each for each in placement if each.group == placed.group]
    return Replica(
        group=space.groups[placed.group].id,
        variant=option.variant,
        max_batch=option.batch,
        rate_rps=placed.share * option.sustained_rps,
        most_rps=option.sustained_rps,
        utilisation=sum(each.share * space.options[each.option].utilisation for each in together),
        utilisation_limit=option.utilisation,
        hold_s=option.hold_s,
    )


def _parallelisms(
    space: PlanningSpace, service: int, running: list[Option], served_in_full: bool
) -> tuple[Alternative, ...]:
    """Compare every parallelism that is not used with what is: the same variant where it has it."""
    name = space.names[service]
    mine = list(space.catalogue.of(name))
    used = {(option.gpu_type, option.tp, option.pp) for option in running}
    offered = {(option.gpu_type, option.tp, option.pp) for option in mine}
    variants = {option.variant for option in running}
    found = []
    for kind in sorted(offered - used):
        there = [each for each in mine if (each.gpu_type, each.tp, each.pp) == kind]
        option = max(there, key=lambda each: (each.variant in variants, _rate_per_gpu(each)))
        why = _against(space, service, option, running, served_in_full)
        found.append(Alternative(what=f"tp {kind[1]}, pp {kind[2]} on {kind[0]}", why_not=why))
    rejected = [each for each in space.catalogue.rejections if each.service == name]
    for kind in sorted({(each.gpu_type, each.tp, each.pp) for each in rejected} - used - offered):
        nearest = closest([each for each in rejected if (each.gpu_type, each.tp, each.pp) == kind])
        why = f"no option works: {_short(nearest)}"
        found.append(Alternative(what=f"tp {kind[1]}, pp {kind[2]} on {kind[0]}", why_not=why))
    return tuple(found[:_MOST_LINES])


def _against(space: PlanningSpace, service: int, option: Option, running: list[Option], served_in_full: bool) -> str:
    """Compare ``option`` with the best one that runs, of the same variant and GPU type where there is one."""
    rate = f"{_rate_per_gpu(option):.4g} rps per GPU ({option.variant}, batch {option.batch})"
    if not running:
        return rate
    placed = max(
        running,
        key=lambda each: (each.variant == option.variant, each.gpu_type == option.gpu_type, _rate_per_gpu(each)),
    )
    text = f"{rate} against {_rate_per_gpu(placed):.4g} as placed ({placed.variant} on {placed.gpu_type})"
    return f"{text}; {_decided_by(space, service, option, placed, served_in_full)}"


def _decided_by(space: PlanningSpace, service: int, option: Option, placed: Option, served_in_full: bool) -> str:
    """Say what speaks for ``placed`` and against ``option``: a limit, or the first objective that tells them apart."""
    first = "goodput" if space.problem.settings.minimize is None else f"fewest {space.problem.settings.minimize}"
    if option.gpus > space.max_gpus[service]:
        return f"max_gpus {space.max_gpus[service]:.0f} is below its {option.gpus} GPUs"
    if served_in_full and option.accuracy < placed.accuracy:
        return f"its accuracy {option.accuracy:.4g} is below {placed.accuracy:.4g}, and accuracy comes before GPU cost"
    prices = space.problem.cluster.gpu_types
    cost = prices[option.gpu_type].cost_per_hour / _rate_per_gpu(option)
    cost_placed = prices[placed.gpu_type].cost_per_hour / _rate_per_gpu(placed)
    if served_in_full and option.accuracy == placed.accuracy and cost > cost_placed * (1 + 1e-9):
        return f"GPU cost decides: {cost:.4g} per hour for each rps against {cost_placed:.4g}"
    if _rate_per_gpu(option) < _rate_per_gpu(placed):
        return f"{first} decides: GPUs used so serve less"
    if served_in_full:
        return "served in full as placed"
    return f"it takes {option.gpus} GPUs of one node at once, which serve more otherwise"


def _places(
    space: PlanningSpace, placement: Placement, service: int, mine: list[Placed], *, first: str | None
) -> tuple[Alternative, ...]:
    """Say for every node without the service what is in the way there; ``first`` comes first."""
    board = Board(space)
    for placed in placement:
        board.place(placed.group, placed.option, placed.share)
    hosts = {space.groups[placed.group].node for placed in mine}
    document = space.problem.services.service(space.names[service])
    options = np.flatnonzero(space.service_of == service)
    found = []
    for node in sorted(space.problem.cluster.nodes, key=lambda each: each.name != first):
        if node.name in hosts:
            continue
        homes = [
            index
            for index, group in enumerate(space.groups)
            if group.node == node.name and set(group.options) & set(options.tolist())
        ]
        if not any(document.allows(node.name, (gpu,)) for gpu in range(node.gpus.count)):
            why = "pin or forbid rules it out"
        elif not homes:
            why = f"no option works on {node.gpus.type}"
        else:
            why = _in_the_way(space, board, homes, options.tolist())
        found.append(Alternative(what=node.name, why_not=why))
    return tuple(found[:_MOST_LINES])


def _in_the_way(space: PlanningSpace, board: Board, homes: list[int], options: list[int]) -> str:
    free = [home for home in homes if board.open_groups()[home]]
    if not free:
        return "its GPUs work in groups of another parallelism"
    left = float(board.compute_left[free].max())
    if left < 0.01:
        return "its GPUs are planned to their limit of utilisation"
    spare = [home for home in free if board.compute_left[home] >= 0.01]
    room = float(board.memory_left()[spare].max())
    needed = float(space.memory[options].max(axis=1).min())
    if room < needed:
        return f"{room:.0%} of memory free at most, the smallest option needs {needed:.0%}"
    service = int(space.service_of[options[0]])
    if min(len(space.groups[home].gpus) for home in spare) > board.budget_left(service):
        return f"max_gpus {space.max_gpus[service]:.0f} is reached"
    if not any(board.fits(option)[spare].any() for option in options):
        return "what runs there would block it, or be blocked by it, beyond a deadline"
    return f"not needed: {left:.0%} of its compute would be free"


def _variants(space: PlanningSpace, index: int, running: list[Option], served_in_full: bool) -> tuple[Alternative, ...]:
    service = space.names[index]
    used = {option.variant for option in running}
    types = {option.gpu_type for option in running}
    document = space.problem.services.service(service)
    found = []
    for variant in document.variants:
        if variant.model in used:
            continue
        options = [option for option in space.catalogue.of(service) if option.variant == variant.model]
        rejected = [
            each for each in space.catalogue.rejections if each.service == service and each.variant == variant.model
        ]
        if options:
            option = max(options, key=lambda each: (each.gpu_type in types, _rate_per_gpu(each)))
            why = f"accuracy {variant.accuracy:.4g}, {_against(space, index, option, running, served_in_full)}"
        elif rejected:
            why = _short(closest(rejected))
        else:
            why = "dominated by another option, or without a profile on the GPU types present"
        found.append(Alternative(what=variant.model, why_not=why))
    return tuple(found[:_MOST_LINES])


def _rate_per_gpu(option: Option) -> float:
    return option.sustained_rps / option.gpus


def _short(rejection: Rejection) -> str:
    needed, available = rejection.needed, rejection.available
    which = f"{rejection.variant} at batch {rejection.batch}"
    if rejection.reason == "memory":
        return f"memory: {which} needs {format_bytes(needed)}, {format_bytes(available)} usable per GPU"
    if rejection.reason == "latency":
        return f"latency: {which} takes {format_seconds(needed)} against a deadline of {format_seconds(available)}"
    return f"accuracy: {available:.4g} of {rejection.variant} is below min_accuracy {needed:.4g}"
