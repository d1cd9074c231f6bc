"""The prompt's names that are the same everywhere, and what completes on its terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import kvmnest.vmx
from kvmnest.l1 import L1, L2Mode, Mode, Shadow, Vmcs, code
from kvmnest.vmx import explain, outcome


def vocabulary() -> dict[str, Any]:
    """The architecture's names, the outcomes, and L1's."""
    public = {n: v for n, v in vars(kvmnest.vmx).items() if n[0].isupper()}
    outcomes = {n: v for n, v in vars(outcome).items() if n[0].isupper() and n != "Any"}
    return {
        **public,
        **outcomes,
        **{"L1": L1, "L2Mode": L2Mode, "Mode": Mode, "Shadow": Shadow, "Vmcs": Vmcs},
        **{"code": code, "explain": explain},
    }


def types_of(names: Mapping[str, Any]) -> dict[str, str]:
    """Names that a user of the prompt made, with the module and class of their values."""
    fixed = vocabulary()
    return {
        name: f"{type(value).__module__}:{type(value).__qualname__}"
        for name, value in names.items()
        if name not in fixed and not name.startswith("__")
    }


def stand_ins(types: Mapping[str, str]) -> dict[str, Any]:
    """For each of ``types_of`` its class, which has the same attributes, or None."""
    found = {}
    for name, path in types.items():
        module, _, qualified = path.partition(":")
        found[name] = getattr(sys.modules.get(module), qualified, None)
    return found


def use_readline(names: Callable[[], Mapping[str, Any]]) -> None:
    """Complete ``names`` on this terminal. Raises ImportError without readline."""
    import readline
    import rlcompleter

    made = [rlcompleter.Completer({})]

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            made[0] = rlcompleter.Completer(dict(names()))
        return made[0].complete(text, state)

    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
