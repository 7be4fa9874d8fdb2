"""The frame of a self-contained web page: styles for light and dark, colours of series, plots side by side, tables.

Nothing is loaded from elsewhere and nothing runs; the pictures are SVG that stands in the page. Series i is filled, drawn and
keyed by the classes f<i>, l<i> and b<i>.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

SERIES = 6
"""Colours that can be told apart."""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>__TITLE__</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --dim: #666; --rule: #ddd; --good: #1a7f37; --fair: #9a6700;
  --s0: #4878d0; --s1: #d1495b; --s2: #3a9a5b; --s3: #956cb4; --s4: #d68a00; --s5: #1192b0 }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181c; --dim: #999; --rule: #3a3d44; --good: #5cc97a;
  --fair: #e0b04a; --s0: #7aa6f0; --s1: #f0808e; --s2: #66c98a; --s3: #c09ade; --s4: #f0b04a; --s5: #4cc3de } }
body { font: 14px/1.4 system-ui, sans-serif; margin: 20px auto; padding: 0 16px; max-width: 1540px; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 18px; margin: 0 } h2 { font-size: 16px; margin: 28px 0 8px } h3 { font-size: 14px; margin: 0 }
p { margin: 4px 0 } .dim { color: var(--dim) } .green { color: var(--good) } .yellow { color: var(--fair) }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 20px 28px }
figure { margin: 0 } svg { display: block; width: 100%; height: auto }
svg text { font: 10px system-ui, sans-serif; fill: var(--dim) }
.grid { stroke: var(--rule); stroke-width: 1 } .frame { fill: none; stroke: var(--rule) } .zero { stroke: var(--dim) }
.line { fill: none; stroke-width: 1.8 } .dot { fill-opacity: .5 } .dot:hover { fill-opacity: 1; stroke: var(--ink) }
i { display: inline-block; width: 12px; height: 4px; margin: 0 5px 3px 0; border-radius: 2px } .key { margin-right: 14px }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 12px 0 0; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 2px 14px 2px 0; white-space: nowrap; vertical-align: top }
th { color: var(--dim); font-weight: normal } th:first-child, td:first-child, .left { text-align: left }
tr + tr td { border-top: 1px solid var(--rule) } td.note { white-space: normal; text-align: left }
summary { margin-top: 8px; color: var(--dim); cursor: pointer }
__SERIES__
</style></head><body>
__BODY__
</body></html>
"""


def page(title: str, body: Iterable[str]) -> str:
    """The page; `body` is HTML."""
    series = "\n".join(
        f".f{i} {{ fill: var(--s{i}) }} .l{i} {{ stroke: var(--s{i}) }} .b{i} {{ background: var(--s{i}) }}"
        for i in range(SERIES)
    )
    text = _PAGE.replace("__TITLE__", html.escape(title)).replace("__SERIES__", series)
    return text.replace("__BODY__", "\n".join(body))
