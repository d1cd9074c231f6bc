"""What the prompt shows of an exception."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from kvmnest.errors import KvmnestError


def describe(error: BaseException, names: Mapping[str, Any]) -> str:
    """Show an exception that a statement ended with, as lines.

    Errors of kvmnest and Ctrl-C are one line: where in kvmnest they came up helps nobody. A name
    that does not exist gets those that it may have meant.
    """
    if isinstance(error, KeyboardInterrupt):
        return "KeyboardInterrupt\n"
    if isinstance(error, KvmnestError):
        return f"{type(error).__name__}: {error}\n"
    at = error.__traceback__
    at = at.tb_next if at else None
    text = "".join(traceback.format_exception(type(error), error, at))
    # Python from 3.12 on has the suggestion in the text.
    near = [] if "Did you mean" in text else _near(error, names)
    return text + (f"Did you mean: {', '.join(near)}? help shows what there is\n" if near else "")


def _near(error: BaseException, names: Mapping[str, Any]) -> list[str]:
    known: Iterable[str]
    if isinstance(error, NameError):
        known, wrong = names, error.name
    elif isinstance(error, AttributeError):
        # An enumeration tells neither object nor name, but its message is the name.
        of, wrong = error.obj, error.name or str(error)
        known = dir(of) if of is not None else _members(names)
    else:
        return []
    public = [name for name in known if not name.startswith("_")]
    return difflib.get_close_matches(str(wrong), public, n=3, cutoff=0.75)


def _members(names: Mapping[str, Any]) -> list[str]:
    return [m for value in names.values() for m in getattr(value, "__members__", ())]
