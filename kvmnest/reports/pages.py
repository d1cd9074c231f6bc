"""Reports that are made at the end, from the results of the whole run."""

from __future__ import annotations

from pathlib import Path

from kvmnest.files import write_text
from kvmnest.reports import html, ktap
from kvmnest.reports.model import Run


def write(run: Run, html_path: Path | None, ktap_path: Path | None) -> None:
    """Write an HTML page and KTAP, each if it has a path. Raises HarnessError."""
    if html_path:
        write_text(html_path, html.page(run) + "\n")
    if ktap_path:
        write_text(ktap_path, "\n".join(ktap.lines(run)) + "\n")
