"""The rows that join groups beyond demand and budgets, one method per family; numbers as in docs/formulation.md.

They name only use, run, share and served of a formulation, and variables of their own, so they hold in the model over
groups, over classes, and in the master of column generation alike. Where a class has members in several domains that
a row tells apart, the row is left out: what remains is a relaxation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from planner.linear import Floats, Integers, ModelBuilder
from planner.requirements import Block, Call, Coupling, SpreadRule

if TYPE_CHECKING:
    from planner.formulation import Formulation

__all__ = ["SideRows"]


_NODE_LEVELS: tuple[tuple[int, int | None], ...] = (
    *((nodes, nodes) for nodes in range(2, 11)),
    (11, 12),
    (13, 15),
    (16, 20),
    (21, 30),
    (31, None),
)
"""Ranges of the number of nodes that a service is on, which (4.21) tells apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _BlockColumns:
    """Variables of one block: shares, shape (pair,), and served rates, shape (service,)."""

    block: Block
    pairs: Integers
    share: Integers
    served: Integers


@dataclass(slots=True)
class SideRows:
    """Adds the rows to ``builder`` and remembers their variables."""

    formulation: Formulation
    builder: ModelBuilder
    least: dict[int, int] = field(default_factory=dict)
    """Per spread service, the column of the fewest replicas in any domain."""
    held: dict[int, Integers] = field(default_factory=dict)
    """Per service with `min_domains`, the columns that say which domains hold a replica."""
    local: list[tuple[Call, Integers]] = field(default_factory=list)
    """Per call, the columns of the calls per second that stay on each node."""
    blocks: list[_BlockColumns] = field(default_factory=list)

    def add(self) -> None:
        """Add every family that the requirements ask for."""
        requirements = self.formulation.space.requirements
        if self.formulation.has_loadouts:
            self._token_times()
        self._least_share()
        for rule in requirements.spreads:
            self._spread(rule)
            self._domains(rule)
        self._workflow_rates()
        self._affinity()
        self._required_shares()
        for block in requirements.scenarios if requirements.one_emergency else requirements.blocks:
            self._block(block)
        if requirements.one_emergency:
            self._one_emergency()
        else:
            self._losses()

    def _token_times(self) -> None:
        """(4.22) sum over options o of s of (next[o] / tpot[s]) x[g, o] + sum over others p of rho[p] a[g, p] <= y[g].

        For every group g and generation service s: neighbours that use a share beta of the group stretch the time per
        further token from next to next / (1 - beta).
        """
        model = self.formulation
        for place in range(len(model.classes)):
            pairs = np.flatnonzero(model.pair_class == place)
            for number, (run, share) in enumerate(model.space.token_rows(model.pair_option[pairs])):
                columns = np.concatenate([model.run[pairs], model.share[pairs], [model.use[place]]])
                values = np.concatenate([run, share, [-1.0]])
                used = values != 0
                self.builder.add_row(f"tokens.{place}.{number}", columns[used], values[used], upper=0.0)

    def _least_share(self) -> None:
        """(4.12) a[g, o] >= f[o] x[g, o]: a replica that min_replicas asks for serves."""
        model = self.formulation
        least = model.space.requirements.least_share[model.pair_option] if len(model.pair_option) else np.zeros(0)
        for pair in np.flatnonzero(least > 0):
            self.builder.add_row(f"least.{pair}", [model.share[pair], model.run[pair]], [1.0, -least[pair]], lower=0.0)

    def _spread(self, rule: SpreadRule) -> None:
        """(4.13) t[s] <= sum over g in domain D and the options o of s of x[g, o] <= t[s] + max_skew[s], every D."""
        per_domain = self._pairs_by_domain(rule)
        if per_domain is None:
            return
        model, name = self.formulation, self.formulation.space.names[rule.service]
        most = float(model.count.sum())
        (least,) = self.builder.add_variables([f"fewest[{name}]"], upper=np.array([most]), integer=False)
        self.least[rule.service] = int(least)
        for domain, pairs in zip(rule.domains, per_domain, strict=True):
            columns = np.concatenate([model.run[pairs], [least]])
            values = np.concatenate([np.ones(len(pairs)), [-1.0]])
            row = f"spread.{name}.{domain}"
            self.builder.add_row(row, columns, values, lower=0.0, upper=float(rule.max_skew))

    def _domains(self, rule: SpreadRule) -> None:
        """(4.14) w[s, D] <= sum over g in D and the options o of s of x[g, o]; sum over D of w[s, D] >= min_domains."""
        per_domain = self._pairs_by_domain(rule)
        if per_domain is None or rule.min_domains == 0:
            return
        model, name = self.formulation, self.formulation.space.names[rule.service]
        names = [f"holds[{name},{domain}]" for domain in rule.domains]
        held = self.builder.add_variables(names, upper=np.ones(len(names)), integer=True)
        self.held[rule.service] = held
        for column, domain, pairs in zip(held, rule.domains, per_domain, strict=True):
            columns = np.concatenate([model.run[pairs], [column]])
            values = np.concatenate([np.ones(len(pairs)), [-1.0]])
            self.builder.add_row(f"holds.{name}.{domain}", columns, values, lower=0.0)
        self.builder.add_row(f"domains.{name}", held, np.ones(len(held)), lower=float(rule.min_domains))

    def _workflow_rates(self) -> None:
        """(4.15) z[c] = sum over the callers p of c of fanout[p, c] z[p], where only workflows call c."""
        model = self.formulation
        for coupling in model.space.requirements.couplings:
            self._calls("calls", coupling, model.served)

    def _calls(self, prefix: str, coupling: Coupling, served: Integers) -> None:
        columns = [int(served[coupling.child]), *(int(served[caller]) for caller, _ in coupling.callers)]
        values = [1.0, *(-fanout for _, fanout in coupling.callers)]
        name = f"{prefix}.{self.formulation.space.names[coupling.child]}"
        self.builder.add_row(name, columns, values, lower=0.0, upper=0.0)

    def _affinity(self) -> None:
        """(4.16) L[e, v] <= fanout[e] sum of r[source] on v; sum over e into c of L[e, v] <= sum of r[c] on v.

        For required edges sum over v of L[e, v] >= fanout[e] z[source]. L[e, v] are the calls per second of
        edge e whose both ends are on node v, and r = (rho / u) a.
        """
        model, space = self.formulation, self.formulation.space
        calls = space.requirements.calls
        nodes = self._node_of_place() if calls else None
        if nodes is None:
            return
        labels = sorted(set(nodes))
        for index, call in enumerate(calls):
            upper = np.full(len(labels), call.fanout * float(space.offered_rps[call.source]))
            names = [f"local[{index},{label}]" for label in labels]
            self.local.append((call, self.builder.add_variables(names, upper=upper, integer=False)))
        for at, label in enumerate(labels):
            here = np.array([node == label for node in nodes])
            for index, (call, local) in enumerate(self.local):
                pairs = self._pairs_of(call.source, here)
                self._rate_row(f"sent.{index}.{label}", pairs, call.fanout, local[[at]])
            for target in sorted({call.target for call in calls}):
                arriving = [int(local[at]) for call, local in self.local if call.target == target]
                self._rate_row(f"taken.{space.names[target]}.{label}", self._pairs_of(target, here), 1.0, arriving)
        for index, (call, local) in enumerate(self.local):
            if call.required:
                columns = np.concatenate([local, [model.served[call.source]]])
                values = np.concatenate([np.ones(len(local)), [-call.fanout]])
                self.builder.add_row(f"together.{index}", columns, values, lower=0.0)

    def _required_shares(self) -> None:
        """(4.17) z[s] >= A d[s] for a required attainment A."""
        model = self.formulation
        for service in np.flatnonzero(model.space.requirements.least_rps > 0):
            least = float(model.space.requirements.least_rps[service])
            row = f"attain.{model.space.names[service]}"
            self.builder.add_row(row, [model.served[service]], [1.0], lower=least)

    def _block(self, block: Block, *, times: float = 1.0) -> None:
        """(4.18) is (4.3), (4.6), (4.8) and (4.15) again for the shares a' and rates z' <= d' of a block.

        They hold over the same x. A block has a demand d' of its own, or a lost node, on which a' is absent. z' may be
        ``times`` d', without (4.15), where a' stands for more than one routing.
        """
        model, space = self.formulation, self.formulation.space
        nodes = self._node_of_place() if block.lost_node is not None else [""] * len(model.classes)
        if nodes is None:
            return
        alive = np.array([node != block.lost_node for node in nodes], dtype=bool)
        pairs = np.flatnonzero(alive[model.pair_class]) if len(model.pair_class) else np.zeros(0, dtype=np.int64)
        options = model.pair_option[pairs]
        rates = space.sustained_rps[options]
        cap = np.minimum(1.0, block.offered_rps[space.service_of[options]] / rates) if len(pairs) else np.zeros(0)
        share = self.builder.add_variables(
            [f"share.{block.name}[{pair}]" for pair in pairs],
            upper=cap * (model.count[model.pair_class[pairs]] if len(pairs) else 1.0),
            integer=False,
        )
        served = self.builder.add_variables(
            [f"served.{block.name}[{name}]" for name in space.names],
            upper=times * block.offered_rps,
            integer=False,
        )
        for place in np.unique(model.pair_class[pairs]) if len(pairs) else ():
            mine = share[model.pair_class[pairs] == place]
            columns, values = np.append(mine, model.use[place]), np.append(np.ones(len(mine)), -1.0)
            self.builder.add_row(f"compute.{block.name}.{place}", columns, values, upper=0.0)
        for column, pair, most in zip(share, pairs, cap, strict=True):
            self.builder.add_row(f"link.{block.name}.{pair}", [column, model.run[pair]], [1.0, -most], upper=0.0)
        services = space.service_of[options] if len(pairs) else np.zeros(0, dtype=np.int64)
        for service, name in enumerate(space.names):
            mine = np.flatnonzero(services == service)
            columns, values = np.append(share[mine], served[service]), np.append(rates[mine], -1.0)
            self.builder.add_row(f"demand.{block.name}.{name}", columns, values, lower=0.0, upper=0.0)
        for coupling in space.requirements.couplings if times == 1.0 else ():
            self._calls(f"calls.{block.name}", coupling, served)
        self.blocks.append(_BlockColumns(block=block, pairs=pairs, share=share, served=served))

    def _losses(self) -> None:
        """(4.19) z'[s] >= K z[s] when any one node is lost, for a share K to be kept."""
        model = self.formulation
        keep = model.space.requirements.keep_after_loss
        for columns in self.blocks:
            if columns.block.lost_node is not None:
                for service, name in enumerate(model.space.names):
                    row = f"survive.{columns.block.name}.{name}"
                    both = [columns.served[service], model.served[service]]
                    self.builder.add_row(row, both, [1.0, -keep], lower=0.0)

    def _one_emergency(self) -> None:
        """(4.20) sum over g not on v of (rho / u) a' >= K z[s] for every node v: one routing a' for every loss.

        Stricter than (4.19), and as large for many nodes as for two.
        """
        model, space = self.formulation, self.formulation.space
        nodes = self._node_of_place()
        if nodes is None:
            self._emergency_over_classes()
            return
        self._block(Block(name="emergency", offered_rps=space.offered_rps), times=2.0)
        emergency = self.blocks.pop()
        place, option = model.pair_class[emergency.pairs], model.pair_option[emergency.pairs]
        where = np.array(nodes)[place] if len(place) else np.zeros(0, dtype=str)
        for service, name in enumerate(space.names):
            mine = np.flatnonzero(space.service_of[option] == service) if len(option) else np.zeros(0, dtype=np.int64)
            # A loss on a node without the service takes nothing: that the rest suffices is one row for all of those.
            for node in ["", *np.unique(where[mine]).tolist()]:
                left = mine[where[mine] != node]
                columns = np.append(emergency.share[left], model.served[service])
                values = np.append(space.sustained_rps[option[left]], -space.requirements.keep_after_loss)
                self.builder.add_row(f"survive.{node}.{name}", columns, values, lower=0.0)

    def _emergency_over_classes(self) -> None:
        """(4.21) sum of (rho / u) a' >= K sum over j of f[j] z[s, j], z[s] <= sum of z[s, j], where classes span nodes.

        With replicas on n nodes, (4.20) summed over these asks for n / (n - 1) times K z[s]. b[s, j] says that n is at
        least n[j] and below n[j + 1], and f[j] is the least of the factors there: z[s, j] <= d[s] b[s, j],
        sum over j of b[s, j] <= 1, and sum over g and o in O(s) of x[g, o] >= sum over j of n[j] b[s, j].
        """
        model, space = self.formulation, self.formulation.space
        nodes = len({group.node for group in space.groups})
        if nodes < 2:
            return
        self._block(Block(name="emergency", offered_rps=space.offered_rps), times=2.0)
        emergency = self.blocks.pop()
        option = model.pair_option[emergency.pairs]
        levels = [(least, min(most or nodes, nodes)) for least, most in _NODE_LEVELS if least <= nodes]
        least_nodes = np.array([float(least) for least, _ in levels])
        factors = np.array([most / (most - 1) for _, most in levels])
        keep = space.requirements.keep_after_loss
        for service, name in enumerate(space.names):
            mine = np.flatnonzero(space.service_of[option] == service) if len(option) else np.zeros(0, dtype=np.int64)
            labels = [f"[{name},{least}]" for least, _ in levels]
            offered = np.full(len(levels), space.offered_rps[service])
            level = self.builder.add_variables([f"nodes{x}" for x in labels], upper=np.ones(len(levels)), integer=True)
            kept = self.builder.add_variables([f"kept{x}" for x in labels], upper=offered, integer=False)
            for column, binary in zip(kept, level, strict=True):
                self.builder.add_row(f"level.{name}.{column}", [column, binary], [1.0, -offered[0]], upper=0.0)
            self.builder.add_row(f"one-level.{name}", level, np.ones(len(levels)), upper=1.0)
            runs = model.run[emergency.pairs[mine]]
            counts = np.concatenate([np.ones(len(runs)), -least_nodes])
            self.builder.add_row(f"nodes.{name}", np.concatenate([runs, level]), counts, lower=0.0)
            both, signs = np.append(kept, model.served[service]), np.append(np.ones(len(levels)), -1.0)
            self.builder.add_row(f"kept.{name}", both, signs, lower=0.0)
            columns = np.concatenate([emergency.share[mine], kept])
            values = np.concatenate([space.sustained_rps[option[mine]], -keep * factors])
            self.builder.add_row(f"survive.{name}", columns, values, lower=0.0)

    def _rate_row(self, name: str, pairs: Integers, times: float, flows: Sequence[int] | Integers) -> None:
        """Add ``sum of flows <= times * rate of pairs``."""
        model = self.formulation
        rates = model.space.sustained_rps[model.pair_option[pairs]] * times if len(pairs) else np.zeros(0)
        columns = np.concatenate([np.asarray(flows, dtype=np.int64), model.share[pairs]])
        self.builder.add_row(name, columns, np.concatenate([np.ones(len(flows)), -rates]), upper=0.0)

    def _pairs_of(self, service: int, here: np.ndarray) -> Integers:
        model = self.formulation
        if not len(model.pair_option):
            return np.zeros(0, dtype=np.int64)
        mine = model.space.service_of[model.pair_option] == service
        return np.flatnonzero(mine & here[model.pair_class])

    def _pairs_by_domain(self, rule: SpreadRule) -> list[Integers] | None:
        """Return the pairs of the service in each of its domains, or None when a class spans several."""
        model = self.formulation
        labels = [{rule.domain_of[member] for member in each.members} for each in model.classes]
        if any(len(found) > 1 for found in labels):
            return None
        domain = np.array([next(iter(found)) for found in labels], dtype=np.int64)
        return [self._pairs_of(rule.service, domain == index) for index in range(len(rule.domains))]

    def _node_of_place(self) -> list[str] | None:
        """Return the node of each class, or None when a class spans several."""
        model = self.formulation
        nodes = [{model.space.groups[member].node for member in each.members} for each in model.classes]
        if any(len(found) > 1 for found in nodes):
            return None
        return [next(iter(found)) for found in nodes]

    def complete(self, values: Floats) -> None:
        """Fill in the variables of the spreads and of the affinity that fit use, run, share and served in ``values``.

        The shares of blocks are left at 0; `planner.recourse` finds those.
        """
        model = self.formulation
        for rule in model.space.requirements.spreads:
            per_domain = self._pairs_by_domain(rule)
            if per_domain is not None and rule.service in self.least:
                replicas = [float(values[model.run[pairs]].sum()) for pairs in per_domain]
                values[self.least[rule.service]] = min(replicas, default=0.0)
                if rule.service in self.held:
                    values[self.held[rule.service]] = np.minimum(1.0, replicas)
        nodes = self._node_of_place() if self.local else None
        for at, label in enumerate(sorted(set(nodes or ()))):
            here = np.array([node == label for node in nodes or ()])
            taken = {call.target: self._rate(values, call.target, here) for call, _ in self.local}
            for call, local in sorted(self.local, key=lambda each: -each[0].payload_bytes):
                flow = min(call.fanout * self._rate(values, call.source, here), taken[call.target])
                values[local[at]] = flow
                taken[call.target] -= flow

    def _rate(self, values: Floats, service: int, here: np.ndarray) -> float:
        model = self.formulation
        pairs = self._pairs_of(service, here)
        return float(values[model.share[pairs]] @ model.space.sustained_rps[model.pair_option[pairs]])
