"""The guest's side of a prompt in the lab: executes what the host's prompt sends."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time

from kvmnest.errors import KvmnestError
from kvmnest.lab.guest import EVENTS_PATH, Mailbox
from kvmnest.shell import tick
from kvmnest.shell.namespace import Namespace
from kvmnest.shell.vocabulary import types_of

PAGES = 16
KEY = 0x3C
_POLL_SECONDS = 0.1


class Interrupts:
    """Ctrl-C on the host's terminal: KeyboardInterrupt in the statement that runs.

    A thread looks at the mailbox and signals the main thread, so that KVM_RUN returns too.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        #: Whether a statement runs. Set and tested in the main thread only.
        self.armed = False
        signal.signal(signal.SIGINT, self._raise)
        threading.Thread(target=self._watch, daemon=True).start()

    def _raise(self, number: int, frame: object) -> None:
        if self.armed:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while True:
            time.sleep(_POLL_SECONDS)
            if self._mailbox.interrupted():
                signal.pthread_kill(main, signal.SIGINT)


def main() -> int:
    """Serve the prompt until it ends."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # a statement that takes long shows what it prints
    try:
        space = Namespace(sys.stdout.write, tick.start)
    except KvmnestError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        return error.exit_code
    events = os.open(EVENTS_PATH, os.O_WRONLY)
    mailbox = Mailbox(PAGES, KEY)
    interrupts = Interrupts(mailbox)

    def tell(mark: bytes) -> None:
        # What was printed must be on its way before the prompt appears.
        sys.stdout.flush()
        ready = {"mark": mark.hex(), "names": types_of(space.names)}
        os.write(events, json.dumps(ready).encode() + b"\n")

    while True:
        source = mailbox.wait(tell)["source"]
        if source is None:
            break
        try:
            interrupts.armed = True
            space.run(source)
            interrupts.armed = False
        except KeyboardInterrupt:  # at the very end of the statement
            interrupts.armed = False
            print("KeyboardInterrupt")
        except SystemExit:
            break
    interrupts.armed = False
    space.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
