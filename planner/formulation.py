"""The linear model of a planning space, built in four steps: variables, constraints, objective, assembly.

One method per constraint family; the numbers are those of docs/formulation.md. The same model is exact when built over
single groups, and a relaxation with replica counts when built over classes of interchangeable groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.fairness import FairRows
from planner.groups import GroupClass
from planner.linear import Floats, Integers, LinearModel, ModelBuilder
from planner.side_rows import SideRows
from planner.space import Placed, Placement, PlanningSpace

__all__ = ["Formulation"]

_PACKING_ORDERS = (1, 2, 3, 4, 5)
"""Orders of the dual feasible functions in `Formulation._packing`."""


@dataclass(frozen=True, slots=True)
class _LoadoutRow:
    """``values @ x[at] <= times * y`` for the options at the positions ``at``; ``of_share`` names a in place of x."""

    name: str
    at: Integers
    values: Floats
    times: float = 1.0
    of_share: bool = False


class Formulation:
    """Variables and constraints over ``classes``; each class may hold only the options that ``pairs`` gives it.

    Attributes:
        space: The planning space.
        classes: What is placed on, by position.
        pair_class: Shape (pair,): class of each (class, option) pair.
        pair_option: Shape (pair,): its option.
        use: Columns of y, shape (class,).
        run: Columns of x, shape (pair,).
        share: Columns of a, shape (pair,).
        served: Columns of z, shape (service,).
        count: Shape (class,): members, with the extra GPU's.
        side: The rows that join groups beyond demand and budgets, and their variables.
        fair: The rows of an objective on served shares, and their variables.
        has_loadouts: Whether it has the rows of single groups.
        model: The model, with an objective of 0.
    """

    def __init__(
        self,
        space: PlanningSpace,
        classes: Sequence[GroupClass],
        pairs: Sequence[tuple[int, int]] | None = None,
        *,
        ordered: bool = True,
        extra_gpu_type: str | None = None,
        loadouts: bool = True,
        fixed: bool = False,
    ) -> None:
        """Build the model.

        Args:
            space: The planning space.
            classes: What to place on.
            pairs: (class, option) by position; all of them unless given.
            ordered: Whether interchangeable groups are put in order, (4.11).
            extra_gpu_type: A type of which there is one more GPU.
            loadouts: Without them only the rows that join groups are stated, for column generation (section 9).
            fixed: Every replica stands: what only tells replicas apart, (4.2), (4.4) and (4.5), is left out.
        """
        self.space = space
        self.has_loadouts = loadouts
        self._fixed = fixed
        self.classes = tuple(classes)
        if pairs is None:
            pairs = [(position, option) for position, each in enumerate(self.classes) for option in each.options]
        self.pair_class: Integers = np.array([pair[0] for pair in pairs], dtype=np.int64)
        self.pair_option: Integers = np.array([pair[1] for pair in pairs], dtype=np.int64)
        extra = [int(each.gpu_type == extra_gpu_type) for each in self.classes]
        self._symmetric = (
            ordered
            and space.problem.current is None
            and not space.requirements.calls
            and all(each.count == 1 for each in self.classes)
        )
        self._extra_gpu_type = extra_gpu_type
        self.count: Floats = np.array([each.count for each in self.classes], dtype=np.float64) + np.array(extra)
        self._of_class = _runs(self.pair_class, len(self.classes))
        self._builder = ModelBuilder()
        self._add_variables()
        self._add_constraints()
        self.model: LinearModel = self._builder.build()

    # Step 1: variables.

    def _add_variables(self) -> None:
        """Add y (group used), x (option runs), a (compute share), z (rate served): section 4."""
        space, builder = self.space, self._builder
        places = [self._label(each) for each in self.classes]
        options = [f"{each.service}.{each.variant}.b{each.batch}" for each in space.options]
        pairs = [
            f"[{options[option]},{places[place]}]"
            for place, option in zip(self.pair_class, self.pair_option, strict=True)
        ]
        count = self.count[self.pair_class] if len(self.pair_class) else np.zeros(0)
        cap = space.share_cap[self.pair_option] if len(self.pair_option) else np.zeros(0)
        self.use = builder.add_variables([f"use[{place}]" for place in places], upper=self.count, integer=True)
        self.run = builder.add_variables([f"run{pair}" for pair in pairs], upper=count, integer=True)
        self.share = builder.add_variables([f"share{pair}" for pair in pairs], upper=count * cap, integer=False)
        self.served = builder.add_variables(
            [f"served[{name}]" for name in space.names], upper=space.offered_rps, integer=False
        )

    def _label(self, each: GroupClass) -> str:
        first = self.space.groups[each.members[0]]
        members = f"&{each.count}" if each.count > 1 else ""
        return f"{first.id}!tp{each.tp}pp{each.pp}{members}"

    # Step 2: constraints.

    def _add_constraints(self) -> None:
        if self.has_loadouts:
            self._add_loadouts()
        self._one_group_per_gpu()
        self._demand()
        self._budgets()
        self._min_replicas()
        self._symmetry()
        self.side = SideRows(self, self._builder)
        self.side.add()
        self.fair = FairRows(self, self._builder)
        self.fair.add()

    def _add_loadouts(self) -> None:
        """Add (4.1) to (4.6), what one group may run: all that names the variables of a single group or class."""
        of_options: dict[tuple[int, bytes], tuple[_LoadoutRow, ...]] = {}
        for place, each in enumerate(self.classes):
            pairs = self._of_class[place]
            options = self.pair_option[pairs]
            key = (each.pp, options.tobytes())
            if key not in of_options:
                of_options[key] = tuple(self._loadout_rows(options, each.pp))
            label = self._label(each)
            for row in of_options[key]:
                columns = (self.share if row.of_share else self.run)[pairs[row.at]]
                self._builder.add_row(
                    f"{row.name}[{label}]",
                    np.append(columns, self.use[place]),
                    np.append(row.values, -row.times),
                    upper=0.0,
                )
        self._linking()

    def _loadout_rows(self, options: Integers, stages: int) -> Iterator[_LoadoutRow]:
        """Yield what holds for any group that may run ``options``, so that groups that are alike share the work."""
        yield from self._memory(options, stages)
        if not self._fixed:
            yield from self._packing(options, stages)
        yield from self._compute(options)
        if not self._fixed:
            yield from self._one_option_per_service(options)
            yield from self._blocking(options)

    def _memory(self, options: Integers, stages: int) -> Iterator[_LoadoutRow]:
        """(4.1) sum over o of m[o, j] x[g, o] <= M (1 - h) y[g] for every stage j of group g, in units of M (1 - h)."""
        for stage in range(stages):
            yield _LoadoutRow(f"memory{stage}", np.arange(len(options)), self.space.memory[options, stage])

    def _packing(self, options: Integers, stages: int) -> Iterator[_LoadoutRow]:
        """(4.2) sum over o of f_k(m[o, j] / M (1 - h)) x[g, o] <= y[g] for the dual feasible functions f_1 .. f_5.

        Implied for integers, and much tighter than (4.1) without integrality: f_1 says that at most one option of more
        than half the memory fits. Source: Fekete and Schepers, Math. Programming 91 (2001), theorem 1.
        """
        seen = set()
        for stage in range(stages):
            memory = self.space.memory[options, stage]
            for order in _PACKING_ORDERS:
                scaled = memory * (order + 1)
                whole = np.abs(scaled - np.round(scaled)) < 1e-9
                values = np.where(whole, memory, np.floor(scaled) / order)
                if (values > memory + 1e-9).any() and values.tobytes() not in seen:
                    seen.add(values.tobytes())
                    yield _LoadoutRow(f"packing{stage}.{order}", np.arange(len(options)), values)

    def _compute(self, options: Integers) -> Iterator[_LoadoutRow]:
        """(4.3) sum over o of a[g, o] <= y[g], where a[g, o] = (u[o] / rho[o]) r[g, o]."""
        yield _LoadoutRow("compute", np.arange(len(options)), np.ones(len(options)), of_share=True)

    def _one_option_per_service(self, options: Integers) -> Iterator[_LoadoutRow]:
        """(4.4) sum over the options o of service s of x[g, o] <= y[g]."""
        services = self.space.service_of[options]
        for service in np.unique(services):
            mine = np.flatnonzero(services == service)
            yield _LoadoutRow(f"one.{self.space.names[service]}", mine, np.ones(len(mine)))

    def _blocking(self, options: Integers) -> Iterator[_LoadoutRow]:
        """(4.5) sum over P of x[g, p] <= K (y[g] - sum over O of x[g, o]).

        O are the options of one service with one set P of conflicting options of other services, and K is the number
        of services in P: of O and P only one side may run. Options conflict when the charged hold of one is longer
        than the slack of the other (section 3.3).
        """
        clashes = self.space.conflicts(options, options)
        services = self.space.service_of[options]
        done = set()
        for index in np.flatnonzero(clashes.any(axis=1)):
            others = np.flatnonzero(clashes[index])
            # Options of the same service that clash with at least the same others join the left side.
            alike = np.flatnonzero((services == services[index]) & clashes[:, others].all(axis=1))
            most = float(len(np.unique(services[others])))
            # With one service on either side the row is the same seen from both.
            key = tuple(sorted([*alike, *others])) if most == 1 else (*alike, -1, *others)
            if key in done:
                continue
            done.add(key)
            values = np.concatenate([np.full(len(alike), most), np.ones(len(others))])
            yield _LoadoutRow(f"blocking.{index}", np.concatenate([alike, others]), values, times=most)

    def _linking(self) -> None:
        """(4.6) a[g, o] <= min(1, d[s] u[o] / rho[o]) x[g, o]: no option, no compute, and none beyond demand."""
        for pair, (run, share) in enumerate(zip(self.run, self.share, strict=True)):
            cap = self.space.share_cap[self.pair_option[pair]]
            self._builder.add_row(f"link.{pair}", [share, run], [1.0, -cap], upper=0.0)

    def _one_group_per_gpu(self) -> None:
        """(4.7) sum over the groups g that hold GPU d of y[g] <= 1; over classes, sum of k y <= GPUs of the type."""
        if all(each.count == 1 for each in self.classes) and self._extra_gpu_type is None:
            self._gpu_rows()
            return
        for gpu_type in sorted({each.gpu_type for each in self.classes}):
            mine = [place for place, each in enumerate(self.classes) if each.gpu_type == gpu_type]
            gpus = [float(self.classes[place].gpus) for place in mine]
            limit = self.space.gpu_count(gpu_type) + (gpu_type == self._extra_gpu_type)
            self._builder.add_row(f"gpus.{gpu_type}", self.use[mine], gpus, upper=float(limit))

    def _gpu_rows(self) -> None:
        holders: dict[tuple[str, int], list[int]] = {}
        for place, each in enumerate(self.classes):
            group = self.space.groups[each.members[0]]
            for gpu in group.gpus:
                holders.setdefault((group.node, gpu), []).append(place)
        sets = {tuple(places): gpu for gpu, places in reversed(holders.items()) if len(places) > 1}
        for places, (node, gpu) in sorted(sets.items()):
            if not any(set(places) < set(other) for other in sets):
                self._builder.add_row(f"gpu.{node}/{gpu}", self.use[list(places)], np.ones(len(places)), upper=1.0)

    def _demand(self) -> None:
        """(4.8) z[s] = sum over g and the options o of s of (rho[o] / u[o]) a[g, o], with z[s] <= d[s] as its bound."""
        rates = self.space.sustained_rps[self.pair_option] if len(self.pair_option) else np.zeros(0)
        for service, pairs in enumerate(self._of_service()):
            columns = np.concatenate([self.share[pairs], [self.served[service]]])
            values = np.concatenate([rates[pairs], [-1.0]])
            self._builder.add_row(f"demand.{self.space.names[service]}", columns, values, lower=0.0, upper=0.0)

    def _budgets(self) -> None:
        """(4.9) sum over g and the options o of s of k[g] x[g, o] <= max_gpus[s]."""
        gpus = np.array([float(each.gpus) for each in self.classes])
        for service, pairs in enumerate(self._of_service()):
            limit = self.space.max_gpus[service]
            if np.isfinite(limit) and len(pairs):
                name = f"budget.{self.space.names[service]}"
                self._builder.add_row(name, self.run[pairs], gpus[self.pair_class[pairs]], upper=limit)

    def _min_replicas(self) -> None:
        """(4.10) sum over g and the options o of s of x[g, o] >= min_replicas[s]."""
        for service, pairs in enumerate(self._of_service()):
            least = float(self.space.min_replicas[service])
            if least > 0:
                name = f"replicas.{self.space.names[service]}"
                # A service without any option leaves an empty row, which no values satisfy.
                self._builder.add_row(name, self.run[pairs], np.ones(len(pairs)), lower=least)

    def _symmetry(self) -> None:
        """(4.11) y[g] >= y[g'] for consecutive members g, g' of a class on whose GPUs no other group may stand.

        Left out with a running plan or an affinity, which tell the members apart.
        """
        if not self._symmetric:
            return
        place_of = {each.members[0]: place for place, each in enumerate(self.classes)}
        alone = self.sole_groups()
        for each in self.space.classes:
            members = [place_of[member] for member in each.members if member in place_of and member in alone]
            for before, after in itertools.pairwise(members):
                self._builder.add_row(f"order.{after}", self.use[[before, after]], [1.0, -1.0], lower=0.0)

    def sole_groups(self) -> frozenset[int]:
        """Return the groups (positions) that share no GPU with another candidate group."""
        holders: dict[tuple[str, int], list[int]] = {}
        for position, group in enumerate(self.space.groups):
            for gpu in group.gpus:
                holders.setdefault((group.node, gpu), []).append(position)
        shared = {position for places in holders.values() if len(places) > 1 for position in places}
        return frozenset(range(len(self.space.groups))) - shared

    # Step 3: objectives.

    def goodput(self) -> Floats:
        """(5.1) sum over s of weight[s] z[s], to maximise; coefficients of shape (variable,)."""
        return self._coefficients(self.served, self.space.weight)

    def accuracy(self) -> Floats:
        """(5.2) sum over g, o of accuracy[o] r[g, o], to maximise."""
        return self._coefficients(self.share, (self.space.accuracy * self.space.sustained_rps)[self.pair_option])

    def gpu_cost(self) -> Floats:
        """(5.3) sum over g of cost[g] y[g] per hour, to minimise."""
        return self._coefficients(self.use, np.array([self.space.cost[each.members[0]] for each in self.classes]))

    def gpus_in_use(self) -> Floats:
        """(5.6) sum over g of k[g] y[g], to minimise."""
        return self._coefficients(self.use, np.array([float(each.gpus) for each in self.classes]))

    def bytes_crossing(self) -> Floats:
        """(5.11) sum over e of bytes[e] (fanout[e] z[source] - sum over v of L[e, v]) in GiB/s, to minimise.

        Over classes that span nodes there is no L; the coefficients are then 0, which keeps the model a relaxation.
        """
        dense = np.zeros(len(self.model.variables))
        for call, local in self.side.local:
            dense[self.served[call.source]] += call.payload_bytes * call.fanout / 2**30
            dense[local] -= call.payload_bytes / 2**30
        return dense

    def scenario_goodput(self) -> Floats:
        """(5.10) the mean over the scenarios of sum over s of weight[s] z'[s], to maximise."""
        dense = np.zeros(len(self.model.variables))
        scenarios = [columns for columns in self.side.blocks if columns.block.lost_node is None]
        for columns in scenarios:
            dense[columns.served] = self.space.weight / len(scenarios)
        return dense

    def bytes_moved(self) -> Floats:
        """(5.4) sum over g, o of w[o] x[g, o] in GiB where group g does not run o's variant yet, to minimise.

        Over classes nothing tells members apart: the coefficients are then 0, which keeps the model a relaxation.
        """
        moved = np.zeros(len(self.pair_option))
        for pair, (place, option) in enumerate(zip(self.pair_class, self.pair_option, strict=True)):
            each = self.classes[place]
            if each.count == 1 and (each.members[0], option) not in self.space.kept:
                moved[pair] = self.space.moved_bytes[option] / 2**30
        return self._coefficients(self.run, moved)

    # Step 4: from placements to values and back.

    def encode(self, placement: Placement) -> Floats:
        """Return the values of ``placement``, shape (variable,), for a model over single groups.

        Raises:
            KeyError: The placement holds a pair that the model does not have.
        """
        values = np.zeros(len(self.model.variables))
        place_of = {each.members[0]: place for place, each in enumerate(self.classes)}
        pair_of = {pair: index for index, pair in enumerate(zip(self.pair_class, self.pair_option, strict=True))}
        for placed in placement:
            place = place_of[placed.group]
            pair = pair_of[place, placed.option]
            values[self.use[place]] = 1.0
            values[self.run[pair]] = 1.0
            values[self.share[pair]] = placed.share
        values[self.served] = np.minimum(self.space.served_rps(placement), self.space.offered_rps)
        self.side.complete(values)
        self.fair.complete(values)
        return values

    def decode(self, values: Floats) -> Placement:
        """Return the placement that ``values`` stand for, in a model over single groups."""
        running = np.flatnonzero(values[self.run] > 0.5)
        return tuple(
            sorted(
                Placed(
                    self.classes[self.pair_class[pair]].members[0],
                    int(self.pair_option[pair]),
                    float(min(max(values[self.share[pair]], 0.0), 1.0)),
                )
                for pair in running
            )
        )

    def _of_service(self) -> list[Integers]:
        services = self.space.service_of[self.pair_option] if len(self.pair_option) else np.zeros(0, dtype=np.int64)
        return [np.flatnonzero(services == service) for service in range(len(self.space.names))]

    def _coefficients(self, columns: Integers, values: Floats) -> Floats:
        dense = np.zeros(len(self.model.variables))
        dense[columns] = values
        return dense


def _runs(labels: Integers, count: int) -> list[Integers]:
    """Return the positions of each label from 0 to ``count`` - 1."""
    return [np.flatnonzero(labels == label) for label in range(count)]
