"""One HTML page of a run that needs nothing else: no script from elsewhere, no font, no network."""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib.resources import files
from urllib.parse import quote

from kvmnest.reports import diff
from kvmnest.reports.model import FAILED, OUTCOMES, Run, patch_title

#: Facts that stand elsewhere on the page, or tell a reader nothing.
_LEFT_OUT = ("kernel", "cpu_flags")
_ORDER = ("failed", "error", "known", "skipped", "passed")


def page(run: Run, old: Run | None = None) -> str:
    """The page of a run, compared with an earlier one if given."""
    template = files("kvmnest.data").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": f"kvmnest: {_text(run.kernel)} ({_text(run.target)})",
        "FACTS": "".join(_facts(run)),
        "CHANGES": "".join(_changes(old, run)) if old else "",
        "SUMMARY": "".join(_summary(run)),
        "CASES": "".join(_cases(run)),
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def _text(value: object) -> str:
    return html.escape("" if value is None else str(value), quote=True)


def _facts(run: Run) -> Iterator[str]:
    params = run.facts.get("kvm_params", {})
    facts = {
        "target": run.target,
        "started": run.started,
        "seconds": run.seconds,
        **{n: v for n, v in run.facts.items() if isinstance(v, str) and n not in _LEFT_OUT},
        "kvm_intel": " ".join(f"{name}={value}" for name, value in params.items()),
        "problems": "; ".join(run.problems),
    }
    for name, value in facts.items():
        if value:
            yield f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>"


def _changes(old: Run, new: Run) -> Iterator[str]:
    changes = diff.compare(old, new)
    yield f"<h2>Compared with {_text(old.kernel)}</h2>"
    if not changes:
        yield "<p>No change.</p>"
        return
    here = {case.id for case in new.cases}
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


def _summary(run: Run) -> Iterator[str]:
    yield "<tr><th>patch</th>" + "".join(f"<th>{name}</th>" for name in OUTCOMES) + "</tr>"
    for patch, row in run.by_patch().items():
        cells = "".join(
            f'<td class="{outcome if row[outcome] else "none"}">{row[outcome] or ""}</td>'
            for outcome in OUTCOMES
        )
        # The attribute is that of the cases: "" for those without a patch.
        title = _text(patch_title(patch))
        button = f'<button type="button" data-series="{patch or ""}">{title}</button>'
        yield f"<tr><td>{button}</td>{cells}</tr>"
    total = run.summary()
    cells = "".join(f"<td>{total[outcome]}</td>" for outcome in OUTCOMES)
    yield f"<tr class=total><td>all</td>{cells}</tr>"


def _cases(run: Run) -> Iterator[str]:
    for case in sorted(run.cases, key=lambda c: _ORDER.index(c.outcome)):
        outcome, body = case.outcome, case.detail
        if case.kernel_log:
            body += f"\n\nkernel log:\n{case.kernel_log}"
        if case.rerun:
            body += f"\n\nrerun: {case.rerun}"
        opened = " open" if outcome in FAILED else ""
        yield (
            f'<details class="case {outcome}" id="{_text(case.id)}" data-outcome="{outcome}"'
            f' data-series="{_text(case.series)}"{opened}>'
            f"<summary><b>{outcome}</b> <code>{_text(case.id)}</code>"
            f" <span>{_text(case.headline)}</span></summary>"
            f"<p>SDM, “{_text(case.sdm)}”; patch {_text(case.series)};"
            f" {case.seconds:.3f} s</p><pre>{_text(body.strip())}</pre></details>\n"
        )
