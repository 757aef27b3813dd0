"""Why the plan treats a service as it does: what binds, and what speaks against the alternatives."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.alternatives import MOST_LINES, Alternative, parallelisms, places, variants
from planner.backend import Budget, solver
from planner.deadline_split import as_planned
from planner.option import Option
from planner.problem import Problem, check
from planner.space import Placed, Placement, PlanningSpace, build_space
from planner.unserved import binding
from planner.whynot import budget_price, price_of
from plans.errors import InvalidInput
from plans.plan import Confidence, Plan
from plans.units import format_seconds
from profiles.latency import worst

__all__ = ["Alternative", "Explanation", "Replica", "explain"]

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
        for shown in range(MOST_LINES, 0, -1):
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
        parallelisms=parallelisms(space, index, running, full),
        places=places(space, placement, index, mine, first=node),
        variants=variants(space, index, running, full),
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
