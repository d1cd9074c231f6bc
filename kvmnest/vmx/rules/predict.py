"""Which way a VM entry will go, from the rules alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmnest.vmx.caps import Capabilities
from kvmnest.vmx.errors import VmxError
from kvmnest.vmx.fields import Field
from kvmnest.vmx.outcome import EntryFailure, Outcome, VMfailValid
from kvmnest.vmx.reasons import ExitReason
from kvmnest.vmx.rules import (
    controls_exit_entry,
    controls_pin_proc,
    guest_nonregister,
    guest_registers,
    guest_segments,
    host,
    msr_load,
)
from kvmnest.vmx.rules.model import Entry, EntryContext, MemoryReader, Rule, Stage, Violation

_BY_STAGE: tuple[tuple[Rule, ...], ...] = (
    (
        *controls_pin_proc.RULES,
        *controls_exit_entry.RULES,
        *host.RULES,
    ),
    (*guest_registers.RULES, *guest_segments.RULES, *guest_nonregister.RULES),
    msr_load.RULES,
)
"""VM entry checks controls and host state in any order, then guest state, then loads MSRs."""


@dataclass(frozen=True)
class Prediction:
    """What the SDM says about a VM entry.

    ``violations`` holds the broken rules of the earliest group of stages that has any. With
    none of them (or only optional ones) the entry may succeed.
    """

    violations: tuple[Violation, ...] = ()

    @property
    def must_fail(self) -> bool:
        """At least one rule that every processor checks is broken."""
        return any(not violation.optional for violation in self.violations)

    @property
    def may_succeed(self) -> bool:
        """The guest may run."""
        return not self.must_fail

    @property
    def stage(self) -> Stage | None:
        """Where the entry fails (the first of the broken rules), None when it succeeds."""
        return self.violations[0].stage if self.violations else None

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """Every failure that the SDM allows here: the order inside a group is free."""
        found: list[Outcome] = []
        for violation in self.violations:
            outcome = _outcome(violation)
            if outcome not in found:
                found.append(outcome)
        return tuple(found)

    def allows(self, outcome: Outcome) -> bool:
        """Whether an observed VMfailValid or EntryFailure is one of the allowed failures."""
        return outcome in self.failures

    def __str__(self) -> str:
        """One line a rule, or that VM entry succeeds."""
        return "\n".join(map(str, self.violations)) or "no rule objects: VM entry succeeds"


def _outcome(violation: Violation) -> Outcome:
    if violation.stage is Stage.CONTROL:
        return VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
    if violation.stage is Stage.HOST:
        return VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD)
    if violation.stage is Stage.MSR_LOAD:
        return EntryFailure(ExitReason.MSR_LOAD_FAIL, violation.qualification)
    return EntryFailure(ExitReason.INVALID_GUEST_STATE, violation.qualification)


def check(
    vmcs: Mapping[Field, int],
    caps: Capabilities,
    memory: MemoryReader | None = None,
    context: EntryContext | None = None,
) -> list[Violation]:
    """Every broken rule of every stage, in the order of the stages.

    ``vmcs`` maps fields to unsigned values (absent: 0). ``memory`` reads L1's memory; without
    it the rules about VTPR, the VMCS link pointer, PDPTEs without EPT and the MSR-load area
    are left out. A rule of a late stage is reported even if an earlier one already fails.
    """
    entry = Entry(vmcs, caps, memory, context or EntryContext())
    return [v for rules in _BY_STAGE for rule in rules for v in rule(entry)]


def predict(
    vmcs: Mapping[Field, int],
    caps: Capabilities,
    memory: MemoryReader | None = None,
    context: EntryContext | None = None,
) -> Prediction:
    """The fate of a VM entry; arguments as for `check`.

    Stops after the first group of stages with a rule that must fail.
    """
    entry = Entry(vmcs, caps, memory, context or EntryContext())
    optional: list[Violation] = []
    for rules in _BY_STAGE:
        found = [v for rule in rules for v in rule(entry)]
        if any(not violation.optional for violation in found):
            return Prediction((*optional, *found))
        optional += found
    return Prediction(tuple(optional))
