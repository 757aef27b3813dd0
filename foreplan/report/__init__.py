"""The HTML report: one self-contained page about a plan and what became of it.

Modules: `content` (what goes in), `placement` (the map of nodes, devices and loadouts), `figures` (plots),
`page` (the whole).
"""

from foreplan.report.content import Content, Run
from foreplan.report.page import render

__all__ = ["Content", "Run", "render"]
