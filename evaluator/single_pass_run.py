"""A run in the single-pass mode, told in the same arrays as one of the event mode (docs/evaluator.md, section 13)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from evaluator.run import Run
from evaluator.scenario import Arrivals, Deadlines, Replicas
from evaluator.settings import Settings
from evaluator.single_pass import SINGLE_PASS_ROUTINGS, Hosts, run_single_pass
from evaluator.state import ADMISSION, GOOD, NOWHERE, UNROUTED
from plans.errors import Fault
from plans.service import LatencyService, Services

__all__ = ["SinglePassRun", "single_pass_faults"]


def single_pass_faults(settings: Settings, services: Services, names: Sequence[str]) -> list[Fault]:
    """Return why requests of the services or workflows ``names`` cannot be simulated in a single pass.

    Args:
        settings: How to simulate.
        services: The services.
        names: What the trace asks for.

    Returns:
        Every reason; empty where the single pass says what the event mode says.
    """

    def faults() -> Iterator[Fault]:
        wanted = (
            ("admission", settings.admission == "arrival", "'arrival'"),
            ("routing", settings.routing in SINGLE_PASS_ROUTINGS, f"one of {', '.join(SINGLE_PASS_ROUTINGS)}"),
            ("warmup_s", settings.warmup_s == 0, "0"),
            ("until_s", settings.until_s is None, "no end of the run"),
        )
        for field, fine, expected in wanted:
            if not fine:
                found = repr(getattr(settings, field))
                yield Fault(where="evaluate", field=field, found=found, expected=f"{expected} in a single pass")
        latency = {service.name for service in services.services if isinstance(service, LatencyService)}
        for name in names:
            if name not in latency:
                expected = "services of class latency in a single pass"
                yield Fault(where="trace", field="service", found=repr(name), expected=expected)

    return list(faults())


class SinglePassRun(Run):
    """What `Run` says of a run, found in one pass over the arrivals; it cannot be stopped on the way.

    Args:
        replicas: What runs.
        hosts: The same as the single pass knows it, of the same plan.
        arrivals: The trace.
        deadlines: What the services allow.
        settings: How to simulate; see `single_pass_faults`.
    """

    def __init__(
        self, replicas: Replicas, hosts: Hosts, arrivals: Arrivals, deadlines: Deadlines, settings: Settings
    ) -> None:
        super().__init__(replicas, arrivals, deadlines, settings, keep_requests=True)
        self._hosts = hosts
        self._replica_of_option = np.flatnonzero(replicas.weight > 0)

    def finish(self) -> None:
        """Run, and write down what became of every request."""
        world, arrivals, settings, hosts = self.world, self.arrivals, self.settings, self._hosts
        service = arrivals.service_of_code[arrivals.code]
        found = run_single_pass(
            hosts,
            arrivals.arrival_s,
            service,
            routing=settings.routing,  # type: ignore[arg-type]  # a policy of this mode, or it is refused by name
            overhead_s=settings.overhead_s,
            response_s=settings.response_s,
            margin_s=settings.admission_margin_s,
        )
        routed = found.host >= 0
        replica = np.full(len(service), NOWHERE, dtype=np.int32)
        replica[routed] = self._replica_of_option[hosts.option[service[routed], found.host[routed]]]
        code = np.where(found.accepted, GOOD, np.where(routed, ADMISSION, UNROUTED)).astype(np.int8)
        end_s = np.where(found.accepted, found.finish_s, arrivals.arrival_s + settings.overhead_s)
        world.array("log_end_s")[:] = end_s
        world.array("log_code")[:] = code
        world.array("log_replica")[:] = replica
        world.array("log_batch")[:] = found.accepted
        np.add.at(world.array("counts"), (service, code), 1)
        replicas = world.array("replicas")
        served = np.bincount(replica[found.accepted], minlength=len(replicas))
        replicas["finished"] = replicas["inverse_batch"] = served
        world.array("busy_s")[:] = found.busy_s
        world["last_s"] = end_s.max(initial=0.0)
