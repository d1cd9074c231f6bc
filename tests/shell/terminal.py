"""``kvmnest shell`` on a pseudo terminal."""

import os
import signal
import sys
import time
from pathlib import Path

import pexpect

PROMPT = "\n>>> "
# This machine's /dev/kvm may have no VMX, which the verb refuses; everything else of it runs.
HERE = [
    "-c",
    "import sys; from kvmnest.cli import main, shell; shell.use_host = lambda options: True;"
    " sys.exit(main.main(['shell']))",
]
IN_LAB = ["-m", "kvmnest.cli.main", "shell", "--target", "lab"]
_BOOT_SECONDS = 400  # from cold, on a busy machine
_SECONDS = 120


class Terminal:
    """A prompt at which a user types. ``sigint_ignored``: as a background job's child has it."""

    def __init__(self, home: Path, arguments: list[str], *, sigint_ignored: bool = False) -> None:
        before = signal.SIG_IGN if sigint_ignored else signal.default_int_handler

        def setup() -> None:
            signal.signal(signal.SIGINT, before)

        self._child = pexpect.spawn(
            sys.executable,
            arguments,
            env={**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb"},
            timeout=_SECONDS,
            encoding="utf-8",
            dimensions=(50, 200),
            preexec_fn=setup,
        )

    def wait(self, text: str = PROMPT, seconds: float = _BOOT_SECONDS) -> str:
        """What came before ``text``."""
        self._child.expect_exact(text, timeout=seconds)
        return str(self._child.before).replace("\r", "")

    def type(self, text: str) -> None:
        """Press keys."""
        self._child.send(text)

    def run(self, statement: str) -> str:
        """Type a statement; what it showed, without itself."""
        self._child.sendline(statement)
        return self.wait(seconds=_SECONDS).partition("\n")[2]

    def start(self, statement: str) -> None:
        """Type a statement that will not end, and see it begin."""
        self._child.sendline(f"print('be' 'gins'); {statement}")
        self.wait("begins\r\n", _SECONDS)

    def interrupt(self) -> str:
        """Ctrl-C; what is shown up to the next prompt."""
        self._child.sendintr()
        return self.wait(seconds=_SECONDS)

    def stop(self, statement: str, shown: str) -> bool:
        """Start and interrupt a statement until ``shown`` is seen; False if it never is.

        Ctrl-C may come before the code that the statement runs, and is then Python's alone.
        """
        for _ in range(5):
            self.start(statement)
            time.sleep(0.3)
            if shown in self.interrupt():
                return True
        return False

    def drop_line(self, typed: str) -> str:
        """Ctrl-C on a line that is being typed; what is shown up to the next prompt.

        CPython's readline module does not see a signal that arrives while it works on a key, only
        one that arrives while it waits for the next. Nobody types so fast; a machine that is busy
        may be as slow.
        """
        self._child.expect_exact(typed)
        while True:
            self._child.sendintr()
            if self._child.expect_exact([PROMPT, pexpect.TIMEOUT], timeout=10) == 0:
                return str(self._child.before).replace("\r", "")

    def end(self, key: str) -> tuple[str, int]:
        """Ctrl-C or Ctrl-D; the last output and the exit code."""
        self._child.sendcontrol(key)
        self._child.expect(pexpect.EOF)
        text = str(self._child.before).replace("\r", "")
        self._child.close()
        return text, self._child.exitstatus

    def children(self) -> list[int]:
        """Processes that the shell started and that are alive."""
        listed = Path(f"/proc/{self._child.pid}/task/{self._child.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]

    def kill(self) -> None:
        """For the end of a test, whatever became of it."""
        self._child.close(force=True)


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
