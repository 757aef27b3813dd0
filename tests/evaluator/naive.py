"""An independent simulator, written from the documents: plain Python, one object per thing, no shared code."""

from __future__ import annotations

from collections import defaultdict


def simulate(plan, deadlines, arrivals, overhead_s=0.0):  # noqa: C901 - one page that reads like the document
    """Return (outcome, finish time or None, group or None, batch) per request; arrivals: [(time, service)], sorted."""
    deadline = [time + deadlines[service] for time, service in arrivals]
    results = [None] * len(arrivals)
    queues = {(g.id, e.service): [] for g in plan.groups for e in g.loadout}
    stage_free = {g.id: [0.0] * g.pp for g in plan.groups}
    balance = defaultdict(float)
    waiting = [(time + overhead_s, number) for number, (time, _) in enumerate(arrivals)]

    def route(service):
        routes = sorted(plan.routes.get(service, ()), key=lambda r: [g.id for g in plan.groups].index(r.group))
        if not routes:
            return None
        for r in routes:
            balance[service, r.group] += r.weight
        best = max(routes, key=lambda r: balance[service, r.group])
        balance[service, best.group] -= sum(r.weight for r in routes)
        return best.group

    def dispatch(group, now):
        """Start one batch, or find nothing to start."""
        while True:
            heads = [
                (min(deadline[r] for r in queues[group.id, e.service]), e)
                for e in group.loadout
                if queues[group.id, e.service]
            ]
            if not heads:
                return
            earliest = min(time for time, _ in heads)
            entry = next(e for time, e in heads if time == earliest)
            queue = queues[group.id, entry.service]
            queue.sort(key=lambda r: (deadline[r], r))
            head = queue[0]
            took = [sum(row) for row in entry.stage_latency_s]
            reason = None
            if now + took[0] > deadline[head]:
                reason = "deadline cannot be met"
            elif len(queue) > entry.max_batch and now + took[-1] > deadline[head]:
                reason = "gave way to a full batch"
            if reason:
                queue.pop(0)
                results[head] = ("dropped", None, group.id, reason)
                continue
            size = max(
                b
                for b in range(1, min(len(queue), entry.max_batch) + 1)
                if b == 1 or now + took[b - 1] <= deadline[head]
            )
            time = now
            for stage, held in enumerate(entry.stage_latency_s[size - 1]):
                time = max(time, stage_free[group.id][stage]) + held
                stage_free[group.id][stage] = time
            for request in queue[:size]:
                results[request] = ("good" if time <= deadline[request] else "late", time, group.id, size)
            del queue[:size]
            return

    while True:
        ready = [
            (max(stage_free[g.id][0], min(waiting_since[r] for e in g.loadout for r in queues[g.id, e.service])), g)
            for g in plan.groups
            if any(queues[g.id, e.service] for e in g.loadout)
            for waiting_since in [[time + overhead_s for time, _ in arrivals]]
        ]
        next_dispatch = min((time for time, _ in ready), default=float("inf"))
        if waiting and waiting[0][0] <= next_dispatch:
            _, number = waiting.pop(0)
            group = route(arrivals[number][1])
            if group is None:
                results[number] = ("failed", None, None, "no route")
            else:
                queues[group, arrivals[number][1]].append(number)
        elif ready:
            for time, group in ready:
                if time == next_dispatch:
                    dispatch(group, time)
        else:
            return results
