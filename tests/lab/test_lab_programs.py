"""Programs that the lab starts, and signals that arrive while one starts."""

import signal
import subprocess
import sys

import pytest
from lab_processes import gone

# Python runs such hooks in Popen, and drops what a signal's handler raises in one.
START = """
import os, signal
from kvmnest.lab import tools

def raise_it(number, frame):
    raise InterruptedError(number)

signal.signal(signal.{name}, {handler})
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.{name}))
try:
    process = tools.start(["sleep", "60"])
except (KeyboardInterrupt, InterruptedError) as e:
    print(type(e).__name__, end=" ")
else:
    print("runs", process.pid > 0, end=" ")
    process.kill()
    process.wait()
print(repr(open(f"/proc/self/task/{{os.getpid()}}/children").read()), end=" ")
print(signal.getsignal(signal.{name}) is {handler})
"""


@pytest.mark.parametrize(
    ("name", "handler", "shown"),
    [
        ("SIGINT", "signal.default_int_handler", "KeyboardInterrupt '' True"),
        ("SIGINT", "signal.SIG_IGN", "runs True '' True"),
        ("SIGTERM", "raise_it", "InterruptedError '' True"),
    ],
)
def test_signal_while_a_program_starts(name: str, handler: str, shown: str) -> None:
    """It is not lost, and the program does not stay."""
    script = START.format(name=name, handler=handler)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.stdout.strip(), done.stderr) == (shown, "")


def test_a_program_ends_with_what_started_it() -> None:
    script = "from kvmnest.lab import tools; print(tools.start(['sleep', '60']).pid, flush=True); "
    script += "import os; os.kill(os.getpid(), 9)"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, check=False, timeout=30
    )
    assert done.returncode == -signal.SIGKILL
    # The signal is on its way when the process that started it is gone.
    assert gone(int(done.stdout), 10)
