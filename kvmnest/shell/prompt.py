"""The prompt: reads statements, and shows what comes back."""

from __future__ import annotations

import codeop
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvmnest import disassembly
from kvmnest.errors import HarnessError
from kvmnest.kvm import Kvm
from kvmnest.l1 import L1, Vmcs
from kvmnest.lab.machine import Lab
from kvmnest.shell.history import kept
from kvmnest.shell.namespace import CODE_LINE, HELP, Namespace
from kvmnest.shell.remote import PAGES
from kvmnest.shell.vocabulary import stand_ins, use_readline, vocabulary


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C on a terminal, which shows ``^C``: what is said of it begins a line of its own."""
    os.write(sys.stdout.fileno(), b"\n")
    raise KeyboardInterrupt


class Prompt:
    """Reads complete statements from stdin; prompts, completion of ``names`` only on a terminal.

    ``greeting`` is shown above the first prompt on a terminal.
    """

    def __init__(self, names: Callable[[], Mapping[str, Any]], greeting: str) -> None:
        self._compile = codeop.CommandCompiler()
        self.terminal = sys.stdin.isatty()
        self._greeting = greeting if self.terminal else ""
        if self.terminal:
            # A shell starts its background jobs with SIGINT ignored, and what they start, say in
            # a terminal multiplexer, inherits that. Whoever has a prompt wants Ctrl-C.
            signal.signal(signal.SIGINT, _interrupt)
            with contextlib.suppress(ImportError):
                use_readline(names)

    def read(self) -> str | None:
        """The next statement; None at the end of input. Errors of syntax are shown."""
        if self._greeting:
            print(self._greeting)
            self._greeting = ""
        lines: list[str] = []
        while True:
            try:
                line = self._line("... " if lines else ">>> ")
            except EOFError:
                if self.terminal:
                    print()  # what comes next shall not stand behind the prompt
                if not lines:
                    return None
                line = ""
            except KeyboardInterrupt:
                print("KeyboardInterrupt (Ctrl-D ends)")
                lines = []
                continue
            lines.append(line)
            source = "\n".join(lines)
            if not source.strip():
                lines = []
                continue
            if source.strip() in ("help", "help()", "?"):
                print(HELP)
                lines = []
                continue
            try:
                whole = self._compile(source, "<kvmnest>", "single") is not None
            except (SyntaxError, ValueError, OverflowError) as error:
                print("".join(traceback.format_exception_only(type(error), error)), end="")
                lines = []
                continue
            if whole:
                return source + "\n"

    def _line(self, text: str) -> str:
        if self.terminal:
            return input(text)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class Output:
    """Passes on what the namespace writes, with code lines disassembled."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._partial = ""

    def feed(self, text: str) -> None:
        """Take text; a line that is not complete waits for its end."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if line.startswith(CODE_LINE):
                _, address, bits, count, code = line.split()
                found = disassembly.lines(
                    bytes.fromhex(code), int(address, 16), int(bits), int(count)
                )
                line = "\n".join(found)
            self._write(line + "\n")

    def flush(self) -> None:
        """Write the line that was begun."""
        if self._partial:
            self._write(self._partial)
            self._partial = ""


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stand_ins(more: Mapping[str, Any]) -> dict[str, Any]:
    """What completes: the prompt's names, with classes in place of what has to be asked KVM."""
    methods = {name: getattr(Namespace, name) for name in ("dump", "rules", "step", "dis", "new")}
    return {**more, **vocabulary(), "l1": L1, "vmcs": Vmcs, "kvm": Kvm, **methods}


def here() -> int:
    """A prompt with an L1 on this machine's /dev/kvm. Raises KvmUnavailable."""
    output = Output(_show)
    space = Namespace(output.feed)
    prompt = Prompt(
        lambda: _stand_ins(space.names), f"an L1 on /dev/kvm, Linux {os.uname().release}; type help"
    )
    with kept() if prompt.terminal else contextlib.nullcontext():
        while (source := prompt.read()) is not None:
            try:
                space.run(source)
            except SystemExit:
                break
            finally:
                output.flush()
    space.close()
    return 0


class _Interrupts:
    """Ctrl-C on a terminal, by what the lab does.

    While it boots or the prompt reads: KeyboardInterrupt here. While a statement runs: the first
    interrupts the statement in the guest, the next is KeyboardInterrupt here, which ends the lab.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._running = self._asked = False
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._running and not self._asked:
            self._asked = True
            self._lab.interrupt()
            os.write(sys.stdout.fileno(), b"\n")
            return
        if self._asked:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the emulator shall be ended in peace
        _interrupt(number, frame)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Post a statement inside: what arrives meanwhile is for the statement."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
            self._running = True
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    def statement_ended(self) -> None:
        """From now on the prompt reads."""
        self._running = self._asked = False


def in_lab(lab: Lab) -> int:
    """A prompt with an L1 on a kernel in the lab. Raises what Lab.run raises."""
    types: dict[str, str] = {}
    output = Output(_show)
    prompt = Prompt(
        lambda: _stand_ins(stand_ins(types)),
        f"an L1 on {lab.kernel.release} {lab.emulator.where}; type help",
    )
    interrupts = _Interrupts(lab) if prompt.terminal else None
    ready = False

    def show_kernel(data: bytes) -> None:
        if ready:  # what the boot says is not about L1
            sys.stderr.write(data.decode(errors="replace"))

    def take(line: bytes) -> None:
        nonlocal ready, types
        ready = True
        if interrupts:
            interrupts.statement_ended()
        output.flush()
        said = json.loads(line)
        types = said["names"]
        source = prompt.read()
        with interrupts.held() if interrupts else contextlib.nullcontext():
            lab.post(bytes.fromhex(said["mark"]), PAGES, {"source": source})

    if prompt.terminal:
        print(f"booting {lab.kernel.release} in the lab", flush=True)
    with kept() if prompt.terminal else contextlib.nullcontext():
        status = lab.run(
            ["python3", "-m", "kvmnest.shell.remote"],
            on_event=take,
            on_output=lambda data: output.feed(data.decode(errors="replace")),
            on_kernel=show_kernel,
            # Whoever sits there sees that nothing comes, and has Ctrl-C.
            idle_limit=None if prompt.terminal else 120,
        )
    output.flush()
    if status:
        raise HarnessError(f"the lab's side of the prompt ended with status {status}")
    return 0
