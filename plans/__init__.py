"""The vocabulary that every other package shares: cluster, services, demand and plan, and the rules on them.

Modules: `errors`, `units`, `documents` (reading and writing), `catalogue` (known GPU types), `cluster`, `service`,
`demand`, `plan`, `codec`, `diff` and `workflow_changes`, `waves` and `transition`, `dispatch` (routing, batching and
dropping rules), `workflows` (their draws and joins), `checker` and `certificate`, `store`.
"""

from plans.checker import ProfileFigures, check_plan
from plans.cluster import Cluster, Gpu, GpuType, Network, Node, group_id
from plans.codec import read_plan, write_plan
from plans.demand import Demand, Rate, ServiceDemand
from plans.diff import PlanDiff, apply_diff, diff
from plans.documents import Document, canonical_digest, parse_document, read_document, write_document, write_text
from plans.errors import ApplyRolledBack, BadStoredData, Fault, ForeplanError, InvalidInput, RemoteFailure, StalePlan
from plans.plan import Group, LoadoutEntry, Plan, Prediction, Route, SolverReport, TransitionStep, Unserved
from plans.service import Service, Services, Variant, Workflow, check_against_cluster
from plans.store import PlanStore, StoredPlan
from plans.transition import Transition, transition

__all__ = [
    "Cluster",
    "Gpu",
    "GpuType",
    "Network",
    "Node",
    "group_id",
    "Service",
    "Services",
    "Variant",
    "Workflow",
    "check_against_cluster",
    "Demand",
    "Rate",
    "ServiceDemand",
    "Group",
    "LoadoutEntry",
    "Plan",
    "Prediction",
    "Route",
    "SolverReport",
    "TransitionStep",
    "Unserved",
    "read_plan",
    "write_plan",
    "PlanDiff",
    "apply_diff",
    "diff",
    "Transition",
    "transition",
    "ProfileFigures",
    "check_plan",
    "PlanStore",
    "StoredPlan",
    "Document",
    "canonical_digest",
    "parse_document",
    "read_document",
    "write_document",
    "write_text",
    "ApplyRolledBack",
    "BadStoredData",
    "Fault",
    "ForeplanError",
    "InvalidInput",
    "RemoteFailure",
    "StalePlan",
]
