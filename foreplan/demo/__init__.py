"""``foreplan demo``: the whole job on one machine, with the real components.

Modules: `stage` (the nodes, services and load that suit this machine), `processes` (agents and gateway as child
processes), `show` (the steps in order).
"""

from foreplan.demo.show import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
