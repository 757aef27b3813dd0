"""Runs a plan on real nodes and serves requests there.

Processes: `agent` (one per node), `worker` (one per GPU group, started by the agent), `gateway` (the front door).
Clients of theirs: `controller` (``apply``, ``status``) and `load` (replays a trace). `state` is the vocabulary, `wire`
and `tensors` convert it to messages and back, `runtime` runs the models.

Pure rules, without input or output: `routing`, `apply_plan`, `reconcile`, `replica`, `dispatcher`, `admission`.

Nothing is imported here: an agent needs no pandas, a load client no torch, and a command that prints help neither.
"""

__all__: list[str] = []
