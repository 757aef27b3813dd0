"""The frame of every page that Foreplan writes: one file, with style and scripts inside, that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from plotly.io import to_html
from plotly.offline import get_plotlyjs

__all__ = ["document", "plot", "table"]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f4f6f8;margin:0}
main{max-width:1120px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;margin:0 0 4px} h2{font-size:19px;margin:34px 0 6px}
p.lead{margin:0 0 12px;color:#51606f} .muted{color:#6b7987;font-size:13px}
.facts{display:flex;flex-wrap:wrap;gap:6px 22px;margin:10px 0 0;padding:0;list-style:none;font-size:14px}
.facts b{font-weight:600} .card{background:#fff;border:1px solid #dfe5ea;border-radius:8px;padding:14px 16px;
overflow-x:auto}
.remark{background:#fff6e5;border:1px solid #f0d9a8;border-radius:6px;padding:8px 12px;margin:8px 0;font-size:14px}
table{border-collapse:collapse;width:100%;font-size:14px} th,td{padding:5px 10px;border-bottom:1px solid #e6ebef}
th{text-align:left;font-weight:600;color:#3d4b59} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.nodes{display:flex;flex-wrap:wrap;gap:14px} .node{background:#fff;border:1px solid #dfe5ea;border-radius:8px;
padding:12px 14px;flex:1 1 320px} .node header{margin-bottom:8px} .devices{display:flex;flex-wrap:wrap;gap:10px;
align-items:flex-start}
.device{flex:1 1 230px;border:1px solid #cfd8df;border-radius:6px;padding:8px 10px;background:#fafbfc}
.device.idle{background:#f0f2f4;border-style:dashed} .device-name{font-weight:600;font-size:13px}
.chip{border-left:5px solid;background:#fff;border-radius:3px;padding:3px 8px;margin:6px 0;display:flex;
flex-direction:column} .bar-row{display:flex;justify-content:space-between;font-size:12px;color:#51606f;margin-top:6px}
.bar{height:9px;background:#e3e8ec;border-radius:3px;overflow:hidden;display:flex} .bar i{display:block;height:100%}
"""


def document(title: str, body: str) -> str:
    """Return the page with ``body``, which is HTML already, under ``title``, which is text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main>{body}</main></body></html>\n"
    )


def plot(figure: Any, *, least_px: int = 560) -> str:
    """Return a plotly figure as HTML, in a card that scrolls where the window leaves it less than ``least_px``."""
    html: str = to_html(figure, include_plotlyjs=False, full_html=False, config={"displayModeBar": False})
    return f'<div class="card" style="margin-top:12px"><div style="min-width:{least_px}px">{html}</div></div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> str:
    """Return a table of text cells; columns after the first ``text_columns`` are aligned as numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if position >= text_columns else ''}>{escape(value)}</{tag}>"
            for position, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table>"
