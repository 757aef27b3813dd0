"""Running a plan on real nodes, and serving requests there.

Modules, by process:

- agent (one per node): `agent` starts it; `agent_control` and `agent_inference` answer its callers; `node` moves it
  from generation to generation, `upkeep` brings about what is wanted as `reconcile` and `replica` say, `admission`
  checks, `journal` remembers; `group_server` says who uses a group next, `whole_requests`, `bundles` and `dispatcher`
  queue and batch, `group_lanes` and `lane` generate; `group_batch`, `group_worker`, `spare_worker` and `worker_link`
  run workers.
- worker (one per GPU group): `worker`, over `worker_wire` and the shared memory of `segment`; `runtime` loads and runs
  models.
- gateway (the front door): `gateway`, with `routing` and the other ``gateway_`` modules; `forwarding` is how it hands
  requests to agents, `http_tensors` how HTTP becomes what gRPC would have been.
- controller: `controller`, with `lease`, `apply_plan`, `rollout`, `targeting`, `draining` and `cluster_status`; `load`
  replays a trace against a gateway, from one process or several.

`state` holds the vocabulary of all of them, `wire` and `tensors` its forms on the network, `errors` what can go wrong;
`assignment` says what a plan gives to whom. `grpc_server`, `http_server`, `state_folder`, `roles` and `tls` (with
`certificates`), `metrics`, `statistics` and `tracing` serve agent and gateway alike.
Start at the module of the process; this package imports only the vocabulary, so that a worker is up quickly.
"""

from executor.state import (
    AgentState,
    Backend,
    DesiredGroup,
    DesiredReplica,
    DesiredState,
    GatewayState,
    Phase,
    ReplicaKey,
    ReplicaState,
    RoutingTable,
    ServiceRoutes,
    Target,
    TargetState,
)

__all__ = [
    "AgentState",
    "ReplicaState",
    "ReplicaKey",
    "Phase",
    "DesiredState",
    "DesiredGroup",
    "DesiredReplica",
    "GatewayState",
    "TargetState",
    "RoutingTable",
    "ServiceRoutes",
    "Target",
    "Backend",
]
