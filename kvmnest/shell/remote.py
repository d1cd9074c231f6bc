"""The guest's side of a prompt in the lab: executes what the host's prompt sends."""

from __future__ import annotations

import json
import os
import sys

from kvmnest.errors import KvmnestError
from kvmnest.lab.guest import EVENTS_PATH, Mailbox
from kvmnest.shell.namespace import Namespace

PAGES = 16
KEY = 0x3C


def main() -> int:
    """Serve the prompt until it ends."""
    try:
        space = Namespace(sys.stdout.write)
    except KvmnestError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        return error.exit_code
    events = os.open(EVENTS_PATH, os.O_WRONLY)
    mailbox = Mailbox(PAGES, KEY)

    def tell(mark: bytes) -> None:
        # What was printed must be on its way before the prompt appears.
        sys.stdout.flush()
        os.write(events, json.dumps({"mark": mark.hex()}).encode() + b"\n")

    while True:
        source = mailbox.wait(tell)["source"]
        if source is None:
            space.close()
            return 0
        try:
            space.run(source)
        except SystemExit:
            space.close()
            return 0


if __name__ == "__main__":
    sys.exit(main())
