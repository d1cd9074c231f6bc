"""Which kernel messages report a defect, so that a case in which one comes has failed.

Other messages do not count: on a real machine other drivers warn too. The words are those of the
kernel's sources; each begins a message, perhaps behind a prefix such as "rcu: ".
"""

from __future__ import annotations

import re

_MOST_LINES = 40
_MOST_BEFORE = 5
_STAMP = re.compile(r"^\[ *(\d+\.\d+)\] ?")
_ONE_TRAP = 0.001  # seconds between two messages of one trap, in the lab as well
_WORDS = (
    # WARN(): with CPU and PID first, since Linux 6.18 with the file first.
    r"WARNING: CPU: ",
    r"WARNING: \S+:\d+ at ",
    # lockdep and RCU
    r"WARNING: (?:possible|inconsistent|bad|held|lock|suspicious|nested|Nested|HARDIRQ|SOFTIRQ)\b",
    r"WARNING: .*\block",
    r"(?:INFO: )?possible (?:circular|recursive|irq) lock",
    r"INFO: trying to register non-static key",
    r"(?:INFO: )?suspicious RCU usage",
    r"INFO: rcu\w* .*stall",
    # BUG(), oops, lockups, KASAN, KFENCE, KCSAN
    r"BUG: ",
    r"kernel BUG at ",
    r"Oops\b",
    r"general protection fault",
    r"(?:divide error|invalid opcode|stack segment|double fault): ",
    r"Unable to handle kernel ",
    r"INFO: task .* blocked ",
    r"KASAN: ",
    r"UBSAN: ",
    # KVM: what it has no code for. Not an MSR, or a bit of one, that it does not offer: any guest
    # may ask for that, and KVM says so on purpose (its parameter report_ignored_msrs).
    r"kvm\b.*\bunhandled\b(?! (?:rd|wr)msr\b)",
    r"kvm\b.*\bunexpected exit reason\b",
)
#: Found at the beginning of a message, behind at most one prefix of a subsystem.
_REPORT = re.compile(rf"(?:[\w-]+: )?(?:{'|'.join(_WORDS)})", re.IGNORECASE)
_CUT_HERE = "[ cut here ]"


def message(line: str) -> str:
    """A line of the log without its time."""
    return _STAMP.sub("", line)


def reports(log: str) -> list[str]:
    """The messages of a log that begin a report, without their times."""
    found = (message(line) for line in log.splitlines())
    return [text for text in found if _REPORT.match(text)]


def told(log: str) -> str:
    """The part of a log from its first report on, with its call trace; at most 40 lines."""
    lines = log.splitlines()
    first = next((i for i, line in enumerate(lines) if _REPORT.match(message(line))), len(lines))
    first = _beginning(lines, first)
    shown = lines[first : first + _MOST_LINES]
    left = len(lines) - first - len(shown)
    return "\n".join([*shown, *([f"({left} more lines in kernel_log)"] if left > 0 else [])])


def _beginning(lines: list[str], first: int) -> int:
    """Index of the first line that belongs to the report in line ``first``.

    The text of a WARN(condition, text) comes before the report: behind the line to cut at, or
    (Linux 7.3 prints no such line) as one message of the same trap.
    """
    before = range(max(0, first - _MOST_BEFORE), first)
    cut = max((i for i in before if _CUT_HERE in lines[i]), default=None)
    if cut is not None:
        return cut
    if before and first < len(lines) and message(lines[first]).startswith("WARNING: "):
        text, report = _STAMP.match(lines[first - 1]), _STAMP.match(lines[first])
        if text and report and 0 <= float(report[1]) - float(text[1]) < _ONE_TRAP:
            return first - 1
    return first
