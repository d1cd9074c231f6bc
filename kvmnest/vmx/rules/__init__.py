"""The SDM's checks on VM entry as pure functions: they predict and explain failed entries."""

from __future__ import annotations

from kvmnest.vmx.rules.model import EntryContext, MemoryReader, Section, Stage, Violation
from kvmnest.vmx.rules.predict import Prediction, check, predict

__all__ = [
    "EntryContext",
    "MemoryReader",
    "Prediction",
    "Section",
    "Stage",
    "Violation",
    "check",
    "predict",
]
