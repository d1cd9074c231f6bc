"""The CPU models of Bochs that have VMX: ``kvmnest/data/cpu-models.toml``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import HarnessError, UsageError
from kvmnest.known import kernel_in_range
from kvmnest.lab.errors import LabSetupError

MODELS_FILE = Path(__file__).parent.parent / "data" / "cpu-models.toml"
ALL = "all"


@dataclass(frozen=True)
class Model:
    """One model, for the versions of Bochs that ``bochs`` names (">=3", "any").

    ``clearcpuid`` are the features that the kernel must not use there, by Linux's bit number;
    ``default`` is true for the one that the lab uses unless told otherwise.
    """

    name: str
    clearcpuid: tuple[int, ...] = ()
    bochs: str = "any"
    default: bool = False


@once
def _models() -> tuple[Model, ...]:
    try:
        return tuple(
            Model(**{**entry, "clearcpuid": tuple(entry.get("clearcpuid", ()))})
            for entry in reading.toml(MODELS_FILE)["model"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{MODELS_FILE} cannot be used: {error}") from error


def names() -> list[str]:
    """Names of all models with VMX, oldest first."""
    return list(dict.fromkeys(model.name for model in _models()))


def usable(version: str, has: Iterable[str]) -> list[Model]:
    """The models with VMX of a Bochs that has models ``has``, oldest first."""
    offered = set(has)
    return [
        model
        for model in _models()
        if model.name in offered and kernel_in_range(version, model.bochs)
    ]


def choose(wanted: str | None, version: str, has: Iterable[str]) -> Model:
    """The model called ``wanted``, or the best for a Bochs that has models ``has``.

    Raises UsageError if it has no such model, or if that has no VMX; LabSetupError if none has.
    """
    found = {model.name: model for model in usable(version, has)}
    if not found:
        raise LabSetupError(f"Bochs {version} has no CPU model with VMX")
    if wanted is None:
        defaults = [model for model in found.values() if model.default]
        return (defaults or [*found.values()])[-1]
    if wanted not in found:
        why = "has no VMX" if wanted in set(has) else f"Bochs {version} has no such model"
        raise UsageError(f"--cpu-model {wanted}: {why}; there are {', '.join(found)}")
    return found[wanted]
