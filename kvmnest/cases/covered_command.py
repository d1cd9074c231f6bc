"""``python3 -m kvmnest.cases.covered_command EVENTS COMMAND...``: what a command makes KVM run.

It runs the command and then writes one event ``coverage`` with the blocks that ran until its end.
"""

from __future__ import annotations

import subprocess
import sys

from kvmnest.cases.covered import Covered
from kvmnest.cases.events import EventWriter


def main(events: str, *command: str) -> int:
    """Run ``command``; returns its exit status."""
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        print(f"kvmnest: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        status = 127
    EventWriter(events).send("coverage", **Covered().news())
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
