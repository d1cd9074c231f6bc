"""``kvmnest VERB ...``: finds the verb's module, runs it, turns errors into one line."""

from __future__ import annotations

import argparse
import errno
import os
import pkgutil
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import kvmnest
from kvmnest import cli
from kvmnest.errors import HarnessError, KvmnestError, UsageError

INTERRUPTED = 130
# Errors of a name that the user gave, not of the machine.
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def verbs() -> list[str]:
    """Names of all verbs: the modules of ``kvmnest.cli``, but for those that help others.

    A helper of one verb has a name of two words ("run_options").
    """
    found = (module.name for module in pkgutil.iter_modules(cli.__path__))
    return sorted(name for name in found if name not in ("main", "numbers") and "_" not in name)


class _Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one line, without the usage of all others.

    Ids and files may stand before, between and behind the options of a verb.
    """

    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take positional arguments wherever they stand, which argparse does not by itself."""
        # Behind "--" stands a command, whose own options are none of ours.
        if self._mixing or self._subparsers is not None or "--" in (args or ()):
            return super().parse_known_args(args, namespace)
        self._mixing = True  # what follows calls this method itself
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message} ({self.prog} --help lists what there is)")


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser, with the verb of ``argv`` only if there is one (imports are slow)."""
    top = _Parser(
        prog="kvmnest", description="Test nested VMX of KVM with a bare-metal L1 driven by Python."
    )
    top.add_argument("--version", action="version", version=f"kvmnest {kvmnest.__version__}")
    subparsers = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    names = verbs()
    wanted = next((word for word in argv if not word.startswith("-")), "")
    for name in [wanted] if wanted in names else names:
        module = import_module(f"kvmnest.cli.{name}")
        module.add_parser(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Never 1 for an error: to whoever asks, that says that a case failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    try:
        known = _parsed(arguments)
        code: int = import_module(f"kvmnest.cli.{known.verb}").run(known)
        sys.stdout.flush()
        return code
    except KvmnestError as error:
        return _tell(error)
    except KeyboardInterrupt:
        print("kvmnest: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return 128 + 13
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            _drop_output()
            return _tell(HarnessError(f"cannot write the output: {error.strerror}"))
        if error.filename is not None and error.errno in _BAD_NAMES:
            return _tell(UsageError(f"{os.fsdecode(error.filename)}: {error.strerror}"))
        return _unforeseen(error)
    except Exception as error:
        return _unforeseen(error)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    try:
        return parser(arguments).parse_args(arguments)
    except SystemExit:
        # --help and --version: what they print may not have reached the stream yet.
        sys.stdout.flush()
        raise


def _tell(error: KvmnestError) -> int:
    # An error of the lab has lines of the console; what the user typed makes no line.
    kept = "" if error.exit_code == UsageError.exit_code else "\n"
    shown = "".join(
        char if char.isprintable() or char in kept else repr(char)[1:-1] for char in str(error)
    )
    text = re.sub(r"\S{199,}[^\s:]", _shortened, shown)
    print(f"kvmnest: {text}", file=sys.stderr)
    return error.exit_code


def _shortened(word: re.Match[str]) -> str:
    return f"{word[0][:100]}... ({len(word[0])} characters)"


def _prepare_streams() -> None:
    """Make any text printable, and a stream that the caller closed no error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What the interpreter flushes at its end must not complain once more."""
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


def _unforeseen(error: BaseException) -> int:
    """One line for a defect of ours, with the traceback in a file."""
    text = "".join(traceback.format_exception(error))
    where = text
    try:
        file, path = tempfile.mkstemp(prefix="kvmnest-traceback-", suffix=".txt")
        with open(file, "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
        where = f"(traceback in {path})"
    except OSError:
        pass
    summary = traceback.format_exception_only(error)[-1].strip().replace("\n", " ")
    return _tell(HarnessError(f"a defect of kvmnest: {summary} {where}"))


if __name__ == "__main__":
    sys.exit(main())
