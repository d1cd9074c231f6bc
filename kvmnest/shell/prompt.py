"""The prompt: reads statements, and shows what comes back."""

from __future__ import annotations

import codeop
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from kvmnest import disassembly
from kvmnest.errors import HarnessError
from kvmnest.lab.machine import Lab
from kvmnest.shell.namespace import CODE_LINE, HELP, Namespace
from kvmnest.shell.remote import PAGES


class Prompt:
    """Reads complete statements from stdin; prompts and history only on a terminal."""

    def __init__(self, complete: Mapping[str, Any]) -> None:
        self._compile = codeop.CommandCompiler()
        self._terminal = sys.stdin.isatty()
        if self._terminal:
            with contextlib.suppress(ImportError):
                import readline
                import rlcompleter

                readline.set_completer(rlcompleter.Completer(dict(complete)).complete)
                readline.parse_and_bind("tab: complete")

    def read(self) -> str | None:
        """The next statement; None at the end of input. Errors of syntax are shown."""
        lines: list[str] = []
        while True:
            try:
                line = self._line("... " if lines else ">>> ")
            except EOFError:
                if not lines:
                    return None
                line = ""
            except KeyboardInterrupt:
                print("\nKeyboardInterrupt (Ctrl-D ends)")
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
        if self._terminal:
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


def here() -> int:
    """A prompt with an L1 on this machine's /dev/kvm. Raises KvmUnavailable."""
    output = Output(_show)
    space = Namespace(output.feed)
    prompt = Prompt(space.names)
    while (source := prompt.read()) is not None:
        try:
            space.run(source)
        except SystemExit:
            break
    space.close()
    return 0


def in_lab(lab: Lab) -> int:
    """A prompt with an L1 on a kernel in the lab. Raises what Lab.run raises."""
    import kvmnest.vmx
    from kvmnest.l1 import L1, code

    prompt = Prompt({**vars(kvmnest.vmx), "l1": L1, "code": code})
    output = Output(_show)

    ready = False

    def show_kernel(data: bytes) -> None:
        if ready:  # what the boot says is not about L1
            sys.stderr.write(data.decode(errors="replace"))

    def take(line: bytes) -> None:
        nonlocal ready
        ready = True
        output.flush()
        mark = bytes.fromhex(json.loads(line)["mark"])
        lab.post(mark, PAGES, {"source": prompt.read()})

    status = lab.run(
        ["python3", "-m", "kvmnest.shell.remote"],
        on_event=take,
        on_output=lambda data: output.feed(data.decode(errors="replace")),
        on_kernel=show_kernel,
        idle_limit=120,
    )
    output.flush()
    if status:
        raise HarnessError(f"the lab's side of the prompt ended with status {status}")
    return 0
