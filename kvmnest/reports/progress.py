"""Progress of a run on a terminal (one line, rewritten) or in a log, and the summary."""

from __future__ import annotations

import os
import shutil
import time
from typing import TextIO

from kvmnest.errors import first_line
from kvmnest.reports.model import FAILED, OUTCOMES, PATCHES, Case, Run

_LOG_SECONDS = 10.0
_LOG_CASES = 50
_REWRITE_SECONDS = 0.1
_LONGEST_DETAIL_LINES = 60
#: Cases that have to end before the time left is estimated from them: the first wait for a boot.
_FIRST_ESTIMATE = 20


#: Escape sequences of a terminal: green, red, yellow.
_COLOURS = {"passed": "32", "failed": "31", "error": "31", "skipped": "33", "known": "33"}


class Progress:
    """Writes to ``out``. A stream that went away (closed pipe) is left alone from then on.

    ``colour`` True, False or None: on a terminal, unless NO_COLOR is set (see no-color.org) or
    the terminal is a dumb one.
    """

    def __init__(
        self,
        out: TextIO,
        *,
        quiet: bool = False,
        verbose: bool = False,
        colour: bool | None = None,
    ) -> None:
        self._out = out
        self._tty = out.isatty()
        if colour is None:
            unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
            colour = self._tty and not unwanted
        self._colour = colour
        self._quiet, self._verbose = quiet, verbose
        self._total = 0
        self._began = self._shown_at = time.monotonic()
        self._shown_cases = 0
        self._line = ""
        self._gone = False

    def planned(self, total: int, *, again: bool = False) -> None:
        """The number of cases is known; ``again``: more are known than before."""
        self._total = total
        if not again:
            self._began = time.monotonic()

    def running(self, run: Run, case_id: str) -> None:
        """A case starts."""
        if self._tty and time.monotonic() - self._shown_at >= _REWRITE_SECONDS:
            self._rewrite(f"{self._counts(run)}  {case_id}")

    def ended(self, run: Run, case: Case) -> None:
        """A case ended."""
        if case.outcome in FAILED:
            shown = self._painted(case.outcome.upper(), case.outcome)
            self.line(f"{shown} {case.id}: {case.summary}")
        elif self._verbose:
            reason = f": {first_line(case.detail)}" if case.outcome != "passed" else ""
            shown = self._painted(case.outcome, case.outcome)
            self.line(f"{shown} {case.id} ({case.seconds:.3f} s){reason}")
        now, done = time.monotonic(), len(run.cases)
        if self._tty:
            if now - self._shown_at >= _REWRITE_SECONDS:
                self._rewrite(self._counts(run))
        elif done - self._shown_cases >= _LOG_CASES or now - self._shown_at >= _LOG_SECONDS:
            self._shown_cases, self._shown_at = done, now
            self.line(self._counts(run))

    def line(self, text: str) -> None:
        """Write a line that stays."""
        if self._quiet:
            return
        if self._line:
            self._write("\r\x1b[K")
            self._line = ""
        self._write(text + "\n")

    def finish(self, run: Run) -> None:
        """Write the failures in full and the summary by series patch."""
        self.line("")
        for case in run.cases:
            if case.outcome in FAILED:
                self._failure(case)
        *table, last = summary_lines(run)
        for text in table:
            self.line(text)
        counts = run.summary()
        bad = any(counts[outcome] for outcome in FAILED) or run.problems or not run.cases
        self.line(self._painted(last, "failed" if bad else "passed"))

    def _painted(self, text: str, outcome: str) -> str:
        """The text in the colour of an outcome."""
        return f"\x1b[{_COLOURS[outcome]}m{text}\x1b[0m" if self._colour else text

    def _failure(self, case: Case) -> None:
        self.line(f"--- {self._painted(case.outcome, case.outcome)}: {case.id}")
        if case.sdm:
            self.line(f'    SDM, "{case.sdm}"; patch {case.series}')
        lines = case.detail.rstrip().splitlines()
        for text in lines[:_LONGEST_DETAIL_LINES]:
            self.line("    " + text)
        if len(lines) > _LONGEST_DETAIL_LINES:
            left = len(lines) - _LONGEST_DETAIL_LINES
            self.line(f"    ({left} more lines; --json keeps them)")
        for text in case.kernel_log.splitlines()[:20]:
            if text not in case.detail:
                self.line(f"    kernel: {text}")
        if case.rerun:
            self.line(f"    rerun: {case.rerun}")
        self.line("")

    def _counts(self, run: Run) -> str:
        counts = run.summary()
        shown = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
        seconds, done = time.monotonic() - self._began, len(run.cases)
        left = ""
        if _FIRST_ESTIMATE <= done < self._total:
            left = f", {_duration(seconds / done * (self._total - done))} left"
        return f"[{done}/{self._total}] {shown} {seconds:.0f} s{left}"

    def _rewrite(self, text: str) -> None:
        if self._quiet:
            return
        self._shown_at = time.monotonic()
        width = shutil.get_terminal_size().columns - 1
        self._line = text[:width]
        self._write(f"\r\x1b[K{self._line}")

    def _write(self, text: str) -> None:
        if self._gone:
            return
        encoding = self._out.encoding or "utf-8"  # a terminal may know ASCII only
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._out.write(text)
            self._out.flush()
        except (BrokenPipeError, ValueError):
            # The reader left, as head does; the run and its files go on.
            self._gone = True


def _duration(seconds: float) -> str:
    """About how long: "40 s" or "3 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def summary_lines(run: Run) -> list[str]:
    """Return the table by series patch and the last line of a run."""
    lines: list[str] = []
    table = run.by_patch()
    if table:
        columns = [name for name in OUTCOMES if run.summary()[name]]
        lines.append(f"{'patch':38}" + "".join(f"{name:>9}" for name in columns))
        for number, counts in table.items():
            title = f"{number:>3} {PATCHES.get(number, '')}" if number else "  - other tests"
            numbers = "".join(f"{counts[name] or '':>9}" for name in columns)
            lines.append(f"{title:38}{numbers}".rstrip())
        lines.append("")
    skips = _skips(run)
    if skips:
        lines += ["skipped:", *skips, ""]
    if run.no_longer:
        lines.append("known deviations that no longer happen (update known.toml):")
        lines += [f"  {name}: {why}" for name, why in run.no_longer]
        lines.append("")
    for problem in run.problems:
        lines.append(f"problem: {problem}")
    if run.stopped:
        lines.append(run.stopped)
    left = run.not_run()
    if left:
        lines.append(f"not run: {len(left)} of {len(run.planned)} cases, the first is {left[0]}")
    lines.append(last_line(run))
    return lines


def slowest(run: Run, count: int) -> list[str]:
    """Lines of the ``count`` slowest cases, the slowest first."""
    found = sorted(run.cases, key=lambda case: -case.seconds)[:count]
    return [f"slowest {len(found)} cases:", *(f"  {c.seconds:8.3f} s {c.id}" for c in found), ""]


def _skips(run: Run) -> list[str]:
    reasons: dict[str, int] = {}
    for case in run.cases:
        if case.outcome == "skipped":
            reasons[case.detail] = reasons.get(case.detail, 0) + 1
    return [f"  {count:3} {reason}" for reason, count in sorted(reasons.items())]


def last_line(run: Run) -> str:
    """Counts, time and place of a run in one line."""
    counts = run.summary()
    shown = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
    where = f"{run.target}, kernel {run.kernel or 'unknown'}"
    return f"{shown or 'nothing ran'} in {run.seconds:.1f} s ({where})"
