"""Modules as the host's pytest compiled them, for the guest."""

from __future__ import annotations

import importlib.util
import marshal
import os
import types
from collections.abc import Container
from pathlib import Path

import kvmnest
from kvmnest.lab.rootfs import REWRITTEN, SITE

_PYC_HEADER = 16
# Loaded without a look at the source (PEP 552: hash-based, unchecked).
_UNCHECKED = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + bytes(8)


def rewritten(
    pycache: Path, tail: str, *, light: bool, tests: Container[str] | None = None
) -> dict[str, bytes]:
    """The suite and the reproducers as pytest compiled them: guest path -> content.

    ``pycache`` is the folder below which Python kept them, ``tail`` how the names of those of this
    pytest end: it may hold what other versions compiled. A damaged file is left out; pytest has
    written those anew that it needed.

    For the light runner they stand where Python looks for compiled modules, else where pytest
    does. Of the modules that hold cases only ``tests`` are given (names with dots, None: all).
    """
    base = Path(kvmnest.__file__).parent
    mirrored = pycache / base.relative_to("/")
    files = {}
    for source in sorted(path for part in REWRITTEN for path in (base / part).rglob("*.py")):
        plain = Path(importlib.util.cache_from_source(source.name)).name
        inside = Path(f"/{SITE}/kvmnest") / source.relative_to(base)
        module = ".".join(source.relative_to(base.parent).with_suffix("").parts)
        if tests is not None and source.name.startswith("test_") and module not in tests:
            continue
        path = mirrored / source.parent.relative_to(base) / f"{source.stem}{tail}"
        try:
            pyc = path.read_bytes()
            code = _renamed(marshal.loads(pyc[_PYC_HEADER:]), str(inside))
        except (OSError, EOFError, ValueError, TypeError, AttributeError):
            continue
        header = _UNCHECKED if light else pyc[:_PYC_HEADER]
        name = plain if light else path.name
        files[os.fspath(inside.parent / "__pycache__" / name)] = header + marshal.dumps(code)
    return files


def _renamed(code: types.CodeType, filename: str) -> types.CodeType:
    """The code with its file named as in the guest, where tracebacks look for source lines."""
    constants = tuple(
        _renamed(const, filename) if isinstance(const, types.CodeType) else const
        for const in code.co_consts
    )
    return code.replace(co_filename=filename, co_consts=constants)
