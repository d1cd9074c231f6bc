"""One HTML page of a run that needs nothing else: no script from elsewhere, no font, no network."""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from kvmnest.reports import diff
from kvmnest.reports.model import FAILED, OUTCOMES, PATCHES

_ORDER = ("failed", "error", "known", "skipped", "passed")


def page(document: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """The page of a results document (schema 1), compared with an earlier one if given."""
    template = files("kvmnest.data").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": f"kvmnest: {_text(document['kernel'])} ({_text(document['target'])})",
        "FACTS": "".join(_facts(document)),
        "CHANGES": "".join(_changes(old, document)) if old else "",
        "SUMMARY": "".join(_summary(document)),
        "CASES": "".join(_cases(document)),
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def _text(value: object) -> str:
    return html.escape("" if value is None else str(value), quote=True)


def _facts(document: dict[str, Any]) -> Iterator[str]:
    params = " ".join(f"{name}={value}" for name, value in document["kvm_params"].items())
    told = document.get("facts", {})
    facts = {
        "target": document["target"],
        "started": document.get("started"),
        "seconds": document.get("seconds"),
        **{n: v for n, v in told.items() if isinstance(v, str) and n != "cpu_flags"},
        "kvm_intel": params,
        "problems": "; ".join(document.get("problems", ())),
    }
    for name, value in facts.items():
        if value:
            yield f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>"


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    changes = diff.compare(old, new)
    yield f"<h2>Compared with {_text(old['kernel'])}</h2>"
    if not changes:
        yield "<p>No change.</p>"
        return
    here = {case["id"] for case in new["cases"]}
    yield f"<details open><summary>{len(changes)} changes</summary>"
    yield "<div class=wide><table class=changes>"
    yield "<tr><th>change</th><th>case</th><th>before</th><th>now</th></tr>"
    for change in changes:
        name = f"<code>{_text(change.id)}</code>"
        if change.id in here:
            name = f'<a href="#{_text(quote(change.id))}">{name}</a>'
        yield (
            f"<tr><td>{_text(change.kind)}</td><td>{name}</td>"
            f"<td>{_text(change.before or '-')}</td><td>{_text(change.after or '-')}</td></tr>"
        )
    yield "</table></div></details>"


def _summary(document: dict[str, Any]) -> Iterator[str]:
    counts: dict[int, dict[str, int]] = {}
    for case in document["cases"]:
        row = counts.setdefault(case.get("series") or 0, dict.fromkeys(OUTCOMES, 0))
        row[case["outcome"]] += 1
    yield "<tr><th>patch</th>" + "".join(f"<th>{name}</th>" for name in OUTCOMES) + "</tr>"
    for series, row in sorted(counts.items()):
        name = f"{series} {PATCHES[series]}" if series in PATCHES else "other"
        cells = "".join(
            f'<td class="{outcome if row[outcome] else "none"}">{row[outcome] or ""}</td>'
            for outcome in OUTCOMES
        )
        # The attribute is that of the cases: "" for those without a patch.
        button = f'<button type="button" data-series="{series or ""}">{_text(name)}</button>'
        yield f"<tr><td>{button}</td>{cells}</tr>"
    total = document["summary"]
    cells = "".join(f"<td>{total[outcome]}</td>" for outcome in OUTCOMES)
    yield f"<tr class=total><td>all</td>{cells}</tr>"


def _cases(document: dict[str, Any]) -> Iterator[str]:
    for case in sorted(document["cases"], key=lambda c: _ORDER.index(c["outcome"])):
        outcome = case["outcome"]
        summary = case.get("summary") or case.get("detail", "").partition("\n")[0]
        body = case.get("detail", "")
        if case.get("kernel_log"):
            body += f"\n\nkernel log:\n{case['kernel_log']}"
        if case.get("rerun"):
            body += f"\n\nrerun: {case['rerun']}"
        opened = " open" if outcome in FAILED else ""
        yield (
            f'<details class="case {outcome}" id="{_text(case["id"])}" data-outcome="{outcome}"'
            f' data-series="{_text(case.get("series"))}"{opened}>'
            f"<summary><b>{outcome}</b> <code>{_text(case['id'])}</code>"
            f" <span>{_text(summary)}</span></summary>"
            f"<p>SDM, “{_text(case.get('sdm'))}”; patch {_text(case.get('series'))};"
            f" {case['seconds']:.3f} s</p><pre>{_text(body.strip())}</pre></details>\n"
        )
