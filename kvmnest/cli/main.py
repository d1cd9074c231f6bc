"""``kvmnest VERB ...``: finds the verb's module, runs it, turns errors into one line."""

from __future__ import annotations

import argparse
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module

import kvmnest
from kvmnest import cli
from kvmnest.errors import KvmnestError

INTERRUPTED = 130


def verbs() -> list[str]:
    """Names of all verbs: the modules of ``kvmnest.cli`` but this one."""
    found = (module.name for module in pkgutil.iter_modules(cli.__path__))
    return sorted(name for name in found if name != "main" and not name.startswith("_"))


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser, with the verb of ``argv`` only if there is one (imports are slow)."""
    top = argparse.ArgumentParser(
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
    """Run a command line; returns the exit code. Usage errors of argparse exit with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        known = parser(arguments).parse_args(arguments)
        code: int = import_module(f"kvmnest.cli.{known.verb}").run(known)
        sys.stdout.flush()
        return code
    except KvmnestError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("kvmnest: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left, as head does; the interpreter's own flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


if __name__ == "__main__":
    sys.exit(main())
