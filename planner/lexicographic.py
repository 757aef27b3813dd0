"""Solving the objectives in their order, each with a proven bound, within one time budget.

Each objective is solved in up to three stages that stop as soon as the gap is closed:

1. over classes of interchangeable groups: few variables, no symmetry, a bound that holds for the exact model too;
2. the counts of stage 1 packed onto groups, with the rates made optimal by a linear program;
3. the exact model over single groups, first with the options that the stages before used, then with all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.backend import Budget, InfeasibleModel, Solution, Solver, local_solver, solver_for
from planner.board import NEGLIGIBLE
from planner.formulation import Formulation
from planner.greedy import Order, Target, greedy, pack, running
from planner.guidance import Guidance, guidance_of
from planner.linear import Floats, LinearModel
from planner.neighbourhood import neighbourhoods
from planner.objective import ACCURACY, GOODPUT, Kept, Objective, gap_of, tiers, with_kept
from planner.redundancy import largest_first, placed_apart, redundant_starts, with_room
from planner.regroup import decided_anew, left_to
from planner.space import Placed, Placement, PlanningSpace
from planner.tier import Exhausted, Outcome, Tier, TierOutcome, Unsatisfiable

__all__ = ["LARGEST_EXACT_MODEL", "LEAST_RELAXATION_S", "Search"]

LARGEST_EXACT_MODEL = 40_000
"""Pairs of group and option up to which the exact model is worth building; beyond, columns are generated."""

_SMALL_EXACT_MODEL = 600
"""Pairs up to which the exact model is solved at once; larger ones are searched locally first."""

_EXACT_MODEL_S = 1e-4
"""Seconds per pair that building and reducing the exact model may take before its solver looks at the clock."""

_FREED_PAIRS = (100, 160, 250, 400)
"""Pairs that one neighbourhood decides about, mostly within tens of milliseconds: more after rounds without a gain."""

_GROWS_AFTER = 4
"""Such rounds in a row after which neighbourhoods grow."""

_NEIGHBOURHOOD_NODES = 50
"""Nodes of the search tree for one neighbourhood; a limit in seconds would make the plan depend on the machine."""

_NEIGHBOURHOOD_GAP = 1e-3
"""Gap at which one neighbourhood counts as solved."""

_LATER_GAP = 0.01
"""Gap at which the local search leaves an objective after the first."""

_STALLED_GAPS = 10
"""Times the gap asked for: when the local search stalls within that, the first objective is left as it is."""

_FIRST_ROUNDS = 200
"""Neighbourhoods for the first objective."""

_LATER_ROUNDS = 10
"""Neighbourhoods for an objective after the first."""

_STALLED_ROUNDS = 30
"""Neighbourhoods without a gain after which an objective is left as it is."""

_FIRST_STALLED_ROUNDS = 10
"""The same before whole counts over classes are known."""

LEAST_RELAXATION_S = 0.5
"""Seconds that a linear relaxation may take also when time is over, so that no objective is left without a bound."""

_COUNTING_SHARE = 0.4
"""Share of the time left to an objective that whole counts over classes may take."""

_COUNTING_SHARE_APART = 0.6
"""The same where neighbourhoods were searched before: where these stalled, the counts are what leads on."""

_FIXED = ("gpus", "gpu-cost", "bytes-moved")
"""Objectives that rates alone do not change."""

_TIER_SHARE = (0.65, 0.5, 0.6, 0.9)
"""Share of the time left that each objective may take."""


class Search:
    """The lexicographic search over one planning space."""

    def __init__(
        self, space: PlanningSpace, clock: Callable[[], float], ends_at_s: float, *, known: Placement | None = None
    ) -> None:
        """Prepare; ``known`` is a placement to start from beside the running plan and the greedy ones."""
        self._space = space
        self._known = known
        self._settings = space.problem.settings
        self._clock = clock
        self._ends_at_s = ends_at_s
        self._solver: Solver = solver_for(self._settings)
        self._local_solver = local_solver(self._settings.backend)
        self._classes_model: Formulation | None = None
        self._exact: Formulation | None = None
        self._guidance = Guidance()
        self._large = space.pair_count > _SMALL_EXACT_MODEL
        self._apart = self._large and _separable(space)

    @property
    def _over_classes(self) -> Formulation:
        if self._classes_model is None:
            self._classes_model = Formulation(self._space, self._space.classes)
        return self._classes_model

    def run(self) -> Outcome | Unsatisfiable | Exhausted:
        """Solve every objective in turn."""
        best = self._start()
        kept: tuple[Kept, ...] = ()
        outcomes: list[TierOutcome] = []
        for position, objective in enumerate(tiers(self._space)):
            tier = Tier(
                objective=objective,
                kept=kept,
                best=best,
                ends_at_s=self._tier_end(position),
                known_bound=objective.trivial_bound(self._space),
            )
            proven_infeasible = self._solve_tier(tier)
            if tier.best is None:
                return Unsatisfiable() if proven_infeasible else Exhausted(bound=tier.known_bound)
            best = tier.best
            value = objective.value(self._space, best)
            outcomes.append(TierOutcome(objective=objective, value=value, bound=tier.bound_for(value), open=tier.open))
            kept = (*kept, Kept(objective=objective, limit=objective.limit(value, self._settings.tolerance)))
        assert best is not None
        final = self._recovered(best)
        return Outcome(placement=final, tiers=tuple(self._certified(each, final) for each in outcomes))

    def _recovered(self, placement: Placement) -> Placement:
        """Return ``placement`` with what tolerance cost goodput and accuracy, where that can be had back for free."""
        for objective in (GOODPUT, ACCURACY):
            others = [each for each in tiers(self._space) if each is not objective and each.name not in _FIXED]
            kept = tuple(
                Kept(objective=each, limit=each.limit(each.value(self._space, placement), 1e-9)) for each in others
            )
            rated = self.best_rates(_pairs(placement), objective, kept)
            if rated is None:
                continue
            better = _trimmed(self._space, rated)
            gains = objective.better(objective.value(self._space, better), objective.value(self._space, placement))
            if gains and all(each.holds(each.objective.value(self._space, better)) for each in kept):
                placement = better
        return placement

    def _certified(self, outcome: TierOutcome, placement: Placement) -> TierOutcome:
        """Return ``outcome`` with the value of the final ``placement``, which later objectives may have lowered.

        A bound may fall short of it by the rounding of the solver only. Where `gap_of` says that both are equal, they
        are stated as equal, so that whoever divides anew finds no gap between two roundings of nothing.
        """
        value = outcome.objective.value(self._space, placement)
        worst = max if outcome.objective.maximise else min
        bound = worst(outcome.bound, value)
        return replace(outcome, value=value, bound=bound if gap_of(value, bound) > 0 else value)

    def tier_value(self, placement: Placement) -> tuple[float, ...]:
        """Return the value of every objective for ``placement``, larger is better."""
        return tuple(each.value(self._space, placement) * (1 if each.maximise else -1) for each in tiers(self._space))

    def best_rates(
        self, pairs: list[tuple[int, int]], objective: Objective, kept: tuple[Kept, ...]
    ) -> Placement | None:
        """Return ``pairs`` (group, option) with the rates best for ``objective``; None when none keep ``kept``."""
        places = sorted({group for group, _ in pairs})
        position = {group: index for index, group in enumerate(places)}
        chosen = [self._space.singles[group] for group in places]
        of_chosen = sorted((position[group], option) for group, option in pairs)
        fixed = Formulation(self._space, chosen, of_chosen, fixed=True)
        model = with_kept(fixed, objective, kept)
        lower = model.lower.copy()
        lower[fixed.use] = 1.0
        lower[fixed.run] = 1.0
        answer = self._solver.solve(
            model.with_bounds(lower, model.upper).relaxed(but=fixed.fair.integers),
            Budget(time_limit_s=max(1.0, self._ends_at_s - self._clock()), seed=self._settings.seed),
        )
        return fixed.decode(answer.values) if isinstance(answer, Solution) else None

    def _start(self) -> Placement | None:
        """Return the best of the running plan and of greedy ones, with optimal rates."""
        best: Placement | None = None
        starts = [running(self._space), self._known, greedy(self._space)]
        if self._space.requirements.losses:
            starts += redundant_starts(self._space)
        for placement in starts:
            if placement is None:
                continue
            rated = self.best_rates(_pairs(placement), GOODPUT, ())
            if rated is None and self._space.requirements.restrict:
                continue
            rated = rated or placement
            if best is None or self.tier_value(rated) > self.tier_value(best):
                best = rated
        return best

    def _tier_end(self, position: int) -> float:
        now = self._clock()
        return now + max(0.0, self._ends_at_s - now) * _TIER_SHARE[min(position, len(_TIER_SHARE) - 1)]

    def _solve_tier(self, tier: Tier) -> bool:
        """Improve ``tier`` until its gap is closed, nothing helps or time is over; True when proven infeasible."""
        if tier.best is not None:
            self._offer(tier, self.best_rates(_pairs(tier.best), tier.objective, tier.kept))
        if self._apart and not tier.kept and tier.best is not None:
            # Whole counts over classes take longer than what they mostly bring here.
            self._bound_by_relaxation(tier, with_kept(self._over_classes, tier.objective, tier.kept))
            self._search_neighbourhoods(tier, most_stalled=_FIRST_STALLED_ROUNDS)
            if self._closed(tier):
                return False
        targets = self._solve_classes(tier)
        if targets is None:
            return True
        self._guidance = self._guidance.with_used(option for _, option, _, _ in targets)
        self._pack(tier, targets)
        if tier.best is None:
            self._solve_groups(tier, self._promising(tier, targets), proves=False)
        if self._closed(tier):
            return False
        if self._large and tier.best is not None:
            self._search_neighbourhoods(tier)
            good_enough = bool(tier.kept) or self._closed(tier, _STALLED_GAPS * self._settings.gap)
            if good_enough or not self._time_for_groups(tier):
                tier.open = not self._closed(tier)
                return False
        return self._solve_groups(tier, None, proves=True)

    def _time_for_groups(self, tier: Tier) -> bool:
        """Whether the exact model is worth building: solvers look at the clock only after they reduced it."""
        pairs = self._space.pair_count
        return pairs <= LARGEST_EXACT_MODEL and tier.ends_at_s - self._clock() > _EXACT_MODEL_S * pairs

    def _search_neighbourhoods(self, tier: Tier, *, most_stalled: int = _STALLED_ROUNDS) -> None:
        """Free a few groups at a time and solve them exactly, until nothing was gained for some rounds."""
        generator = np.random.default_rng(self._settings.seed)
        target = _LATER_GAP if tier.kept else 0.0
        most_rounds = _LATER_ROUNDS if tier.kept else _FIRST_ROUNDS
        rounds = stalled = 0
        while tier.best is not None and stalled < most_stalled and rounds < most_rounds:
            if self._closed(tier, target):
                return
            best = tier.best
            options = self._options_to_consider(best, generator, everything=stalled % 3 == 2)
            most_pairs = _FREED_PAIRS[min(stalled // _GROWS_AFTER, len(_FREED_PAIRS) - 1)]
            for free, stays in neighbourhoods(self._space, best, options, generator, most_pairs=most_pairs):
                if self._clock() >= tier.ends_at_s:
                    return
                if self._apart:
                    self._decide_anew(tier, best, free)
                else:
                    self._solve_neighbourhood(tier, free, stays)
                break
            rounds += 1
            stalled = stalled + 1 if tier.best is best else 0

    def _decide_anew(self, tier: Tier, placement: Placement, free: list[tuple[int, int]]) -> None:
        """Solve the groups of ``free`` for what all others leave of the demand; the model holds these groups alone."""
        options: dict[int, list[int]] = {group: [] for group, _ in free}
        rest = left_to(self._space, (placed for placed in placement if placed.group not in options))
        for group, option in free:
            if rest.share_cap[option] > NEGLIGIBLE:
                options[group].append(option)
        found = decided_anew(
            self._space,
            placement,
            tier.objective,
            tier.kept,
            sorted(options),
            options,
            self._local_solver,
            self._local_budget(tier),
        )
        self._offer(tier, found)
        if tier.best is not None and tier.best is not placement:
            self._offer(tier, self.best_rates(_pairs(tier.best), tier.objective, tier.kept))

    def _local_budget(self, tier: Tier) -> Budget:
        return Budget(
            time_limit_s=max(0.05, tier.ends_at_s - self._clock()),
            gap=max(self._settings.gap, _NEIGHBOURHOOD_GAP),
            seed=self._settings.seed,
            node_limit=_NEIGHBOURHOOD_NODES,
        )

    def _solve_neighbourhood(self, tier: Tier, free: list[tuple[int, int]], stays: list[tuple[int, int]]) -> None:
        places = sorted({group for group, _ in (*free, *stays)})
        position = {group: index for index, group in enumerate(places)}
        pairs = sorted((position[group], option) for group, option in (*free, *stays))
        singles = [self._space.singles[group] for group in places]
        formulation = Formulation(self._space, singles, pairs, ordered=False)
        model = with_kept(formulation, tier.objective, tier.kept)
        lower = model.lower.copy()
        fixed = {(position[group], option) for group, option in stays}
        lower[formulation.run[[index for index, pair in enumerate(pairs) if pair in fixed]]] = 1.0
        model = model.with_bounds(lower, model.upper)
        answer = self._local_solver.solve(model, self._local_budget(tier), _verified(formulation, model, tier.best))
        if isinstance(answer, Solution):
            self._offer(tier, formulation.decode(answer.values))

    def _options_to_consider(
        self, placement: Placement, generator: np.random.Generator, *, everything: bool
    ) -> list[frozenset[int]]:
        """Return per group what ``placement`` or a model over classes uses somewhere, and a few options that may do.

        These are drawn from what the relaxation nearly took; with ``everything`` they are all there are, where no
        relaxation told.
        """
        if everything and not self._guidance.promising:
            return [frozenset(group.options) for group in self._space.groups]
        some = self._guidance.draw(generator) | {placed.option for placed in placement}
        return [some.intersection(group.options) for group in self._space.groups]

    def _closed(self, tier: Tier, gap: float = 0.0) -> bool:
        if tier.best is None:
            return False
        value = tier.objective.value(self._space, tier.best)
        return gap_of(value, tier.bound_for(value)) <= max(self._settings.gap, gap, 1e-7)

    def _solve_classes(self, tier: Tier) -> list[Target] | None:
        """Bound ``tier`` over classes; return what to pack, or None when even this relaxation is infeasible."""
        over = self._over_classes
        model = with_kept(over, tier.objective, tier.kept)
        if self._apart:
            self._bound_by_relaxation(tier, model)
        share = _COUNTING_SHARE_APART if self._apart and not tier.kept else _COUNTING_SHARE
        time_limit_s = max(0.05, share * (tier.ends_at_s - self._clock()))
        budget = Budget(time_limit_s=time_limit_s, gap=self._settings.gap / 4, seed=self._settings.seed)
        answer = self._solver.solve(model, budget)
        if isinstance(answer, InfeasibleModel):
            return None
        if not self._apart and (not isinstance(answer, Solution) or answer.stopped == "limit"):
            self._bound_by_relaxation(tier, model)
        tier.tighten(answer.bound)
        return _targets(over, answer.values) if isinstance(answer, Solution) else []

    def _bound_by_relaxation(self, tier: Tier, model: LinearModel) -> None:
        """Bound ``tier`` by the linear relaxation over classes, which takes a fraction of what whole counts take."""
        limit_s = max(LEAST_RELAXATION_S, tier.ends_at_s - self._clock())
        relaxed = model.relaxed()
        answer = self._solver.solve(relaxed, Budget(time_limit_s=limit_s, seed=self._settings.seed))
        if isinstance(answer, Solution):
            tier.tighten(answer.bound)
            self._guidance = guidance_of(self._over_classes, relaxed, answer)

    def _pack(self, tier: Tier, targets: list[Target]) -> None:
        orders: tuple[Order, ...] = ("memory", "share", "density")
        if self._space.requirements.losses:
            wanted = with_room(self._space, targets)
            for order in orders[:2]:
                placement = placed_apart(self._space, largest_first(self._space, wanted, order))
                self._offer(tier, self.best_rates(_pairs(placement), tier.objective, tier.kept))
        for order in orders:
            packed = pack(self._space, targets, order)
            if packed is not None:
                self._offer(tier, self.best_rates(_pairs(packed), tier.objective, tier.kept))
            if self._closed(tier) or (tier.best is not None and self._clock() >= tier.ends_at_s):
                return

    def _promising(self, tier: Tier, targets: list[Target]) -> list[tuple[int, int]]:
        """Return the (group, option) pairs of the exact model that the stages before found worth using."""
        pairs = {(placed.group, placed.option) for placed in tier.best or ()}
        by_class: dict[int, set[int]] = {place: set() for place in range(len(self._space.classes))}
        for place, option, _, _ in targets:
            by_class[place].add(option)
        class_of = {member: place for place, each in enumerate(self._space.classes) for member in each.members}
        for group, option in list(pairs):
            by_class[class_of[group]].add(option)
        for place, options in by_class.items():
            pairs.update((group, option) for group in self._space.classes[place].members for option in options)
        return sorted(pairs)

    def _solve_groups(self, tier: Tier, pairs: list[tuple[int, int]] | None, *, proves: bool) -> bool:
        """Solve the model over single groups; True when it proves infeasibility."""
        if pairs is None:
            if self._exact is None:
                self._exact = Formulation(self._space, self._space.singles)
            formulation = self._exact
        else:
            formulation = Formulation(self._space, self._space.singles, pairs)
        model = with_kept(formulation, tier.objective, tier.kept)
        left_s = tier.ends_at_s - self._clock()
        time_limit_s = max(0.05, left_s if proves else 0.5 * left_s)
        budget = Budget(time_limit_s=time_limit_s, gap=self._settings.gap, seed=self._settings.seed)
        answer = self._solver.solve(model, budget, _verified(formulation, model, self._ordered(tier.best)))
        if isinstance(answer, InfeasibleModel):
            return proves and tier.best is None
        tier.open = proves and not (isinstance(answer, Solution) and answer.stopped != "limit")
        if proves:
            tier.tighten(answer.bound)
        if isinstance(answer, Solution):
            found = formulation.decode(answer.values)
            self._offer(tier, self.best_rates(_pairs(found), tier.objective, tier.kept) or found)
        return False

    def _ordered(self, placement: Placement | None) -> Placement | None:
        """Return ``placement`` with interchangeable groups filled from the first on, as the symmetry rows ask."""
        if placement is None or self._space.problem.current is not None or self._space.requirements.calls:
            return placement
        alone = self._over_classes.sole_groups()
        renamed: dict[int, int] = {}
        for each in self._space.classes:
            members = [member for member in each.members if member in alone]
            used = sorted({placed.group for placed in placement} & set(members))
            renamed.update(zip(used, members, strict=False))
        return tuple(sorted(Placed(renamed.get(each.group, each.group), each.option, each.share) for each in placement))

    def _offer(self, tier: Tier, placement: Placement | None) -> None:
        """Take ``placement`` when it keeps the earlier objectives and is better in this one."""
        if placement is None:
            return
        trimmed = _trimmed(self._space, placement)
        if not all(each.holds(each.objective.value(self._space, trimmed)) for each in tier.kept):
            return
        value = tier.objective.value(self._space, trimmed)
        if tier.best is None or tier.objective.better(value, tier.objective.value(self._space, tier.best)):
            tier.best = trimmed


def _verified(formulation: Formulation, model: LinearModel, placement: Placement | None) -> Floats | None:
    """Return ``placement`` as a complete hint, checked to be feasible in ``model``; None otherwise."""
    if placement is None:
        return None
    try:
        values = formulation.encode(placement)
    except KeyError:
        return None
    return values if model.violation(values) <= 1e-6 else None


def _separable(space: PlanningSpace) -> bool:
    """Whether some groups can be decided anew given what the rest serves: no row names more than that."""
    asked = space.requirements
    joined = asked.spreads or asked.couplings or asked.calls or asked.blocks or asked.least_rps.any()
    return space.problem.settings.objective == "goodput" and not joined and not asked.keeps_idle_replicas


def _pairs(placement: Placement) -> list[tuple[int, int]]:
    return [(placed.group, placed.option) for placed in placement]


def _targets(over: Formulation, values: Floats) -> list[Target]:
    chosen = np.flatnonzero((values[over.share] > NEGLIGIBLE) | (values[over.run] > 0.5))
    return [
        (
            int(over.pair_class[pair]),
            int(over.pair_option[pair]),
            float(values[over.share[pair]]),
            round(values[over.run[pair]]),
        )
        for pair in chosen
    ]


def _trimmed(space: PlanningSpace, placement: Placement) -> Placement:
    """Return ``placement`` without replicas that serve nothing, as far as the minimum replicas allow."""
    if space.requirements.keeps_idle_replicas:
        return placement
    counts = np.bincount([space.service_of[each.option] for each in placement], minlength=len(space.names))
    kept = []
    for each in placement:
        service = space.service_of[each.option]
        if each.share <= NEGLIGIBLE and counts[service] > space.min_replicas[service]:
            counts[service] -= 1
        else:
            kept.append(each)
    return tuple(kept)
