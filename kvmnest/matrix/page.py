"""The matrix as one HTML page that needs nothing else: kernels across, cases down."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from kvmnest.matrix.run import changes, differences

_STYLE = """
:root { color-scheme: light dark }
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem }
table { border-collapse: collapse } th, td { padding: .1rem .4rem; border: 1px solid #8883 }
td { text-align: center } td:first-child { text-align: left; font-family: monospace }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); font-weight: 500 }
.passed { background: #2a78 } .failed, .error { background: #d228 } .known { background: #d928 }
.skipped { background: #8884 }
"""


def page(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: what changed between neighbours, the cases that differ, and every case."""
    columns = list(documents)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>kvmnest matrix</title>",
        f"<style>{_STYLE}</style><h1>kvmnest matrix</h1><h2>Changes between neighbours</h2>",
    ]
    found = changes(documents)
    for left, right, lines in found:
        items = "".join(f"<li><code>{html.escape(line)}</code></li>" for line in lines)
        parts.append(f"<h3>{html.escape(left)} &rarr; {html.escape(right)}</h3><ul>{items}</ul>")
    if not found:
        parts.append("<p>None: every case has the same outcome everywhere.</p>")
    every = dict.fromkeys(c["id"] for document in documents.values() for c in document["cases"])
    differing = {name for name, _ in differences(documents)}
    outcomes = [{c["id"]: c["outcome"] for c in d["cases"]} for d in documents.values()]
    for title, ids in (
        ("Cases that differ", [name for name in every if name in differing]),
        ("All cases", list(every)),
    ):
        rows = "".join(_row(name, [column.get(name, "") for column in outcomes]) for name in ids)
        opened = " open" if title.endswith("differ") else ""
        parts.append(
            f"<details{opened}><summary>{title} ({len(ids)})</summary><table><thead><tr>"
            f"<th></th>{head}</tr></thead><tbody>{rows}</tbody></table></details>"
        )
    return "\n".join(parts)


def _row(name: str, outcomes: list[str]) -> str:
    cells = "".join(f'<td class="{o}" title="{o}">{o[:1]}</td>' for o in outcomes)
    return f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
